//! Tunnels to proxy-servers of Konnectivity.
//!
//! `extension` is what an agent sees; `client` has the parameters of a dial, read for each; `dialer`
//! dials, and `tunnel` serves; `session` keeps the connections of one stream; `stream` makes halves
//! of them, which the agent serves like those of native tunnels.

mod client;
mod dialer;
mod extension;
mod leases;
mod session;
mod stream;
mod tunnel;

pub use client::ClientError;
pub use extension::AgentExtension;

#[cfg(test)]
mod tests;
