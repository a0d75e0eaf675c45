//! gRPC streams of Konnectivity's packets, over HTTP/2: as [`server`] and as [`client`], on any
//! byte stream.
//!
//! Invariants:
//! * HTTP/2 credit is the back-pressure, both ways: what is not taken from a [`PacketReceiver`] is
//!   credit that its peer does not have, and a [`PacketSender`] takes nothing that the peer has
//!   given no credit for;
//! * whatever a peer does, a stream holds its window and one message, and a connection the sum of
//!   its streams;
//! * a stream whose halves are dropped before its end is reset, never ended in order.
//!
//! Everything of one connection lives on one thread, and one task alone may wait for a half: h2
//! wakes the last that asked. What the packets mean is not known here.

mod authority;
pub(crate) mod client;
mod outbox;
mod receiver;
mod sender;
pub(crate) mod server;
mod status;
pub(crate) mod tcp;
#[cfg(test)]
mod tests;

pub(crate) use authority::AnyAuthority;
pub(crate) use outbox::Outbox;
pub(crate) use receiver::PacketReceiver;
pub(crate) use sender::PacketSender;
pub(crate) use status::{Code, Status};

use std::sync::Arc;
use std::time::Duration;

use h2::{Ping, PingPong, Reason};
use tokio::time::{sleep, timeout};
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::DecodeError;

/// ALPN of HTTP/2.
pub(crate) const ALPN: &[u8] = b"h2";

/// Content type of gRPC messages in the default encoding.
const CONTENT_TYPE: &str = "application/grpc";

/// Timeout for the peer's preface and settings.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Timeout of a ping, after which the peer counts as gone: that of grpc-go.
const PONG: Duration = Duration::from_secs(20);

/// Maximum number of bytes of one stream between us and the socket.
const SEND_BUFFER: usize = 128 << 10;

/// Maximum size of headers, in bytes: an agent's identifiers are the longest part.
const MAX_HEADERS: u32 = 64 << 10;

/// Maximum number of streams that the peer has reset before they were examined; more end the
/// connection.
const MAX_RESET: usize = 64;

/// The bounds of one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Maximum number of concurrent streams of the peer.
    pub streams: u32,
    /// Maximum number of bytes that the peer may send on a stream before they are taken.
    pub stream_window: u32,
    /// Maximum cost in bytes of the frames of waiting bytes, beyond those bytes, in h2's calculation of
    /// 256 bytes per frame; above it, the connection ends.
    pub frame_overhead: usize,
    /// Interval of pings to an idle peer; TCP has a keepalive too ([`tcp`]).
    pub keepalive: Option<Duration>,
}

impl Settings {
    /// Settings towards frontends: each stream is one connection, and many of them may stand still.
    pub(crate) const FRONTEND: Self = Self {
        streams: 4096,
        stream_window: 256 << 10,
        frame_overhead: 256 << 20,
        keepalive: None,
    };

    /// Settings between agent and server: all connections share one stream. A frame of Konnectivity's
    /// with payload has 16 bytes at least, so a full window costs no more than the overhead allows.
    pub(crate) const AGENT: Self = Self {
        streams: 4,
        stream_window: 1 << 20,
        frame_overhead: 64 << 20,
        keepalive: None,
    };

    /// Returns a window for all streams together: they never wait for each other's credit.
    fn connection_window(&self) -> u32 {
        self.streams.saturating_mul(self.stream_window)
    }
}

/// Reason why a stream gives or takes no more packets.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum StreamEnd {
    /// The stream was reset.
    #[error("the stream was reset: {0}")]
    Reset(Reason),
    /// The connection is gone.
    #[error("the connection was lost: {0}")]
    Lost(Arc<h2::Error>),
    /// The server ended the call with an error.
    #[error("the server ended the call: {0}")]
    Status(Status),
    /// The received data is not a packet.
    #[error(transparent)]
    Packet(#[from] DecodeError),
    /// The stream ended within a packet.
    #[error("the stream ended within a packet")]
    Truncated,
    /// The peer causes more answers than it reads.
    #[error("the peer does not read its answers")]
    Unread,
    /// The budget refuses an incomplete message.
    #[error("there is no memory for the rest of a message")]
    NoMemory,
    /// This side ended the stream.
    #[error("the stream was closed")]
    Closed,
}

impl StreamEnd {
    /// Returns the reason with which connections on the stream end.
    pub(crate) fn reason(&self) -> CloseReason {
        match self {
            Self::Reset(_) | Self::Status(_) => CloseReason::PeerReset,
            Self::Lost(_) => CloseReason::LinkLost,
            Self::Packet(_) | Self::Truncated | Self::Unread => CloseReason::ProtocolError,
            Self::NoMemory => CloseReason::MemoryLimit,
            Self::Closed => CloseReason::Aborted,
        }
    }
}

impl StreamEnd {
    /// Returns the status for the peer.
    pub(crate) fn status(&self) -> Status {
        Status::new(self.code(), self.to_string())
    }

    /// Returns the code of that status.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Status(status) => status.code,
            Self::Reset(Reason::CANCEL) | Self::Closed => Code::CANCELLED,
            Self::Reset(Reason::REFUSED_STREAM) | Self::Lost(_) => Code::UNAVAILABLE,
            Self::Packet(DecodeError::TooLong(_)) | Self::Unread | Self::NoMemory => {
                Code::RESOURCE_EXHAUSTED
            }
            Self::Reset(_) | Self::Packet(_) | Self::Truncated => Code::INTERNAL,
        }
    }
}

impl From<h2::Error> for StreamEnd {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Lost(Arc::new(error)),
        }
    }
}

/// Pings the peer until an answer is missing.
async fn until_silent(pings: Option<PingPong>, every: Option<Duration>) {
    let (Some(mut pings), Some(every)) = (pings, every) else {
        return std::future::pending().await;
    };
    loop {
        sleep(every).await;
        let pong = timeout(PONG, pings.ping(Ping::opaque())).await;
        if !matches!(pong, Ok(Ok(_))) {
            break;
        }
    }
}
