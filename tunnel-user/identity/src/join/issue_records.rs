//! Data about tokens and issued certificates; no I/O.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};

use super::clock::Time;
use super::token::{Digest, Token};

/// Time for which an ended token is still listed.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

/// Certificates by the name of their node.
pub type Issued = BTreeMap<String, Vec<Holder>>;

/// All data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct IssueRecords {
    /// Last time that a server knew to be right, in whole seconds: the next start compares its clock
    /// with it ([`super::clock`]).
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub settled: Option<SystemTime>,
    /// Tokens by their ids.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tokens: BTreeMap<String, Ticket>,
    /// Used tokens of Kubernetes, by their unique ids.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pods: BTreeMap<String, PodTicket>,
    /// Every certificate that was issued here and is still valid.
    #[serde(deserialize_with = "one_or_many")]
    pub issued: Issued,
    /// Released names and addresses, by the serial number of their certificate.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub released: BTreeMap<String, Released>,
    /// Certificates that `cpc pki` issued from the same CA, from a file of their own.
    #[serde(skip)]
    pub by_hand: Issued,
}

/// Terms of a token.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ticket {
    /// Digest of the secret.
    pub digest: Digest,
    /// Pattern of the names that the token is for; `*` stands for any characters.
    pub nodes: String,
    /// Addresses that those nodes may have.
    pub addresses: Vec<IpNet>,
    /// Number of further nodes that may use the token.
    pub uses: u32,
    /// Creation time. Missing where an earlier release created the token.
    #[serde(default, with = "humantime_serde")]
    pub created: Option<SystemTime>,
    /// End of the token.
    #[serde(with = "humantime_serde")]
    pub expires: SystemTime,
    /// Uses of the token.
    #[serde(default, deserialize_with = "uses")]
    pub used: Vec<Use>,
}

/// Compares tokens: digests are compared only to verify a token.
impl PartialEq for Ticket {
    fn eq(&self, other: &Self) -> bool {
        let parts = |it: &Self| (it.nodes.clone(), it.addresses.clone(), it.uses, it.expires);
        parts(self) == parts(other) && self.used == other.used
    }
}

/// A used token of Kubernetes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PodTicket {
    /// Time until which the entry must stay.
    #[serde(with = "humantime_serde")]
    pub expires: SystemTime,
    /// The use.
    pub used: Use,
}

/// A certificate issued for a token. A repeated request gets it again, because an answer can be lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Use {
    /// Name of the node.
    pub node: String,
    /// Hash of the key.
    pub key: String,
    /// Addresses of the node.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// Serial number of the certificate.
    #[serde(default)]
    pub serial: String,
    /// The certificate: DER in Base64. Empty where an earlier release issued it.
    #[serde(default)]
    pub certificate: String,
}

/// Holder of a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Node addresses in the certificate.
    pub addresses: Vec<IpAddr>,
    /// Hash of the key.
    pub key: String,
    /// Serial number, as `openssl x509 -serial` prints it.
    pub serial: String,
    /// First moment of validity.
    #[serde(with = "humantime_serde")]
    pub since: SystemTime,
    /// Last moment of validity.
    #[serde(with = "humantime_serde")]
    pub until: SystemTime,
    /// Token of the first certificate.
    pub token: String,
}

/// The name and addresses of a certificate that others may have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Released {
    /// Whether the name and all addresses are released.
    pub whole: bool,
    /// Released addresses.
    pub addresses: Vec<IpAddr>,
}

impl IssueRecords {
    /// Returns the entry of `token`, if it has not expired.
    pub(super) fn ticket(&self, token: &Token, now: SystemTime) -> Option<&Ticket> {
        let found = self.tokens.get(token.id());
        found.filter(|ticket| ticket.digest.is_of(token) && now < ticket.expires)
    }

    /// Iterates over all certificates, with the name of the node.
    pub fn holders(&self) -> impl Iterator<Item = (&str, &Holder)> {
        let all = self.issued.iter().chain(&self.by_hand);
        all.flat_map(|(node, holders)| holders.iter().map(move |holder| (node.as_str(), holder)))
    }

