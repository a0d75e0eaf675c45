//! The server's metrics, beside those that each connection counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use crate::config::ServerConfig;
use crate::telemetry::konnectivity::ProxyServerMetrics;
use crate::telemetry::metrics::{DialMetrics, ours};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    why: &'static str,
}

/// Why handshakes fail, as metric labels.
const HANDSHAKE_FAILURES: [&str; 5] = ["tls", "identity", "peer", "timeout", "overload"];

/// Counters of one server.
#[derive(Clone, Debug)]
pub(super) struct ServerMetrics {
    /// What each connection counts.
    pub dials: DialMetrics,
    /// Claims that were not granted.
    pub claims_refused: Counter,
    /// Redirected connections whose origin was not known, and which were reset.
    pub origins_missing: Counter,
    /// What proxy-server counts.
    pub konnectivity: ProxyServerMetrics,
    handshakes: Family<FailureLabels, Counter>,
}

impl ServerMetrics {
    /// Registers them; those of Konnectivity where there is anything of it.
    pub(super) fn register(registry: &mut Registry, config: &ServerConfig) -> Self {
        let konnectivity = ProxyServerMetrics::default();
        if config.is_konnectivity() {
            konnectivity.register(registry);
        }
        let registry = ours(registry);
        let metrics = Self {
            dials: DialMetrics::register(registry),
            claims_refused: Counter::default(),
            origins_missing: Counter::default(),
            konnectivity,
            handshakes: Family::default(),
        };
        registry.register(
            "claims_refused",
            "Claims of agents that were not granted",
            metrics.claims_refused.clone(),
        );
        registry.register(
            "redirect_origins_missing",
            "Redirected connections whose origin was not known, and which were reset",
            metrics.origins_missing.clone(),
        );
        for why in HANDSHAKE_FAILURES {
            // A counter that begins at its first event hides that event from a rate.
            drop(metrics.handshakes.get_or_create(&FailureLabels { why }));
        }
        registry.register(
            "handshakes_failed",
            "Tunnel handshakes that failed",
            metrics.handshakes.clone(),
        );
        metrics
    }

    /// Counts a failed handshake. `why` is one of [`HANDSHAKE_FAILURES`].
    pub(super) fn handshake_failed(&self, why: &'static str) {
        self.handshakes.get_or_create(&FailureLabels { why }).inc();
    }
}
