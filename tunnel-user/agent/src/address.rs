//! Resolution of server addresses.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use cpc_config::address::split;

/// Interval between resolutions of a name.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(10);

/// Timeout of a resolution, which is retried later.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A name with its present addresses, or the error of the resolver.
pub(super) type Resolved = (Arc<str>, io::Result<Vec<SocketAddr>>);

/// Returns every address behind `host:port`, as the resolver has it now.
///
/// # Errors
/// The error of the resolver.
async fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    let (host, port) = split(address)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not host:port"))?;
    Ok(tokio::net::lookup_host((host, port)).await?.collect())
}

/// Resolves one name periodically, apart from the others: a resolver that hangs delays no other name.
pub(super) async fn keep_resolving(server: Arc<str>, answers: mpsc::UnboundedSender<Resolved>) {
    loop {
        let resolved = timeout(RESOLVE_TIMEOUT, resolve(&server)).await;
        let resolved = resolved.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        if answers.send((server.clone(), resolved)).is_err() {
            return;
        }
        tokio::time::sleep(RESOLVE_INTERVAL).await;
    }
}
