//! Moving bytes between a local socket and a stream of a link, both ways in one task.
//!
//! Invariants (RFC 9293 behaviour, carried over):
//! * what was read before an end of file arrives before the end of file; half-close passes both ways;
//! * a reset passes as a reset, and so does the loss of a link or of this process: the local socket
//!   is set to reset on close until an orderly close has been earned;
//! * a reader that stops stalls itself alone, holding at most a stream window, and [`budget`]
//!   bounds how many may.
//!
//! Who may connect where is decided before; nothing here looks at the bytes.

pub mod budget;
mod buffer;
pub mod buffers;
pub mod engine;
pub mod kept;
mod meter;
pub mod peek;
pub mod reclaim;
pub mod relay;
pub mod shard;
pub mod socket;
pub mod stream;

pub use budget::Budget;
pub use engine::{Engine, Engines, Socket};
pub use relay::{ClosedBy, Meter, Progress, RelayEnd, linger, relay};
pub use socket::LocalSocket;
