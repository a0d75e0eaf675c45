//! Reasons why a session ends.

use thiserror::Error;

use super::message::{MAX_FEATURES, MAX_TEXT};
use super::outbox::MAX_QUEUED;
use crate::certificate::{MAX_ADDRESSES, MAX_CERTIFICATES, MAX_CSR, MAX_TOKEN};
use crate::close::CloseReason;
use crate::control::{FrameError, VERSION, Version};
use crate::route::ClaimError;

/// The end of a session, except for [`Unsendable`](Self::Unsendable), which leaves it as it was.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SessionError {
    /// Bytes of the peer are not a message.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer's message breaks a rule of its fields.
    #[error("the peer's {message} is invalid: {error}")]
    Invalid {
        /// The message's name.
        message: &'static str,
        /// The rule.
        error: MessageError,
    },
    /// The peer sent a message that is not its to send, or not yet, or not again.
    #[error("the peer sent {0} out of turn")]
    OutOfTurn(&'static str),
    /// The peer speaks another major version.
    #[error(
        "the peer speaks version {}.{} of the protocol and this side {}.{}: bring both to the same release",
        .0.major, .0.minor, VERSION.major, VERSION.minor
    )]
    UnsupportedVersion(Version),
    /// The peer did not send its first message in time.
    #[error("the peer did not introduce itself in time")]
    HandshakeTimeout,
    /// The peer causes messages and does not read them.
    #[error("over {MAX_QUEUED} bytes of control messages wait for a peer that does not read them")]
    Backlog,
    /// A message of this side is too long, so it was not sent.
    #[error("not sent: {0}; claim fewer, larger networks")]
    Unsendable(FrameError),
    /// The driver refused the agent.
    #[error("refused: {text}")]
    Refused {
        /// Reason with which to close the connection.
        reason: CloseReason,
        /// Text for people.
        text: String,
    },
}

impl SessionError {
    /// Returns the reason with which to close the connection.
    #[must_use]
    pub fn reason(&self) -> CloseReason {
        match self {
            Self::Frame(_) | Self::Invalid { .. } | Self::OutOfTurn(_) | Self::Backlog => {
                CloseReason::ProtocolError
            }
            Self::UnsupportedVersion(_) => CloseReason::UnsupportedVersion,
            Self::HandshakeTimeout => CloseReason::HandshakeTimeout,
            Self::Unsendable(_) => CloseReason::Internal,
            Self::Refused { reason, .. } => *reason,
        }
    }
}

/// A rule that a message's fields break.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MessageError {
    /// A text is too long.
    #[error("{field} has {length} bytes, over the limit of {MAX_TEXT}")]
    TextTooLong {
        /// The field.
        field: &'static str,
        /// Length in bytes.
        length: usize,
    },
    /// A text would garble a log.
    #[error("{field} holds control characters")]
    ControlCharacters {
        /// The field.
        field: &'static str,
    },
    /// An instance id is 16 bytes.
    #[error("an instance id has 16 bytes, not {0}")]
    InstanceId(usize),
    /// There are too many features.
    #[error("{0} features are over the limit of {MAX_FEATURES}")]
    TooManyFeatures(usize),
    /// A server counts itself.
    #[error("the number of servers is at least 1")]
    NoServers,
    /// The offer can't be read.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// A request for a certificate is too long.
    #[error("a request for a certificate has {0} bytes, over the limit of {MAX_CSR}")]
    RequestTooLong(usize),
    /// There are too many certificates.
    #[error("{0} certificates are over the limit of {MAX_CERTIFICATES}")]
    TooManyCertificates(usize),
    /// A token is too long.
    #[error("a token of {0} bytes is over the limit of {MAX_TOKEN}")]
    TokenTooLong(usize),
    /// A node has too many addresses.
    #[error("{0} addresses are over the limit of {MAX_ADDRESSES}")]
    TooManyAddresses(usize),
    /// Not an address.
    #[error("{0:?} is no IP address")]
    Address(String),
}
