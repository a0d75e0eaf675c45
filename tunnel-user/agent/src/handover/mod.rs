//! The handover of everything that this agent serves to the process that takes its place.
//!
//! ```text
//! Serving -> Pausing -> Left -> (the successor serves)
//!    ^                    |
//!    '--------------------' the successor has failed
//! ```
//!
//! While it pauses, servers ask for nothing, dials that are under way end, and every connection is held. Then the
//! agent leaves its tunnels, and its connections wait as they do when tunnels are lost. The successor, or this
//! process again, dials the servers, and they go on.

pub(crate) mod kept;
mod saved;
mod stage;
mod succession;

pub(crate) use stage::{Handover, Stage};
pub(crate) use succession::{ROLE, Served, take_over};
