//! Requests for certificates and their answers, over a tunnel ([`crate::session`]) or before the
//! first one ([`crate::join`]).
//!
//! This module does not read the content of requests and certificates; it bounds their sizes.

use std::fmt;
use std::net::IpAddr;

use crate::control::{CertificateAnswer, CertificateRequest, JoinRequest};
use crate::session::MessageError;
use crate::text;

/// The longest request for a certificate, in bytes of DER.
pub const MAX_CSR: usize = 4096;

/// The most certificates in a chain, and the most roots.
pub const MAX_CERTIFICATES: usize = 16;

/// The longest token, in bytes: those of Kubernetes have a kilobyte.
pub const MAX_TOKEN: usize = 16 * 1024;

/// The most addresses of a node that joins.
pub const MAX_ADDRESSES: usize = 64;

/// Certificate, with the CAs that its owner trusts; X.509, DER.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The certificate first. Never empty.
    pub chain: Vec<Vec<u8>>,
    /// Roots.
    pub roots: Vec<Vec<u8>>,
}

/// The answer to a request: a certificate, or why there is none.
pub type Answer = Result<Issued, String>;

/// Request of a worker without a certificate to become an agent.
#[derive(Clone, PartialEq, Eq)]
pub struct Join {
    /// Proof that they may.
    pub token: String,
    /// The node's name, at most [`MAX_TEXT`](crate::session::MAX_TEXT) bytes and without control characters.
    pub node: String,
    /// Addresses of the node.
    pub addresses: Vec<IpAddr>,
    /// PKCS #10, DER.
    pub csr: Vec<u8>,
}

/// Writes the request without the token, which is a secret.
impl fmt::Debug for Join {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Join")
            .field("node", &self.node)
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

impl From<&Answer> for CertificateAnswer {
    fn from(answer: &Answer) -> Self {
        match answer {
            Ok(issued) => Self {
                chain: issued.chain.clone(),
                roots: issued.roots.clone(),
                refused: String::new(),
            },
            Err(why) => Self {
                refused: text::sanitized(why),
                ..Self::default()
            },
        }
    }
}

/// Reads an answer.
pub(crate) fn from_answer(wire: CertificateAnswer) -> Result<Answer, MessageError> {
    for list in [&wire.chain, &wire.roots] {
        if list.len() > MAX_CERTIFICATES {
            return Err(MessageError::TooManyCertificates(list.len()));
        }
    }
    if wire.chain.is_empty() {
        return Ok(Err(text::sanitized(&wire.refused)));
    }
    Ok(Ok(Issued {
        chain: wire.chain,
        roots: wire.roots,
    }))
}

/// Reads a request.
pub(crate) fn from_request(wire: CertificateRequest) -> Result<Vec<u8>, MessageError> {
    csr(wire.csr)
}

impl From<&Join> for JoinRequest {
    fn from(join: &Join) -> Self {
        Self {
            token: join.token.clone(),
            node: join.node.clone(),
            addresses: join.addresses.iter().map(ToString::to_string).collect(),
            csr: join.csr.clone(),
        }
    }
}

impl TryFrom<JoinRequest> for Join {
    type Error = MessageError;

    fn try_from(wire: JoinRequest) -> Result<Self, MessageError> {
        if wire.token.len() > MAX_TOKEN {
            return Err(MessageError::TokenTooLong(wire.token.len()));
        }
        if wire.addresses.len() > MAX_ADDRESSES {
            return Err(MessageError::TooManyAddresses(wire.addresses.len()));
        }
        let address = |text: &String| match text.parse::<IpAddr>() {
            Ok(address) => Ok(address.to_canonical()),
            Err(_) => Err(MessageError::Address(text::sanitized(text))),
        };
        Ok(Self {
            token: wire.token,
            node: text::name("the node", wire.node)?,
            addresses: { wire.addresses.iter() }
                .map(address)
                .collect::<Result<_, _>>()?,
            csr: csr(wire.csr)?,
        })
    }
}

fn csr(bytes: Vec<u8>) -> Result<Vec<u8>, MessageError> {
    match bytes.len() {
        0..=MAX_CSR => Ok(bytes),
        length => Err(MessageError::RequestTooLong(length)),
    }
}
