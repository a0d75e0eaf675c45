//! Requests to the Kubernetes API about leases: of servers ([`LeaseCalls`]) and of agents
//! ([`LeaseReads`]).

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::{Exact, agent, server};
use cpc_kubernetes::lease::{LeaseObserver, Outcome};

/// Labels whose values the API server gives.
type Labels<const N: usize> = [(&'static str, String); N];

/// Requests of one kind, under the label that each program has for status codes.
#[derive(Clone, Debug)]
struct Calls {
    code: &'static str,
    total: Family<Labels<2>, Counter>,
    seconds: Family<Labels<1>, Histogram, fn() -> Histogram>,
}

impl Calls {
    fn new(code: &'static str, seconds: fn() -> Histogram) -> Self {
        Self {
            code,
            total: Family::default(),
            seconds: Family::new_with_constructor(seconds),
        }
    }

    fn count(&self, outcome: Outcome<'_>) {
        if let Some((code, reason)) = outcome {
            let labels = [(self.code, code.to_string()), ("reason", reason.to_owned())];
            self.total.get_or_create(&labels).inc();
        }
    }

    fn observe(&self, outcome: Outcome<'_>, elapsed: Duration) {
        self.count(outcome);
        if let Some((code, _)) = outcome {
            let labels = [(self.code, code.to_string())];
            let histogram = self.seconds.get_or_create(&labels);
            histogram.observe(elapsed.as_secs_f64());
        }
    }
}

/// Requests of a server.
#[derive(Clone, Debug)]
pub(crate) struct LeaseCalls {
    lists: Calls,
    deletes: Calls,
    cleared: Exact,
}

impl Default for LeaseCalls {
    fn default() -> Self {
        let calls = || Calls::new("http_status_code", server::call_latency);
        Self {
            lists: calls(),
            deletes: calls(),
            cleared: Exact::default(),
        }
    }
}

impl LeaseCalls {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "lease_list",
            "Lists of leases asked for, by status code and reason",
            self.lists.total.clone(),
        );
        registry.register(
            "lease_list_latency_seconds",
            "Time until a list of leases was answered",
            self.lists.seconds.clone(),
        );
        registry.register(
            "lease_delete",
            "Deletions of leases that had run out, by status code and reason",
            self.deletes.total.clone(),
        );
        registry.register(
            "lease_delete_latency_seconds",
            "Time until the deletion of a lease that had run out was answered",
            self.deletes.seconds.clone(),
        );
        registry.register(
            "culled_leases_count",
            "Leases that had run out and were deleted",
            self.cleared.clone(),
        );
    }
}

impl LeaseObserver for LeaseCalls {
    fn listed(&self, outcome: Outcome<'_>, elapsed: Duration) {
        self.lists.observe(outcome, elapsed);
    }

    fn deleted(&self, outcome: Outcome<'_>, elapsed: Duration) {
        self.deletes.observe(outcome, elapsed);
    }

    fn cleared(&self) {
        self.cleared.0.inc();
    }
}

/// Requests of an agent.
#[derive(Clone, Debug)]
pub(crate) struct LeaseReads {
    lists: Calls,
    watches: Calls,
}

impl Default for LeaseReads {
    fn default() -> Self {
        let calls = || Calls::new("http_response_code", agent::latency);
        Self {
            lists: calls(),
            watches: calls(),
        }
    }
}

impl LeaseReads {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "lease_lists",
            "Lists of leases asked for, by status code and reason",
            self.lists.total.clone(),
        );
        registry.register(
            "lease_list_latency_seconds",
            "Time until a list of leases was answered",
            self.lists.seconds.clone(),
        );
        registry.register(
            "lease_watches",
            "Watches of leases asked for, by status code and reason",
            self.watches.total.clone(),
        );
    }
}

impl LeaseObserver for LeaseReads {
    fn listed(&self, outcome: Outcome<'_>, elapsed: Duration) {
        self.lists.observe(outcome, elapsed);
    }

    fn watched(&self, outcome: Outcome<'_>) {
        self.watches.count(outcome);
    }
}
