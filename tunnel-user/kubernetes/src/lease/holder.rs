//! Leases of a server: created, renewed, and deleted at the end. Each server also deletes expired
//! leases of others, because a crashed server does not.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::{join, join_all};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, PostParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use tokio::time::{Instant, sleep, timeout};

use super::{LeaseObserver, held_for};
use crate::client::{CallError, call, outcome};
use crate::delays::Delays;
use cpc_config::labels::Labels;
use cpc_host::report::report;
use cpc_observe::error_dedup::ErrorDedup;

/// Duration of a lease without renewal, in seconds.
const DURATION: i32 = 30;

/// Interval of renewals, and of the search for expired leases.
const INTERVAL: Duration = Duration::from_secs(15);

/// Maximum time for deleting the own leases at the end.
const DELETE_TIMEOUT: Duration = Duration::from_secs(3);

/// Holder of the leases of one server.
pub struct LeaseHolder {
    leases: Api<Lease>,
    labels: Labels,
    server_ids: Vec<String>,
    observer: Arc<dyn LeaseObserver>,
    interval: Duration,
}

impl LeaseHolder {
    /// Creates a holder of one lease for each of `server_ids` in `namespace`. `labels` identify the
    /// leases of all servers.
    pub fn new(
        client: Client,
        namespace: &str,
        labels: Labels,
        server_ids: Vec<String>,
        observer: Arc<dyn LeaseObserver>,
    ) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            labels,
            server_ids,
            observer,
            interval: INTERVAL,
        }
    }

    /// Holds the leases until `stop`, then deletes them, which takes some seconds at most.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let hold = join_all(self.server_ids.iter().map(|id| self.hold(id)));
        tokio::select! {
            _ = join(hold, self.delete_expired()) => {}
            () = stop => {}
        }
        let released = join_all(self.server_ids.iter().map(|id| self.release(id)));
        if timeout(DELETE_TIMEOUT, released).await.is_err() {
            tracing::warn!(
                "leases not deleted in time; agents count this server for {DURATION} s more"
            );
        }
    }

    /// Holds one lease without end.
    async fn hold(&self, server_id: &str) {
        let mut delays = Delays::default();
        let mut failures = 0;
        let mut last = None;
        loop {
            match self.renew(server_id, last.take()).await {
                Ok(lease) => {
                    if failures > 0 {
                        tracing::info!(server_id, failures, "lease renewed again");
                    }
                    (failures, delays) = (0, Delays::default());
                    last = Some(lease);
                    sleep(self.interval).await;
                }
                Err(error) => {
                    if failures == 0 {
                        tracing::warn!(
                            server_id,
                            error = report(&error),
                            "lease not renewed, retrying"
                        );
                    }
                    failures += 1;
                    sleep(delays.next()).await;
                }
            }
        }
    }

    /// Renews a lease whose state was `last`; without that reads it, or creates it.
    async fn renew(&self, server_id: &str, last: Option<Lease>) -> Result<Lease, CallError> {
        let name = name(server_id);
        let existing = match last {
            Some(lease) => Some(lease),
            None => call(self.leases.get_opt(&name)).await?,
        };
        let params = PostParams::default();
        match existing {
            Some(lease) => {
                let lease = self.renewed(lease, server_id);
                call(self.leases.replace(&name, &params, &lease)).await
            }
            None => {
                let mut lease = Lease::default();
                lease.metadata.name = Some(name);
                call(self.leases.create(&params, &self.renewed(lease, server_id))).await
            }
        }
    }

    /// Returns `lease` with a renewed hold.
    fn renewed(&self, mut lease: Lease, server_id: &str) -> Lease {
        lease.metadata.labels = Some(self.labels.to_map());
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(server_id.to_owned());
        spec.lease_duration_seconds = Some(DURATION);
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        lease
    }

    async fn release(&self, server_id: &str) {
        let (name, params) = (name(server_id), DeleteParams::default());
        match call(self.leases.delete(&name, &params)).await {
            Err(error) if !error.is_not_found() => {
                tracing::warn!(server_id, error = report(&error), "lease not deleted");
            }
            _ => {}
        }
    }

    /// Deletes expired leases periodically.
    async fn delete_expired(&self) {
        let mut dedup = ErrorDedup::default();
        loop {
            match self.delete_expired_once().await {
                Ok(()) => dedup.clear(),
                Err(error) if dedup.is_new(&error.to_string()) => {
                    tracing::warn!(error = report(&error), "expired leases not deleted");
                }
                Err(_) => {}
            }
            sleep(self.interval).await;
        }
    }

    async fn delete_expired_once(&self) -> Result<(), CallError> {
        let started = Instant::now();
        let all = ListParams::default().labels(&self.labels.to_string());
        let listed = call(self.leases.list(&all)).await;
        self.observer.listed(outcome(&listed), started.elapsed());
        let now = SystemTime::now();
        for lease in listed? {
            if held_for(&lease, now).is_none() {
                self.delete(&lease).await?;
            }
        }
        Ok(())
    }

    /// Deletes `lease`, unless it has been renewed since it was read.
    async fn delete(&self, lease: &Lease) -> Result<(), CallError> {
        let as_read = DeleteParams::default().preconditions(Preconditions {
            resource_version: lease.resource_version(),
            uid: lease.uid(),
        });
        let started = Instant::now();
        let deleted = call(self.leases.delete(&lease.name_any(), &as_read)).await;
        self.observer.deleted(outcome(&deleted), started.elapsed());
        match deleted {
            Ok(_) => {
                tracing::info!(lease = lease.name_any(), "expired lease deleted");
                self.observer.cleared();
            }
            // Another server was faster, or its holder is back.
            Err(error) if error.is_not_found() || error.is_conflict() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

fn name(server_id: &str) -> String {
    format!("konnectivity-proxy-server-{server_id}")
}

#[cfg(test)]
mod tests;
