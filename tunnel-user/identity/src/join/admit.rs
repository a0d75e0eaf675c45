//! Decisions about requests for certificates, without I/O.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;

use super::clock::{SKEW, Time};
use super::issue_records::{IssueRecords, Use};
use super::token::Token;
use crate::KeyHash;
use crate::identity::{self, IdentityError};
use crate::pattern::matches;

/// Minimum interval between renewals of a node's certificate.
const RENEWED_AFTER: Duration = Duration::from_secs(60);

/// Number of valid certificates from which on renewals are rarer: see [`MAX_RARE`].
const RARE_FROM: usize = 8;

/// Maximum number of renewals in the life of a certificate beyond [`RARE_FROM`].
const MAX_RARE: u32 = 30;

/// Reason of a refusal, for the requester. It reveals no more than the holder of the token may
/// know.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The token is unknown, wrong, expired or revoked. The requester does not learn which of them.
    #[error("the token is unknown, has expired or was revoked: `cpc token create` makes another")]
    Token,
    /// Others used up the token.
    #[error("the token is used up: `cpc token create` makes another")]
    UsedUp,
    /// Another key used the token of Kubernetes.
    #[error(
        "the token is used up by another key of this node: wait for its next one, or make another pod"
    )]
    PodUsedUp,
    /// A repeated request has other addresses.
    #[error(
        "with this token the key got a certificate for {addresses:?}: ask for the same, or use another token"
    )]
    Otherwise {
        /// Addresses in the first certificate.
        addresses: Vec<IpAddr>,
    },
    /// A repeated request is for a certificate that has ended.
    #[error("the certificate of this token can't be issued again: use another token")]
    Ended,
    /// The name is invalid.
    #[error(transparent)]
    Name(#[from] IdentityError),
    /// The token is not for this name.
    #[error("the token is for nodes called {nodes}, not for {node}")]
    Node {
        /// Names that the token is for.
        nodes: String,
        /// Requested name.
        node: String,
    },
    /// The token is not for this address.
    #[error(
        "the token is not for a node with the address {0}: `cpc token create --ip` says which, `cpc agent join --ip` asks for one"
    )]
    Address(IpAddr),
    /// No pod may join with this address.
    #[error(
        "nodes with the address {0} may not join here: join.kubernetes.addresses of the server says which"
    )]
    PodAddress(IpAddr),
    /// The address is not one of the node.
    #[error(
        "Kubernetes does not say that {node} has the address {address}: the Node's status must list it"
    )]
    NotOfNode {
        /// The address.
        address: IpAddr,
        /// The node.
        node: String,
    },
    /// Another key holds the name.
    #[error(
        "{node} has a certificate of another key until {until}; on the server `cpc token release {node}` \
         frees the name, or a token made with `--node {node}` replaces it",
        until = humantime::format_rfc3339_seconds(*.until)
    )]
    Taken {
        /// The name.
        node: String,
        /// End of the certificate.
        until: SystemTime,
    },
    /// Another node holds the address.
    #[error(
        "{address} is in the certificate of {node} until {until}; on the server `cpc token release --ip \
         {address}` frees it",
        until = humantime::format_rfc3339_seconds(*.until)
    )]
    AddressTaken {
        /// The address.
        address: IpAddr,
        /// Node that holds the address.
        node: String,
        /// End of the certificate.
        until: SystemTime,
    },
    /// The name was given to another key.
    #[error("another key has joined as {0} since: this one has to join again")]
    Replaced(String),
    /// The peer renews too often.
    #[error("the last certificate is younger than {}", humantime::format_duration(*.0))]
    TooSoon(Duration),
}

/// Request for a certificate, as decisions see it.
#[derive(Clone, Debug)]
pub struct AdmitRequest<'a> {
    /// Name of the node.
    pub node: &'a str,
    /// Addresses of the node.
    pub addresses: &'a [IpAddr],
    /// The key.
    pub key: KeyHash,
}

/// Decision about an admitted request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// A certificate, for one use of the token.
    First,
    /// The certificate (DER) of an earlier request.
    Existing(Vec<u8>),
    /// A replacement of a certificate that a fast clock dated ahead.
    Redated,
}

/// Permissions of a token's holder.
struct Terms<'a> {
    nodes: &'a str,
    addresses: &'a [IpNet],
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Token,
    Pod,
}

