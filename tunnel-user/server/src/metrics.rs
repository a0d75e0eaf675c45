//! Metrics of the server, beside those of each connection.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::handshakes::FailureCounters;
use super::limits;
use cpc_config::ServerConfig;
use cpc_observe::limits::LimitMetrics;
use cpc_observe::metrics::{DialMetrics, ours};
use cpc_observe::sessions::SessionMetrics;

/// Metrics of one server.
#[derive(Clone, Debug)]
pub(super) struct ServerMetrics {
    /// Metrics of dials.
    pub dials: DialMetrics,
    /// Metrics of sessions.
    pub sessions: SessionMetrics,
    /// Claims that were not granted.
    pub claims_refused: Counter,
    /// Redirected connections that were reset because their origin was unknown.
    pub origins_missing: Counter,
    /// Number of destinations whose breaker is open.
    pub breakers_open: Gauge,
    /// Number of times that a breaker opened.
    pub breakers_opened: Counter,
    /// Metrics of limits.
    pub limits: LimitMetrics,
    /// Unauthenticated peers that had to prove their address first.
    pub handshakes_retried: Counter,
    /// Newcomers that were sent to a shard with fewer tunnels.
    pub handshakes_moved: Counter,
    /// Failed handshakes of tunnels, of both kinds.
    pub handshakes: FailureCounters,
    /// Failed handshakes of frontends.
    pub frontend_handshakes: FailureCounters,
    /// Failed handshakes at the join listener.
    pub join_handshakes: FailureCounters,
}

impl ServerMetrics {
    /// Registers the metrics.
    pub(super) fn register(registry: &mut Registry, config: &ServerConfig) -> Self {
        let registry = ours(registry);
        let metrics = Self {
            dials: DialMetrics::register(registry),
            sessions: SessionMetrics::register(registry),
            claims_refused: Counter::default(),
            origins_missing: Counter::default(),
            breakers_open: Gauge::default(),
            breakers_opened: Counter::default(),
            limits: limits::register(registry, &config.limits),
            handshakes_retried: Counter::default(),
            handshakes_moved: Counter::default(),
            handshakes: FailureCounters::default(),
            frontend_handshakes: FailureCounters::default(),
            join_handshakes: FailureCounters::default(),
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
        registry.register(
            "breakers_open",
            "Destinations that are not dialled because their dials kept timing out",
            metrics.breakers_open.clone(),
        );
        registry.register(
            "breakers_opened",
            "Times that dials of a destination had timed out so often that it was not dialled any more",
            metrics.breakers_opened.clone(),
        );
        registry.register(
            "handshakes_retried",
            "First packets of tunnels that were answered with a Retry",
            metrics.handshakes_retried.clone(),
        );
        registry.register(
            "handshakes_moved",
            "First packets of tunnels that were sent to a shard with fewer tunnels",
            metrics.handshakes_moved.clone(),
        );
        metrics.handshakes.register(
            registry,
            "handshakes_failed",
            "Tunnel handshakes that failed",
        );
        metrics.frontend_handshakes.register(
            registry,
            "frontend_handshakes_failed",
            "TLS handshakes of frontends' clients that failed",
        );
        if config.join.is_some() {
            metrics.join_handshakes.register(
                registry,
                "join_handshakes_failed",
                "Strangers at the join listener that were sent away or asked for nothing",
            );
        }
        metrics
    }
}
