//! What is known of tokens and of certificates that were issued; no I/O.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use super::clock::Time;
use super::token::{Digest, Token};

/// A token that has ended is shown for so long.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

/// Certificates by the name of the node that they are for.
pub type Issued = BTreeMap<String, Vec<Holder>>;

/// Everything that is known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pages {
    /// The last time that a server knew to be right, in whole seconds: the next start compares its clock
    /// with it ([`super::clock`]).
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub settled: Option<SystemTime>,
    /// Tokens by their ids.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tokens: BTreeMap<String, Ticket>,
    /// Tokens of Kubernetes that were used, by what tells them apart.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pods: BTreeMap<String, PodTicket>,
    /// Every certificate that was issued here and is valid still.
    #[serde(deserialize_with = "one_or_many")]
    pub issued: Issued,
    /// What of them others may have again, by serial number.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub released: BTreeMap<String, Released>,
    /// What `cpc pki` issued from the same CA, which stands in a book of its own.
    #[serde(skip)]
    pub by_hand: Issued,
}

/// What a token is good for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ticket {
    /// Of its secret.
    pub digest: Digest,
    /// Which names it is for; `*` stands for any characters.
    pub nodes: String,
    /// Which addresses those nodes may have.
    pub addresses: Vec<IpNet>,
    /// How many more nodes may use it.
    pub uses: u32,
    /// Since when. Missing where an earlier release made it.
    #[serde(default, with = "humantime_serde")]
    pub created: Option<SystemTime>,
    /// Until when.
    #[serde(with = "humantime_serde")]
    pub expires: SystemTime,
    /// What came of it.
    #[serde(default, deserialize_with = "uses")]
    pub used: Vec<Use>,
}

/// Digests are not compared but for a token's sake.
impl PartialEq for Ticket {
    fn eq(&self, other: &Self) -> bool {
        let parts = |it: &Self| (it.nodes.clone(), it.addresses.clone(), it.uses, it.expires);
        parts(self) == parts(other) && self.used == other.used
    }
}

/// A token of Kubernetes that was used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PodTicket {
    /// Until when it has to be known.
    #[serde(with = "humantime_serde")]
    pub expires: SystemTime,
    /// What came of it.
    pub used: Use,
}

/// What somebody got by a token, and gets when they ask again: an answer can be lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Use {
    /// The node's name.
    pub node: String,
    /// The hash of its key.
    pub key: String,
    /// Its addresses.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// The certificate's serial number.
    #[serde(default)]
    pub serial: String,
    /// The certificate: DER in Base64. Empty where an earlier release issued it.
    #[serde(default)]
    pub certificate: String,
}

/// Who holds a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Node addresses in it.
    pub addresses: Vec<IpAddr>,
    /// The hash of its key.
    pub key: String,
    /// Its serial number, as `openssl x509 -serial` prints it.
    pub serial: String,
    /// Since when.
    #[serde(with = "humantime_serde")]
    pub since: SystemTime,
    /// Until when.
    #[serde(with = "humantime_serde")]
    pub until: SystemTime,
    /// The token that it came by at first.
    pub token: String,
}

/// What of a certificate others may have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Released {
    /// The name, and all addresses.
    pub whole: bool,
    /// These addresses.
    pub addresses: Vec<IpAddr>,
}

impl Pages {
    /// The token that `token` is, if it has not expired.
    pub(super) fn ticket(&self, token: &Token, now: SystemTime) -> Option<&Ticket> {
        let found = self.tokens.get(token.id());
        found.filter(|ticket| ticket.digest.is_of(token) && now < ticket.expires)
    }

    /// Every certificate on record, with the node's name.
    pub fn holders(&self) -> impl Iterator<Item = (&str, &Holder)> {
        let all = self.issued.iter().chain(&self.by_hand);
        all.flat_map(|(node, holders)| holders.iter().map(move |holder| (node.as_str(), holder)))
    }

    /// The certificate with that serial number, and the node's name.
    pub fn by_serial(&self, serial: &str) -> Option<(&str, &Holder)> {
        self.holders().find(|(_, holder)| holder.serial == serial)
    }

    /// Whether `holder` keeps its node's name from others.
    pub fn holds_name(&self, holder: &Holder, time: Time) -> bool {
        let released = self.released.get(&holder.serial);
        time.settled < holder.until && !released.is_some_and(|it| it.whole)
    }

    /// Whether `holder` keeps `address` from other nodes.
    pub fn holds_address(&self, holder: &Holder, address: &IpAddr, time: Time) -> bool {
        let released = self.released.get(&holder.serial);
        self.holds_name(holder, time)
            && holder.addresses.contains(address)
            && !released.is_some_and(|it| it.addresses.contains(address))
    }

