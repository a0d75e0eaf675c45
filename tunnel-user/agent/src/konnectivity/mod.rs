//! Tunnels to proxy-servers of Konnectivity.
//!
//! [`client`] has the parameters of a dial, read for each; [`tunnel`] dials and serves; [`session`]
//! keeps the connections of one stream; [`stream`] makes halves of them, which the dialler serves like
//! those of QUIC.

mod client;
mod session;
mod stream;
mod tunnel;

pub(super) use client::{Client, ClientError};
pub(super) use tunnel::{DialError, Dialled, Tunnel, dial};

#[cfg(test)]
mod tests;