    /// Returns the certificate with that serial number, and the name of the node.
    pub fn by_serial(&self, serial: &str) -> Option<(&str, &Holder)> {
        self.holders().find(|(_, holder)| holder.serial == serial)
    }

    /// Whether `holder` reserves the name of its node.
    pub fn holds_name(&self, holder: &Holder, time: Time) -> bool {
        let released = self.released.get(&holder.serial);
        time.settled < holder.until && !released.is_some_and(|it| it.whole)
    }

    /// Whether `holder` reserves `address`.
    pub fn holds_address(&self, holder: &Holder, address: &IpAddr, time: Time) -> bool {
        let released = self.released.get(&holder.serial);
        self.holds_name(holder, time)
            && holder.addresses.contains(address)
            && !released.is_some_and(|it| it.addresses.contains(address))
    }

    /// Returns a certificate of another key that reserves the name `node`.
    pub fn name_holder(&self, node: &str, key: &str, time: Time) -> Option<&Holder> {
        let holders = [self.issued.get(node), self.by_hand.get(node)];
        let mut holders = holders.into_iter().flatten().flatten();
        holders.find(|holder| holder.key != key && self.holds_name(holder, time))
    }

    /// Returns a certificate of another node than `node` that reserves `address`, and the name of that
    /// node.
    pub fn address_holder(
        &self,
        node: &str,
        address: &IpAddr,
        time: Time,
    ) -> Option<(&str, &Holder)> {
        let mut holders = self.holders();
        holders.find(|(other, holder)| *other != node && self.holds_address(holder, address, time))
    }

    /// Returns those addresses of a node that no other node reserves.
    pub fn still_of(&self, node: &str, addresses: &[IpAddr], time: Time) -> Vec<IpAddr> {
        let is_free = |address: &&IpAddr| self.address_holder(node, address, time).is_none();
        addresses.iter().filter(is_free).copied().collect()
    }

    /// Releases the name and the addresses of the certificate `serial`.
    pub fn release(&mut self, serial: &str) {
        self.released.entry(serial.into()).or_default().whole = true;
    }

    /// Releases one address of the certificate `serial`.
    pub fn release_address(&mut self, serial: &str, address: IpAddr) {
        let released = self.released.entry(serial.into()).or_default();
        if !released.addresses.contains(&address) {
            released.addresses.push(address);
        }
    }

    /// Records the certificate of a node that joined. Name and addresses belong to it from now on, so
    /// that their former holder can't renew them.
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

    /// Records an issued certificate.
    pub fn record(&mut self, node: &str, holder: Holder) {
        self.issued.entry(node.into()).or_default().push(holder);
    }

    /// Removes expired entries. The clock has to be right: a removed entry does not come back.
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

/// Reads also the format of an earlier release, with one certificate per node.
fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Issued, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Stored {
        One(Box<Holder>),
        Many(Vec<Holder>),
    }
    let read = BTreeMap::<String, Stored>::deserialize(deserializer)?;
    let many = |stored| match stored {
        Stored::One(holder) => vec![*holder],
        Stored::Many(holders) => holders,
    };
    Ok({ read.into_iter() }
        .map(|(node, stored)| (node, many(stored)))
        .collect())
}

/// Reads also the format of an earlier release, with names and keys.
fn uses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Use>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Stored {
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
    Ok(match Stored::deserialize(deserializer)? {
        Stored::Keys(keys) => keys.into_iter().map(of_key).collect(),
        Stored::Uses(uses) => uses,
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
        let records: IssueRecords = serde_json::from_str(text).unwrap();
        assert_eq!(records.by_serial("4A").unwrap().0, "w1");
        let used = &records.tokens["0123abcd"].used[0];
        assert_eq!((&*used.node, &*used.key), ("w1", "sha256:01"));
        let again = serde_json::to_string(&records).unwrap();
        assert_eq!(
            serde_json::from_str::<IssueRecords>(&again).unwrap(),
            records
        );
    }
}
