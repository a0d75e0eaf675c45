//! The dial request of a server to an agent.

use std::fmt;
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};

use super::{Destination, Host, PrefaceError};
use crate::resumption::SessionKey;
use crate::varint::VarInt;

/// The longest body of a request, in bytes.
pub(super) const MAX_BODY: u64 = 512;

/// The longest deadline of a dial.
pub const MAX_DEADLINE: Duration = Duration::from_secs(600);

/// Content of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamKind {
    /// The bytes of one TCP connection.
    Tcp,
    /// Notices about all sessions of the tunnel.
    Notices,
    /// The bytes of a session that another tunnel carried before.
    Resume,
}

impl StreamKind {
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Tcp => 1,
            Self::Notices => 2,
            Self::Resume => 3,
        }
    }

    pub(super) fn from_code(code: u64) -> Result<Self, PrefaceError> {
        match code {
            1 => Ok(Self::Tcp),
            2 => Ok(Self::Notices),
            3 => Ok(Self::Resume),
            unknown => Err(PrefaceError::UnsupportedKind(unknown)),
        }
    }
}

/// Names one connection in the logs of both sides. Chosen at random by the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub [u8; 16]);

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// The head of a stream that the server opened: connect me to this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DialRequest {
    /// The connection's name in logs.
    pub id: ConnectionId,
    /// Requested destination.
    pub destination: Destination,
    /// Remaining time for the dial. Sent in whole milliseconds, [`MAX_DEADLINE`] at most.
    pub deadline: Duration,
    /// Number of agents asked before this one.
    pub attempt: u8,
    /// The session that the connection is, if it may outlive its tunnel.
    pub session: Option<SessionKey>,
}

impl DialRequest {
    /// Appends the request.
    pub fn encode(&self, out: &mut BytesMut) {
        let mut body = BytesMut::new();
        body.put_slice(&self.id.0);
        body.put_u8(self.attempt);
        // MAX_DEADLINE in milliseconds fits in 32 bits.
        VarInt::from(self.deadline.min(MAX_DEADLINE).as_millis() as u32).encode(&mut body);
        body.put_u16(self.destination.port);
        self.destination.host.encode(&mut body);
        if let Some(session) = self.session {
            session.encode(&mut body);
        }

        VarInt::from(StreamKind::Tcp.code()).encode(out);
        // The longest body, with a name of 253 bytes, has 302.
        VarInt::from(body.len() as u16).encode(out);
        out.put_slice(&body);
    }

    /// Reads the body of a request.
    pub(super) fn decode_body(mut body: &[u8]) -> Result<Self, PrefaceError> {
        let id = ConnectionId(body.try_get_u128()?.to_be_bytes());
        let attempt = body.try_get_u8()?;
        let (deadline, size) = VarInt::decode(body).ok_or(PrefaceError::Truncated)?;
        body.advance(size);
        let deadline = Duration::from_millis(deadline.into_inner());
        if deadline > MAX_DEADLINE {
            return Err(PrefaceError::DeadlineTooLong(deadline.as_millis() as u64));
        }
        let port = body.try_get_u16()?;
        if port == 0 {
            return Err(PrefaceError::PortZero);
        }
        let host = Host::decode(&mut body)?;
        Ok(Self {
            id,
            destination: Destination { host, port },
            deadline,
            attempt,
            session: SessionKey::take(&mut body),
        })
    }
}