impl IssueRecords {
    /// Decides about a request with `token`. Counts nothing: [`Self::used`] does.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn by_token(
        &self,
        token: &Token,
        request: &AdmitRequest<'_>,
        time: Time,
    ) -> Result<Admitted, Refusal> {
        let ticket = self.ticket(token, time.now).ok_or(Refusal::Token)?;
        let terms = Terms {
            nodes: &ticket.nodes,
            addresses: &ticket.addresses,
            kind: Kind::Token,
        };
        if let Some(before) = ticket.used.iter().find(|it| it.is_of(request)) {
            return self.repeat(before, &terms, request, time);
        }
        self.check(&terms, request, time)?;
        match ticket.uses {
            0 => Err(Refusal::UsedUp),
            _ => Ok(Admitted::First),
        }
    }

    /// Counts a use of `token`.
    pub fn used(&mut self, token: &Token, got: Use) {
        if let Some(ticket) = self.tokens.get_mut(token.id()) {
            ticket.uses = ticket.uses.saturating_sub(1);
            ticket.used.push(got);
        }
    }

    /// Replaces the use by the same key for the same node by `got`.
    pub fn redated(&mut self, token: &Token, got: Use) {
        let ticket = self.tokens.get_mut(token.id());
        let uses = ticket.into_iter().flat_map(|ticket| &mut ticket.used);
        for before in uses.filter(|it| (&it.node, &it.key) == (&got.node, &got.key)) {
            before.clone_from(&got);
        }
    }

    /// Decides about a request of a pod on the node `request.node`, whose token `id` is good for one
    /// certificate.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn by_pod(
        &self,
        id: &str,
        addresses: &[IpNet],
        request: &AdmitRequest<'_>,
        time: Time,
    ) -> Result<Admitted, Refusal> {
        let terms = Terms {
            nodes: request.node,
            addresses,
            kind: Kind::Pod,
        };
        match self.pods.get(id).map(|ticket| &ticket.used) {
            Some(before) if before.is_of(request) => {
                return self.repeat(before, &terms, request, time);
            }
            Some(_) => return Err(Refusal::PodUsedUp),
            None => {}
        }
        self.check(&terms, request, time)?;
        Ok(Admitted::First)
    }

    /// Decides whether the holder of the certificate `serial` gets another one for `node`. Each is
    /// valid for `validity`.
    ///
    /// # Errors
    /// [`Refusal::TooSoon`], [`Refusal::Replaced`].
    pub fn renewal(
        &self,
        node: &str,
        serial: &str,
        validity: Duration,
        time: Time,
    ) -> Result<(), Refusal> {
        let known = self.issued.get(node);
        let holders = || known.into_iter().flatten();
        if self.released.get(serial).is_some_and(|it| it.whole)
            && holders().any(|it| it.serial != serial && self.holds_name(it, time))
        {
            return Err(Refusal::Replaced(node.into()));
        }
        // A certificate of the future was issued by a clock that was ahead. It is no reason to wait.
        let ages = holders().filter_map(|it| time.now.duration_since(it.since).ok());
        let valid = holders().filter(|it| time.now < it.until).count();
        let wait = match valid {
            RARE_FROM.. => (validity / MAX_RARE).max(RENEWED_AFTER),
            _ => RENEWED_AFTER,
        };
        match ages.min() {
            Some(age) if age < wait => Err(Refusal::TooSoon(wait)),
            _ => Ok(()),
        }
    }

    /// Decides about a repeated request: it gets the earlier certificate and nothing else.
    fn repeat(
        &self,
        before: &Use,
        terms: &Terms<'_>,
        request: &AdmitRequest<'_>,
        time: Time,
    ) -> Result<Admitted, Refusal> {
        let sorted = |addresses: &[IpAddr]| {
            let mut sorted = addresses.to_vec();
            sorted.sort();
            sorted.dedup();
            sorted
        };
        if before.certificate.is_empty() {
            return Err(Refusal::Ended);
        }
        if sorted(&before.addresses) != sorted(request.addresses) {
            let addresses = before.addresses.clone();
            return Err(Refusal::Otherwise { addresses });
        }
        let (_, holder) = self.by_serial(&before.serial).ok_or(Refusal::Ended)?;
        if time.now >= holder.until {
            return Err(Refusal::Ended);
        }
        if time.now + SKEW < holder.since {
            // A new certificate. What was taken from the first, by revocation too, does not come back by it.
            if self.released.contains_key(&before.serial) {
                return Err(Refusal::Ended);
            }
            self.check(terms, request, time)?;
            return Ok(Admitted::Redated);
        }
        let certificate = STANDARD.decode(&before.certificate);
        certificate.map_or(Err(Refusal::Ended), |der| Ok(Admitted::Existing(der)))
    }

    fn check(
        &self,
        terms: &Terms<'_>,
        request: &AdmitRequest<'_>,
        time: Time,
    ) -> Result<(), Refusal> {
        let node = request.node;
        identity::check_name(node)?;
        if !matches(terms.nodes, node) {
            return Err(Refusal::Node {
                nodes: terms.nodes.into(),
                node: node.into(),
            });
        }
        let beyond = |addr: &&IpAddr| !terms.addresses.iter().any(|net| net.contains(*addr));
        if let Some(address) = request.addresses.iter().find(beyond) {
            return Err(match terms.kind {
                Kind::Token => Refusal::Address(*address),
                Kind::Pod => Refusal::PodAddress(*address),
            });
        }
        if terms.nodes != node
            && let Some(holder) = self.name_holder(node, &request.key.to_string(), time)
        {
            return Err(Refusal::Taken {
                node: node.into(),
                until: holder.until,
            });
        }
        for address in request.addresses {
            let is_named =
                terms.kind == Kind::Token && terms.addresses.contains(&IpNet::from(*address));
            if !is_named && let Some((other, holder)) = self.address_holder(node, address, time) {
                return Err(Refusal::AddressTaken {
                    address: *address,
                    node: other.into(),
                    until: holder.until,
                });
            }
        }
        Ok(())
    }
}

impl Use {
    fn is_of(&self, request: &AdmitRequest<'_>) -> bool {
        self.node == request.node && self.key == request.key.to_string()
    }
}

#[cfg(test)]
mod tests;
