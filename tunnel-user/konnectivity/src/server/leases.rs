//! The leases by which agents count servers.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::metrics::LeaseCalls;
use cpc_config::ServerConfig;
use cpc_host::lifecycle::{self, Phase};
use cpc_kubernetes::client;
use cpc_kubernetes::lease::LeaseHolder;
use cpc_server::ServerError;

/// Holds one lease for each server id where that is configured, until the process drains, so that
/// agents do not look for this server then. The task ends some seconds after that.
///
/// # Errors
/// [`ServerError`] when there is no access to the API server.
pub(super) async fn hold(
    config: &ServerConfig,
    server_id: &str,
    calls: LeaseCalls,
    phase: watch::Receiver<Phase>,
) -> Result<Option<JoinHandle<()>>, ServerError> {
    let Some(leases) = &config.leases else {
        return Ok(None);
    };
    let ids = match &config.konnectivity {
        Some(konnectivity) => konnectivity.ids(server_id).collect(),
        None => vec![server_id.to_owned()],
    };
    let client = client(&leases.access()).await?;
    let holder = LeaseHolder::new(
        client,
        &leases.namespace,
        leases.labels()?,
        ids,
        Arc::new(calls),
    );
    Ok(Some(tokio::spawn(holder.run(lifecycle::stopping(phase)))))
}
