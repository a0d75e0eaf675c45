//! Metrics of the certificates that a process uses.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::lifetime::Lifetimes;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    purpose: &'static str,
    kind: &'static str,
}

/// Ends of certificates, and the number of changes of CAs.
#[derive(Clone)]
pub struct CertificateMetrics {
    lifetimes: Lifetimes,
    ends: Family<Labels, Gauge>,
    ca_changes: Counter,
}

impl CertificateMetrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry, lifetimes: Lifetimes) -> Self {
        let metrics = Self {
            lifetimes,
            ends: Family::default(),
            ca_changes: Counter::default(),
        };
        registry.register(
            "certificate_not_after_timestamp_seconds",
            "Last moment at which a certificate in use is valid, of those alike the first to expire",
            metrics.ends.clone(),
        );
        registry.register(
            "ca_changes",
            "CAs of tunnels that were added or removed since the start",
            metrics.ca_changes.clone(),
        );
        metrics
    }

    /// Updates the metrics.
    pub fn refresh(&self) {
        let mut first: HashMap<Labels, SystemTime> = HashMap::new();
        for life in self.lifetimes.all() {
            let labels = Labels {
                purpose: life.purpose.label(),
                kind: life.kind.label(),
            };
            let end = first.entry(labels).or_insert(life.not_after);
            *end = life.not_after.min(*end);
        }
        for (labels, end) in first {
            let seconds = end.duration_since(SystemTime::UNIX_EPOCH);
            let seconds = seconds.unwrap_or_default().as_secs();
            let gauge = self.ends.get_or_create(&labels);
            gauge.set(i64::try_from(seconds).unwrap_or(i64::MAX));
        }
        let changes = self.lifetimes.ca_changes();
        self.ca_changes.inner().store(changes, Ordering::Relaxed);
    }
}
