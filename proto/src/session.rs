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
//! [`AgentSession`] and [`ServerSession`] decide; a driver moves the bytes and keeps the time. It
//! gives bytes to `handle_bytes`, calls `handle_timeout` when the instant of `poll_timeout` has
//! come, and after each call of either, or of a command, takes what there is from `poll_event` and
//! `poll_transmit`. A [`SessionError`] ends the session: the driver closes the connection with its
//! reason and text and drops the machine.
//!
//! Bounds: one incomplete message is kept, at most [`MAX_QUEUED`] bytes wait to be sent, and the
//! events that one call can cause are bounded by the bytes that it was given.
//!
//! Who the peer is, whether a claim is granted and which agent is chosen are decided elsewhere: a
//! machine believes what its peer says of itself no further than to hand it on.

mod agent;
mod error;
mod line;
mod liveness;
mod message;
mod outbox;
mod server;

pub use self::agent::{AgentEvent, AgentSession};
pub use self::error::{MessageError, SessionError};
pub use self::liveness::{BUSY_WINDOW, MIN_HEARTBEAT, Timers};
pub(crate) use self::message::message_name;
pub use self::message::{
    Hello, InstanceId, MAX_FEATURES, MAX_TEXT, Refusal, SERVES_WHILE_DRAINING, Welcome,
};
pub use self::outbox::MAX_QUEUED;
pub use self::server::{ServerEvent, ServerSession};

#[cfg(test)]
mod tests;
