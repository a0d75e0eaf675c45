//! The head of each tunnelled stream.
//!
//! The server opens the stream and writes a [`StreamHead`]. Behind a [`DialRequest`] the client's bytes
//! follow at once. The agent answers with a [`DialResponse`], then the target's bytes follow. A
//! [`ResumeRequest`] is answered by a [`ResumeResponse`], behind which the bytes of either side go on.
//! One stream of a tunnel carries [notices](crate::resumption) in both directions, and no answer.
//!
//! ```text
//! head:      kind (varint; 1: dial, 2: notices, 3: resume)   length (varint, at most 512)   body
//! dial:      connection id (16 bytes)   attempt (1 byte)   deadline (varint, milliseconds)
//!            port (2 bytes)   host type (1 byte)   host   [session key]
//! resume:    session key   confirmation
//! host:      1: IPv4 address (4 bytes)   2: IPv6 address (16 bytes)   3: length (1 byte), DNS name
//! response:  code (varint; 0: connected)   length (varint, at most 256)   detail (UTF-8)
//! to resume: length (varint)   code (1 byte; 0: resumed, 1: unknown, 2: busy)   [confirmation]
//! ```
//!
//! [`resumption`](crate::resumption) has session keys and confirmations.
//!
//! Integers of fixed size are in network byte order. Bytes after the last known field of a
//! request's body are ignored: a later release may add fields there. The kind comes first and its
//! body carries its own length, so that an agent can name a kind that it does not know.
//!
//! Both decoders take the bytes read so far from the head of the stream, and a caller can repeat
//! the call with more. They check every limit before the bytes in question have arrived.

mod destination;
mod head;
mod request;
mod response;
mod resume;

use bytes::TryGetError;
use thiserror::Error;

pub use self::destination::{Destination, DestinationError, Host, Name, NameError};
pub use self::head::StreamHead;
pub use self::request::{ConnectionId, DialRequest, MAX_DEADLINE};
pub use self::response::{DialResponse, MAX_DETAIL};
pub use self::resume::{ResumeRequest, ResumeResponse};
use crate::close::CloseReason;

/// Failure to read a request or a response.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PrefaceError {
    /// The stream is of a kind that this release does not know.
    #[error("stream kind {0} is unknown here; is the other side a newer release?")]
    UnsupportedKind(u64),
    /// The request's body is longer than allowed.
    #[error("a request of {0} bytes is over the limit of {limit}", limit = request::MAX_BODY)]
    RequestTooLong(u64),
    /// The request's body ends before its last field does.
    #[error("the request ends within a field")]
    Truncated,
    /// The flags of a confirmation are unknown.
    #[error("flags {0:#x} of a confirmation are unknown here")]
    Flags(u8),
    /// The host is of a type that this release does not know.
    #[error("host type {0} is unknown here; is the other side a newer release?")]
    UnknownHostType(u8),
    /// The host's name can't be one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Port 0 can't be dialled.
    #[error("port 0 can't be dialled")]
    PortZero,
    /// The deadline is further away than allowed; in milliseconds.
    #[error("a dial deadline of {0} ms is over the limit of {limit} ms", limit = MAX_DEADLINE.as_millis())]
    DeadlineTooLong(u64),
    /// The response's detail is longer than allowed.
    #[error("a dial response with {0} bytes of detail is over the limit of {MAX_DETAIL}")]
    DetailTooLong(u64),
}

impl PrefaceError {
    /// Returns the reason with which to close the stream. A bad request was not dialled, so another
    /// agent may be tried; behind a bad response there may be a connection.
    #[must_use]
    pub fn reason(&self) -> CloseReason {
        match self {
            Self::UnsupportedKind(_) => CloseReason::UnsupportedKind,
            Self::DetailTooLong(_) | Self::Flags(_) => CloseReason::ProtocolError,
            _ => CloseReason::MalformedDial,
        }
    }
}

impl From<TryGetError> for PrefaceError {
    fn from(_: TryGetError) -> Self {
        Self::Truncated
    }
}

#[cfg(test)]
pub(crate) mod tests;
