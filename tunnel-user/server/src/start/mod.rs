//! The start of a server, a type for each stage, so that no stage can be left out or taken early.
//!
//! ```text
//! Prepared  files are read and sockets are bound; nothing is promised
//!    | programs are put in place, then capabilities go
//! Attached
//!    | threads start, systemd gets READY
//! Serving   reloads, drains, ends
//! ```
//!
//! [`Attached`] exists only without the capabilities that attaching needs, and threads start from it alone:
//! so no thread that serves peers has more.

mod attached;
mod prepared;
mod serving;
mod tunnel;

pub(crate) use attached::Attached;
pub(crate) use prepared::Prepared;
pub(crate) use serving::Serving;
pub(crate) use tunnel::Tunnel;
