//! The number of proxy-servers, by their leases.

use std::sync::Arc;

use tokio::sync::watch;

use crate::metrics::LeaseReads;
use cpc_config::konnectivity::LeaseConfig;
use cpc_kubernetes::lease::LeaseCounter;
use cpc_kubernetes::{AccessError, client};

/// There is no access to the API server, which has the leases.
#[derive(Debug, thiserror::Error)]
#[error("konnectivity.leases: {0}")]
pub(super) struct LeaseError(AccessError);

/// Counts the leases.
///
/// # Errors
/// [`LeaseError`].
pub(super) async fn count(
    config: &LeaseConfig,
    calls: LeaseReads,
) -> Result<watch::Receiver<Option<u32>>, LeaseError> {
    let client = client(&config.access()).await.map_err(LeaseError)?;
    let selector = config.label.clone();
    let (counter, count) = LeaseCounter::new(client, &config.namespace, selector, Arc::new(calls));
    tokio::spawn(counter.run());
    Ok(count)
}
