//! The start of a server, a type for each stage, so that no stage can be left out or taken early.
//!
//! ```text
//! Prepared  files are read and sockets are bound; nothing is promised
//!    | attach: programs are in place, then capabilities are gone
//! Attached
//!    | serve: threads run, systemd hears READY
//! Serving   until the end of the process: reloads, drains, ends
//! ```
//!
//! [`Attached`] exists only without the capabilities that attaching needs, and threads start from it alone:
//! so no thread that serves peers has more.

mod attached;
mod prepared;
mod serving;
mod tunnel;

use attached::Attached;
pub(crate) use prepared::Prepared;
use serving::Serving;
pub(crate) use tunnel::{Tunnel, own_identity};
