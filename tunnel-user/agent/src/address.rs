//! Resolving server addresses.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use cpc_config::address::split;

/// How often names are resolved anew.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(10);

/// A resolver that has not answered by then is asked again later.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a name leads to now, or why nobody knows.
pub(super) type Resolved = (Arc<str>, io::Result<Vec<SocketAddr>>);

/// Every address behind `host:port`, as the resolver has it now.
///
/// # Errors
/// What the resolver says.
async fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    let (host, port) = split(address)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not host:port"))?;
    Ok(tokio::net::lookup_host((host, port)).await?.collect())
}

/// Resolves one name again and again, apart from the others: one that hangs delays nobody.
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
