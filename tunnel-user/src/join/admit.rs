//! What is decided about somebody who asks for a certificate; without I/O.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::token::{Digest, Token};
use crate::tls::KeyHash;
use crate::tls::identity::{self, IdentityError};
use crate::tls::pattern::matches;

/// A token that has ended is shown for so long.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

/// The same certificate is not renewed more often.
const RENEWED_AFTER: Duration = Duration::from_secs(60);

/// Everything that is known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pages {
    /// Tokens by their ids.
    pub tokens: BTreeMap<String, Ticket>,
    /// What was issued last to each node and is valid still, by its name.
    pub issued: BTreeMap<String, Holder>,
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
    /// Until when.
    #[serde(with = "humantime_serde")]
    pub expires: SystemTime,
    /// Who used it: names, and the keys that may ask again.
    #[serde(default)]
    pub used: BTreeMap<String, String>,
}

/// Digests are not compared but for a token's sake.
impl PartialEq for Ticket {
    fn eq(&self, other: &Self) -> bool {
        let parts = |it: &Self| (it.nodes.clone(), it.addresses.clone(), it.uses, it.expires);
        parts(self) == parts(other) && self.used == other.used
    }
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

/// Why somebody gets none. For the one who asked, so it tells no more than the token's holder may know.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Unknown, wrong, expired or revoked: which of them is not a stranger's to know.
    #[error("the token is unknown, has expired or was revoked: `cpc token create` makes another")]
    Token,
    /// Others were faster.
    #[error("the token is used up: `cpc token create` makes another")]
    UsedUp,
    /// Not a name.
    #[error(transparent)]
    Name(#[from] IdentityError),
    /// A name that the token is not for.
    #[error("the token is for nodes called {nodes}, not for {node}")]
    Node {
        /// Which ones.
        nodes: String,
        /// Who asks.
        node: String,
    },
    /// An address that the token is not for.
    #[error("the token is not for a node with the address {0}: `cpc token create --ip` says which")]
    Address(IpAddr),
    /// The name is somebody's.
    #[error(
        "{node} has a certificate of another key until {until}; a token made with `--node {node}` replaces it",
        until = humantime::format_rfc3339_seconds(*.until)
    )]
    Taken {
        /// The name.
        node: String,
        /// How long that is so.
        until: SystemTime,
    },
    /// The address is somebody's.
    #[error(
        "{address} is in the certificate of {node} until {until}; a token made with `--ip {address}` moves it",
        until = humantime::format_rfc3339_seconds(*.until)
    )]
    AddressTaken {
        /// The address.
        address: IpAddr,
        /// Whose it is.
        node: String,
        /// How long that is so.
        until: SystemTime,
    },
    /// A peer that renews for ever.
    #[error("the certificate is younger than {} s", RENEWED_AFTER.as_secs())]
    TooSoon,
}

/// What somebody asks for.
#[derive(Clone, Debug)]
pub struct Asked<'a> {
    /// The node's name.
    pub node: &'a str,
    /// Its addresses.
    pub addresses: &'a [IpAddr],
    /// The key.
    pub key: KeyHash,
}

/// What the holder of a token may have.
struct Terms<'a> {
    nodes: &'a str,
    addresses: &'a [IpNet],
}

impl Pages {
    /// Whether `token` lets that in; counts its use.
    ///
    /// # Errors
    /// [`Refused`]; nothing was counted.
    pub fn by_token(
        &mut self,
        token: &Token,
        asked: &Asked<'_>,
        now: SystemTime,
    ) -> Result<(), Refused> {
        let found = self.tokens.get(token.id());
        let ticket = found.filter(|ticket| ticket.digest.is_of(token) && now < ticket.expires);
        let ticket = ticket.ok_or(Refused::Token)?;
        let terms = Terms {
            nodes: &ticket.nodes,
            addresses: &ticket.addresses,
        };
        self.check(&terms, asked, now)?;
        let key = asked.key.to_string();
        if ticket.used.get(asked.node) == Some(&key) {
            return Ok(());
        }
        let Some(uses) = ticket.uses.checked_sub(1) else {
            return Err(Refused::UsedUp);
        };
        if let Some(ticket) = self.tokens.get_mut(token.id()) {
            ticket.uses = uses;
            ticket.used.insert(asked.node.into(), key);
        }
        Ok(())
    }

    /// Whether the node `asked.node`, which somebody else vouches for, may have those addresses.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn by_name(
        &self,
        addresses: &[IpNet],
        asked: &Asked<'_>,
        now: SystemTime,
    ) -> Result<(), Refused> {
        let terms = Terms {
            nodes: asked.node,
            addresses,
        };
        self.check(&terms, asked, now)
    }

    /// Whether `node` may have its certificate renewed.
    ///
    /// # Errors
    /// [`Refused::TooSoon`].
    pub fn renewal(&self, node: &str, now: SystemTime) -> Result<(), Refused> {
        match self.issued.get(node) {
            Some(holder) if now < holder.since + RENEWED_AFTER => Err(Refused::TooSoon),
            _ => Ok(()),
        }
    }

    /// Those of a node's addresses that have not been given to another.
    pub fn still_of(&self, node: &str, addresses: &[IpAddr], now: SystemTime) -> Vec<IpAddr> {
        let is_free = |address: &&IpAddr| self.elsewhere(node, address, now).is_none();
        addresses.iter().filter(is_free).copied().collect()
    }

    /// Which node but `node` has a certificate with `address`.
    fn elsewhere(&self, node: &str, address: &IpAddr, now: SystemTime) -> Option<(&str, &Holder)> {
        let others = self.issued.iter().filter(|(other, _)| *other != node);
        { others }
            .find(|(_, holder)| now < holder.until && holder.addresses.contains(address))
            .map(|(other, holder)| (other.as_str(), holder))
    }

    fn check(&self, terms: &Terms<'_>, asked: &Asked<'_>, now: SystemTime) -> Result<(), Refused> {
        let node = asked.node;
        identity::check_name(node)?;
        if !matches(terms.nodes, node) {
            return Err(Refused::Node {
                nodes: terms.nodes.into(),
                node: node.into(),
            });
        }
        let beyond = |addr: &&IpAddr| !terms.addresses.iter().any(|net| net.contains(*addr));
        if let Some(address) = asked.addresses.iter().find(beyond) {
            return Err(Refused::Address(*address));
        }
        if let Some(holder) = self.issued.get(node)
            && now < holder.until
            && holder.key != asked.key.to_string()
            && terms.nodes != node
        {
            return Err(Refused::Taken {
                node: node.into(),
                until: holder.until,
            });
        }
        for address in asked.addresses {
            let is_named = terms.addresses.contains(&IpNet::from(*address));
            if let Some((other, holder)) = self.elsewhere(node, address, now)
                && !is_named
            {
                return Err(Refused::AddressTaken {
                    address: *address,
                    node: other.into(),
                    until: holder.until,
                });
            }
        }
        Ok(())
    }

    /// Writes down what was issued, and forgets what is over.
    pub fn record(&mut self, node: &str, holder: Holder) {
        let now = holder.since;
        for other in self.issued.values_mut() {
            // They are this node's now: who holds them still can't have them renewed.
            other.addresses.retain(|it| !holder.addresses.contains(it));
        }
        self.issued.insert(node.into(), holder);
        self.forget(now);
    }

    /// Forgets what is over.
    pub fn forget(&mut self, now: SystemTime) {
        self.tokens.retain(|_, it| now < it.expires + REMEMBERED);
        self.issued.retain(|_, it| now < it.until);
    }
}

#[cfg(test)]
mod tests;
