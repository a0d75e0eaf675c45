//! An agent's count of the servers.
//!
//! Invariant: a count comes from a list and the changes since. While the API server is away the
//! count stays, so that its absence does not look like that of the servers.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::TryStreamExt;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use super::{LeaseObserver, held_for};
use crate::client::{CallError, call, outcome};
use crate::delays::{Delays, jittered};
use cpc_host::report::report;
use cpc_observe::error_dedup::ErrorDedup;

/// Time after which the API server ends a watch, in seconds.
const WATCH_SECONDS: u32 = 240;

/// Time after which the agent ends a watch that the API server did not end.
const WATCH_TIMEOUT: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 10);

/// Minimum delay of a list after a watch, half of the maximum: all agents see the end of a server at
/// once.
const RELIST_DELAY: Duration = Duration::from_secs(2);

/// Leases by name.
type LeasesByName = HashMap<String, Lease>;

/// Counter of the servers that hold a lease.
pub struct LeaseCounter {
    leases: Api<Lease>,
    selector: String,
    observer: Arc<dyn LeaseObserver>,
    count: watch::Sender<Option<u32>>,
}

impl LeaseCounter {
    /// Creates a counter of the leases in `namespace` that `selector` (a label selector) selects. The
    /// receiver holds the count: `None` until it is known, then 1 or more.
    pub fn new(
        client: Client,
        namespace: &str,
        selector: String,
        observer: Arc<dyn LeaseObserver>,
    ) -> (Self, watch::Receiver<Option<u32>>) {
        let (count, counted) = watch::channel(None);
        let counter = Self {
            leases: Api::namespaced(client, namespace),
            selector,
            observer,
            count,
        };
        (counter, counted)
    }

    /// Counts without end.
    pub async fn run(self) {
        let mut delays = Delays::default();
        let mut dedup = ErrorDedup::default();
        loop {
            let Err(error) = self.follow(&mut delays).await else {
                sleep(jittered(RELIST_DELAY)).await;
                continue;
            };
            if dedup.is_new(&error.to_string()) {
                tracing::warn!(
                    error = report(&error),
                    "servers can't be counted by their leases, retrying"
                );
            }
            sleep(delays.next()).await;
        }
    }

    /// Lists, then follows the changes for as long as they can be trusted.
    async fn follow(&self, delays: &mut Delays) -> Result<(), CallError> {
        let started = Instant::now();
        // From the API server's memory: a watch begins where it ends.
        let all = ListParams::default().labels(&self.selector).match_any();
        let listed = call(self.leases.list(&all)).await;
        self.observer.listed(outcome(&listed), started.elapsed());
        let listed = listed?;
        let version = listed.metadata.resource_version.unwrap_or_default();
        let mut by_name: LeasesByName = listed
            .items
            .into_iter()
            .map(|l| (l.name_any(), l))
            .collect();
        let mut first_end = self.publish(&by_name);

        let since = WatchParams::default()
            .labels(&self.selector)
            .timeout(WATCH_SECONDS);
        let started = Instant::now();
        let watched = call(self.leases.watch(&since, &version)).await;
        self.observer.watched(outcome(&watched));
        let mut events = pin!(watched?);
        *delays = Delays::default();
        loop {
            // When a lease runs out by what we were told, we may just not have been told.
            let until = first_end.unwrap_or(WATCH_TIMEOUT).min(WATCH_TIMEOUT);
            let until = (Instant::now() + until).min(started + WATCH_TIMEOUT);
            let Ok(event) = timeout_at(until, events.try_next()).await else {
                return Ok(());
            };
            match event? {
                Some(WatchEvent::Added(lease) | WatchEvent::Modified(lease)) => {
                    by_name.insert(lease.name_any(), lease);
                }
                Some(WatchEvent::Deleted(lease)) => drop(by_name.remove(&lease.name_any())),
                Some(WatchEvent::Bookmark(_)) => {}
                Some(WatchEvent::Error(status)) => return Err(CallError::Refused(status)),
                None => return Ok(()),
            }
            first_end = self.publish(&by_name);
        }
    }

    /// Publishes the number of held leases. Returns the time until the first of them runs out.
    fn publish(&self, by_name: &LeasesByName) -> Option<Duration> {
        let now = SystemTime::now();
        let held: Vec<_> = by_name.values().filter_map(|l| held_for(l, now)).collect();
        // We have been told of a server, so there is one.
        let count = u32::try_from(held.len()).unwrap_or(u32::MAX).max(1);
        self.count.send_if_modified(|last| {
            let changed = *last != Some(count);
            if changed {
                tracing::info!(servers = count, "servers counted by their leases");
                *last = Some(count);
            }
            changed
        });
        held.into_iter().min()
    }
}

#[cfg(test)]
mod tests;
