//! Resolving server addresses.

use std::io;
use std::net::SocketAddr;

use crate::config::address::split;

/// Every address behind `host:port`, as the resolver has it now.
///
/// # Errors
/// What the resolver says.
pub(super) async fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    let (host, port) = split(address)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not host:port"))?;
    Ok(tokio::net::lookup_host((host, port)).await?.collect())
}
