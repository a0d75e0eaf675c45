//! QUIC over quinn-proto, driven by ourselves: one task an endpoint, everything on one thread.
//!
//! ```text
//!  UDP socket -> receive (pooled buffers) -> quinn-proto -> wakers of streams
//!                                               ^   |
//!  streams: write, read, finish, reset ---------'   '-> transmit (GSO) -> UDP socket
//! ```
//!
//! A pass of the `driver` takes in a whole batch of packets before it lets connections answer, and
//! sends for each in batches as large as one call takes. Streams act on the connection directly,
//! without a lock, and note that it has something to send; the pass that follows sends for all of
//! them at once.
//!
//! Loss, congestion and flow control are quinn-proto's. What is sent on the streams is not known
//! here.

pub mod config;
mod connection;
pub mod connection_id;
mod driver;
mod endpoint;
mod ledger;
mod metrics;
mod offload;
mod path;
mod reassembly;
pub mod secret;
mod send_scheduler;
pub mod steering;
mod stream;
mod timers;
mod tunnel;
pub mod udp;
mod validation;
mod waiting;

pub use connection::{Connection, PathView};
pub use endpoint::{Endpoint, Incoming};
pub use ledger::MemoryBounds;
pub use quinn_proto::{ConnectError, ConnectionError, VarInt};
pub use stream::{Ended, Recv, Send};

use tunnel_proto::close::CloseReason;

/// Returns the wire form of a reason: a QUIC application error code.
pub fn error_code(reason: CloseReason) -> VarInt {
    // The codes are a closed set below 2^16.
    VarInt::from_u64(reason.code()).unwrap_or(VarInt::MAX)
}

/// Returns the reason behind a code from the wire; a code of a later release counts as a reset.
pub fn reason_of(code: VarInt) -> CloseReason {
    CloseReason::from_code(code.into_inner()).unwrap_or(CloseReason::PeerReset)
}

/// Returns the reason why a tunnel ended, as far as the error tells.
pub fn link_reason(error: &ConnectionError) -> CloseReason {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            CloseReason::from_code(close.error_code.into_inner()).unwrap_or(CloseReason::LinkLost)
        }
        ConnectionError::TimedOut => CloseReason::IdleTimeout,
        ConnectionError::LocallyClosed => CloseReason::Shutdown,
        _ => CloseReason::LinkLost,
    }
}

#[cfg(test)]
mod tests;
