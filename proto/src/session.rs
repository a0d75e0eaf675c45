//! The control stream's two ends, without I/O: hello, routes, heartbeat, drain.
//!
//! ```text
//! agent                                  server
//!   Hello (who, what it offers)    ->      driver checks identity and grants
//!                                  <-    Welcome (who, what is accepted), or the end
//!   Routes (the full new offer)    ->
//!                                  <-    RoutesVerdict
//!   Ping, Pong, Drain             <->    Ping, Pong, Drain
//!   Statistics                     ->
//!   CertificateRequest             ->
//!                                  <-    CertificateAnswer
//! ```
//!
//! [`AgentSession`] and [`ServerSession`] decide; a driver moves the bytes and keeps the time. The
//! driver passes bytes to `handle_bytes`, calls `handle_timeout` at the time of `poll_timeout`, and
//! after each call or command takes everything from `poll_event` and `poll_transmit`. A
//! [`SessionError`] ends the session: the driver closes the connection with its reason and text and
//! drops the machine.
//!
//! Bounds: one incomplete message, at most [`MAX_QUEUED`] bytes that wait to be sent, and a number
//! of events per call that the length of the input bounds.
//!
//! The identity of the peer, the grant of a claim and the choice of an agent are decided elsewhere:
//! a machine only passes on the statements of its peer.

mod agent;
mod control_channel;
mod error;
mod liveness;
mod message;
mod outbox;
mod server;

pub use self::agent::{AgentEvent, AgentSession};
pub use self::error::{MessageError, SessionError};
pub use self::liveness::{BUSY_WINDOW, MIN_HEARTBEAT, Timers};
pub(crate) use self::message::message_name;
pub use self::message::{
    HOLDS_SESSIONS, Hello, InstanceId, MAX_FEATURES, MAX_TEXT, Refusal, SERVES_WHILE_DRAINING,
    Welcome,
};
pub use self::outbox::MAX_QUEUED;
pub use self::server::{ServerEvent, ServerSession};

#[cfg(test)]
mod tests;
