//! Metrics of sessions: connections that outlive their tunnel.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tunnel_proto::close::CloseReason;

/// Upper bounds of the buckets of stalls, in seconds.
const STALL_SECONDS: [f64; 9] = [0.05, 0.2, 0.5, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabels {
    cause: &'static str,
}

impl CauseLabels {
    fn of(cause: CloseReason) -> Self {
        Self {
            cause: cause.label(),
        }
    }
}

/// Metrics of sessions, the same on server and agent.
#[derive(Clone, Debug)]
pub struct SessionMetrics {
    /// Connections that both ends hold.
    pub held: Gauge,
    /// Connections that wait for another tunnel.
    pub waiting: Gauge,
    /// Connections that outlive a crash of this process.
    pub kept: Gauge,
    resumed: Family<CauseLabels, Counter>,
    lost: Family<CauseLabels, Counter>,
    stall: Histogram,
}

impl SessionMetrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            held: Gauge::default(),
            waiting: Gauge::default(),
            kept: Gauge::default(),
            resumed: Family::default(),
            lost: Family::default(),
            stall: Histogram::new(STALL_SECONDS),
        };
        // From the start: an alert on a rate needs the first event too.
        for cause in [CloseReason::LinkLost, CloseReason::IdentityRefused] {
            drop(metrics.lost.get_or_create(&CauseLabels::of(cause)));
        }
        for cause in [
            CloseReason::LinkLost,
            CloseReason::IdleTimeout,
            CloseReason::Replaced,
        ] {
            drop(metrics.resumed.get_or_create(&CauseLabels::of(cause)));
        }
        registry.register(
            "sessions_held",
            "Connections that outlive the loss of their tunnel",
            metrics.held.clone(),
        );
        registry.register(
            "sessions_waiting",
            "Connections whose tunnel was lost and that wait for another one",
            metrics.waiting.clone(),
        );
        registry.register(
            "sessions_kept",
            "Connections whose sockets a keeper holds: they outlive a crash of this process",
            metrics.kept.clone(),
        );
        registry.register(
            "sessions_resumed",
            "Connections that went on over another tunnel, by the reason why the last one was lost",
            metrics.resumed.clone(),
        );
        registry.register(
            "sessions_lost",
            "Connections that waited for another tunnel in vain, by the reason of their end",
            metrics.lost.clone(),
        );
        registry.register(
            "session_stall_seconds",
            "Time from the loss of a tunnel until a connection went on over another one",
            metrics.stall.clone(),
        );
        metrics
    }

    /// Counts a session that went on after `stall`; its tunnel was lost for `cause`.
    pub fn resumed(&self, cause: CloseReason, stall: Duration) {
        self.resumed.get_or_create(&CauseLabels::of(cause)).inc();
        self.stall.observe(stall.as_secs_f64());
    }

    /// Counts a session that waited in vain, and ended with `reason`.
    pub fn lost(&self, reason: CloseReason) {
        self.lost.get_or_create(&CauseLabels::of(reason)).inc();
    }
}
