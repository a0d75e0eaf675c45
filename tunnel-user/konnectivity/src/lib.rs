//! Konnectivity: what exists only for its servers and agents.
//!
//! [`agent`] lets an agent dial proxy-servers. [`server`] lets a server serve proxy-agents, and clients of
//! their protocol.

pub mod agent;
pub mod server;

use cpc_observe::konnectivity as metrics;