    /// A certificate of another key that keeps the name `node`.
    pub fn name_holder(&self, node: &str, key: &str, time: Time) -> Option<&Holder> {
        let holders = [self.issued.get(node), self.by_hand.get(node)];
        let mut holders = holders.into_iter().flatten().flatten();
        holders.find(|holder| holder.key != key && self.holds_name(holder, time))
    }

    /// A certificate of another node than `node` that keeps `address`, and that node's name.
    pub fn address_holder(
        &self,
        node: &str,
        address: &IpAddr,
        time: Time,
    ) -> Option<(&str, &Holder)> {
        let mut holders = self.holders();
        holders.find(|(other, holder)| *other != node && self.holds_address(holder, address, time))
    }

    /// Those of a node's addresses that no other node keeps.
    pub fn still_of(&self, node: &str, addresses: &[IpAddr], time: Time) -> Vec<IpAddr> {
        let is_free = |address: &&IpAddr| self.address_holder(node, address, time).is_none();
        addresses.iter().filter(is_free).copied().collect()
    }

    /// Lets others have the name and the addresses of the certificate `serial`.
    pub fn release(&mut self, serial: &str) {
        self.released.entry(serial.into()).or_default().whole = true;
    }

    /// Lets others have one address of the certificate `serial`.
    pub fn release_address(&mut self, serial: &str, address: IpAddr) {
        let released = self.released.entry(serial.into()).or_default();
        if !released.addresses.contains(&address) {
            released.addresses.push(address);
        }
    }

    /// Writes down what was issued to a node that joined. The name and the addresses are its own from now
    /// on, so that who held them before has them renewed no more.
    pub fn joined(&mut self, node: &str, holder: Holder, time: Time) {
        while let Some(before) = self.name_holder(node, &holder.key, time) {
            let serial = before.serial.clone();
            self.release(&serial);
        }
        for address in &holder.addresses {
            while let Some((_, before)) = self.address_holder(node, address, time) {
                let serial = before.serial.clone();
                self.release_address(&serial, *address);
            }
        }
        self.record(node, holder);
    }

    /// Writes down what was issued.
    pub fn record(&mut self, node: &str, holder: Holder) {
        self.issued.entry(node.into()).or_default().push(holder);
    }

    /// Forgets what is over. The clock has to be right: what is forgotten does not come back.
    pub fn forget(&mut self, now: SystemTime) {
        self.tokens.retain(|_, it| now < it.expires + REMEMBERED);
        self.pods.retain(|_, it| now < it.expires);
        self.issued.retain(|_, holders| {
            holders.retain(|holder| now < holder.until);
            !holders.is_empty()
        });
        let mut released = std::mem::take(&mut self.released);
        released.retain(|serial, _| self.by_serial(serial).is_some());
        self.released = released;
    }
}

/// An earlier release kept one certificate a node.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Issued, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Known {
        One(Box<Holder>),
        Many(Vec<Holder>),
    }
    let read = BTreeMap::<String, Known>::deserialize(deserializer)?;
    let many = |known| match known {
        Known::One(holder) => vec![*holder],
        Known::Many(holders) => holders,
    };
    Ok({ read.into_iter() }
        .map(|(node, known)| (node, many(known)))
        .collect())
}

/// An earlier release kept names and keys.
fn uses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Use>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Known {
        Keys(BTreeMap<String, String>),
        Uses(Vec<Use>),
    }
    let of_key = |(node, key)| Use {
        node,
        key,
        addresses: Vec::new(),
        serial: String::new(),
        certificate: String::new(),
    };
    Ok(match Known::deserialize(deserializer)? {
        Known::Keys(keys) => keys.into_iter().map(of_key).collect(),
        Known::Uses(uses) => uses,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_book_of_an_earlier_release_is_read() {
        let text = r#"{
            "tokens": {"0123abcd": {
                "digest": "00", "nodes": "w*", "addresses": ["10.99.0.0/16"], "uses": 3,
                "expires": "2027-01-01T00:00:00Z", "used": {"w1": "sha256:01"}
            }},
            "issued": {"w1": {
                "addresses": ["10.99.0.1"], "key": "sha256:01", "serial": "4A",
                "since": "2026-11-01T00:00:00Z", "until": "2026-12-01T00:00:00Z", "token": "0123abcd"
            }}
        }"#;
        let pages: Pages = serde_json::from_str(text).unwrap();
        assert_eq!(pages.by_serial("4A").unwrap().0, "w1");
        let used = &pages.tokens["0123abcd"].used[0];
        assert_eq!((&*used.node, &*used.key), ("w1", "sha256:01"));
        let again = serde_json::to_string(&pages).unwrap();
        assert_eq!(serde_json::from_str::<Pages>(&again).unwrap(), pages);
    }
}
