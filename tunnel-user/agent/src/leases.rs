//! The number of proxy-servers, by their leases.

use tokio::sync::watch;

use super::AgentError;
use cpc_config::AgentConfig;
use cpc_kubernetes::client;
use cpc_kubernetes::lease::LeaseCounter;
use cpc_observe::konnectivity::LeaseReads;

/// Counts the leases where that is configured; otherwise the count stays `None`.
///
/// # Errors
/// [`AgentError`] when there is no access to the API server.
pub(super) async fn count(
    config: &AgentConfig,
    calls: LeaseReads,
) -> Result<watch::Receiver<Option<u32>>, AgentError> {
    let konnectivity = config.konnectivity.as_ref();
    let Some(leases) = konnectivity.and_then(|k| k.leases.as_ref()) else {
        return Ok(watch::channel(None).1);
    };
    let client = client(&leases.access()).await?;
    let selector = leases.label.clone();
    let (counter, count) = LeaseCounter::new(client, &leases.namespace, selector, calls);
    tokio::spawn(counter.run());
    Ok(count)
}
