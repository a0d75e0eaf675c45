//! The start of an agent, a type for each stage, so that no stage can be left out or taken early.
//!
//! ```text
//! Prepared  files are read, sockets are bound, capabilities are gone
//!    | threads start, systemd gets READY
//! Serving   reloads, drains, ends
//! ```
//!
//! Threads start from [`Prepared`] alone: so no thread that serves peers has a capability.

mod prepared;
mod reload;
mod serving;

pub(crate) use prepared::Prepared;
pub(crate) use serving::Serving;
