//! Sessions: connections that outlive the tunnel that carries them.
//!
//! A session has two ends, at the server and at the agent. Each end takes bytes from its local socket
//! and sends them on a stream of the present tunnel. It keeps every byte until the other end *confirms*
//! that its own kernel has accepted it. An acknowledgement of QUIC does not say that: it only says that
//! the byte has arrived. So when a tunnel is lost, both ends know the same thing, and a stream on the
//! next tunnel continues where the confirmations end.
//!
//! ```text
//!  socket -> take -> [unconfirmed] -> stream ==tunnel==> receive -> write -> socket
//!                         ^                                           |
//!                         '----------------- confirm -----------------'
//! ```
//!
//! The data on a stream carries no frames: a position in the stream, and the offset at which the stream
//! began, are the offset of a byte. [`Confirmation`](tunnel_proto::resumption::Confirmation)s travel beside the data, those of all sessions
//! together.
//!
//! A session starts plain and costs nothing. When it has lived for a while or carried much, the server's end offers to
//! hold it ([`Hold`]).
//!
//! | module | content |
//! | --- | --- |
//! | [`outbound`], [`inbound`] | one direction at its sender and at its receiver |
//! | [`session`] | both directions, their ends, the loss of a tunnel and the resumption |
//! | [`violation`] | breaches of the protocol by the other end |
//! | [`window`] | the number of bytes that a sender may have on their way |
//! | [`unconfirmed`] | the kept bytes of a socket that can't keep them itself |
//! | [`state`] | all of these for one session |
//! | [`saved`] | sessions between two processes |
//! | [`carried`] | a session on a tunnel |
//! | [`halves`] | the stream of a session, for the relay |
//! | [`notices`] | the sessions of a tunnel, and what they tell each other |
//! | [`resume`] | the exchange on another tunnel |
//!
//! The last four do I/O.

pub mod carried;
pub mod halves;
pub mod inbound;
pub mod notices;
pub mod outbound;
pub mod resume;
pub mod saved;
pub mod session;
pub mod state;
pub mod unconfirmed;
pub mod violation;
pub mod window;

pub use carried::Carried;
pub use halves::{SessionRecv, SessionSend};
pub use notices::Notices;
pub use saved::InvalidState;
pub use session::{Effect, Hold, Resumed, Session, survives};
pub use state::{Bounds, Detached, Registration, SessionState};
pub use unconfirmed::Unconfirmed;
pub use violation::Violation;
