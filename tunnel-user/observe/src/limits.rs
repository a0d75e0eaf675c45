//! Metrics of limits: the maximum, the use and the refusals of each.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    limit: &'static str,
}

/// Metrics of limits, each by the name of its key below `limits`.
#[derive(Clone, Debug, Default)]
pub struct LimitMetrics {
    allowed: Family<Labels, Gauge>,
    used: Family<Labels, Gauge>,
    refused: Family<Labels, Counter>,
}

impl LimitMetrics {
    /// Registers `limits`: names, and their maximum if there is one.
    pub fn register(
        registry: &mut Registry,
        limits: impl IntoIterator<Item = (&'static str, Option<u64>)>,
    ) -> Self {
        let metrics = Self::default();
        for (limit, allowed) in limits {
            let labels = Labels { limit };
            // A counter that begins at its first event hides that event from a rate.
            drop(metrics.refused.get_or_create(&labels));
            if let Some(allowed) = allowed {
                metrics.allowed.get_or_create(&labels).set(gauge(allowed));
            }
        }
        registry.register("limit", "Value of a limit", metrics.allowed.clone());
        registry.register(
            "limit_used",
            "Use of a limit; for a limit per tenant, that of the tenant with the highest use",
            metrics.used.clone(),
        );
        registry.register(
            "limit_refused",
            "Work that a limit has refused",
            metrics.refused.clone(),
        );
        metrics
    }

    /// Counts a refusal by `limit`.
    pub fn refuse(&self, limit: &'static str) {
        self.refused.get_or_create(&Labels { limit }).inc();
    }

    /// Returns the counter of the refusals by `limit`.
    pub fn refusals(&self, limit: &'static str) -> Counter {
        self.refused.get_or_create(&Labels { limit }).clone()
    }

    /// Sets the current use of `limit`.
    pub fn set_used(&self, limit: &'static str, used: u64) {
        self.used.get_or_create(&Labels { limit }).set(gauge(used));
    }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
