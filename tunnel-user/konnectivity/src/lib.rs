//! Konnectivity: what exists only for its servers and agents.
//!
//! [`agent`] lets an agent dial proxy-servers.

pub mod agent;
