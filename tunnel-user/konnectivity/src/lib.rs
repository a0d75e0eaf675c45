//! Konnectivity: what exists only for its servers and agents.
//!
//! [`agent`] lets an agent dial proxy-servers. [`server`] lets a server serve proxy-agents, and clients of
//! their protocol. Both use `grpc`, and count under the names of Konnectivity's programs (`metrics`).

pub mod agent;
mod grpc;
mod health;
mod metrics;
pub mod server;
