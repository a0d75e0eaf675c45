//! The handover of everything that this server serves to the process that takes its place.
//!
//! ```text
//! Serving -> Pausing -> Collecting -> (the successor serves)
//!    ^                      |
//!    '----------------------' the successor has failed
//! ```
//!
//! While it pauses, the server accepts nothing, finishes the dials that are under way, and holds every
//! connection. Then it leaves its tunnels and collects the connections, each in the state in which it would wait
//! for another tunnel. The successor, or this process again, goes on from there.

mod collected;
pub(crate) mod kept;
mod stage;
mod stop;
pub(crate) mod succession;

pub(crate) use collected::{Collected, CollectedClient};
pub(crate) use stage::Handover;
pub(crate) use stop::go_on;
