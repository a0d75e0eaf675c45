//! The metrics of proxy-agent.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::{Exact, Label, LeaseReads, StreamMetrics, set};

const PREFIX: &str = "konnectivity_network_proxy_agent";

/// Buckets of latencies, 5 ms to 30 s.
const LATENCY: [f64; 7] = [0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 30.0];

/// Creates a histogram of latencies.
pub(super) fn latency() -> Histogram {
    Histogram::new(LATENCY)
}

/// Reason of a failed dial, as seen by an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DialTrouble {
    /// The target did not answer in time.
    Timeout,
    /// Any other reason.
    Unknown,
}

impl DialTrouble {
    fn labels(self) -> [Label; 1] {
        let reason = match self {
            Self::Timeout => "timeout",
            Self::Unknown => "unknown",
        };
        [("reason", reason)]
    }
}

/// Direction in which a stream to a server failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Sending failed.
    ToServer,
    /// Receiving failed.
    FromServer,
}

impl Direction {
    fn labels(self) -> [Label; 1] {
        let direction = match self {
            Self::ToServer => "to_server",
            Self::FromServer => "from_server",
        };
        [("direction", direction)]
    }
}

/// All metrics of proxy-agent.
#[derive(Clone, Debug)]
pub(crate) struct ProxyAgentMetrics {
    /// Packets, from and to servers.
    pub streams: StreamMetrics,
    /// Requests about leases.
    pub leases: LeaseReads,
    dials: Histogram,
    dial_failures: Family<[Label; 1], Counter>,
    server_failures: Family<[Label; 1], Exact>,
    servers: Gauge,
    known_servers: Gauge,
    endpoints: Gauge,
}

impl Default for ProxyAgentMetrics {
    fn default() -> Self {
        Self {
            streams: StreamMetrics::default(),
            leases: LeaseReads::default(),
            dials: latency(),
            dial_failures: Family::default(),
            server_failures: Family::default(),
            servers: Gauge::default(),
            known_servers: Gauge::default(),
            endpoints: Gauge::default(),
        }
    }
}

impl ProxyAgentMetrics {
    /// Registers the metrics; `registry` must have no prefix.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix(PREFIX);
        self.streams.register(registry);
        self.leases.register(registry);
        registry.register(
            "dial_duration_seconds",
            "Time until the target answered, of dials that succeeded",
            self.dials.clone(),
        );
        registry.register(
            "endpoint_dial_failure",
            "Number of failures dialing the remote endpoint, by reason (example: timeout)",
            self.dial_failures.clone(),
        );
        registry.register(
            "server_connection_failure_count",
            "Streams to servers that failed, by direction; stream_errors_total has them by cause",
            self.server_failures.clone(),
        );
        registry.register(
            "open_server_connections",
            "Servers that hold a live tunnel",
            self.servers.clone(),
        );
        registry.register(
            "known_server_count",
            "Servers that there should be",
            self.known_servers.clone(),
        );
        registry.register(
            "open_endpoint_connections",
            "Current number of open endpoint connections",
            self.endpoints.clone(),
        );
    }

    /// Observes a dial that succeeded.
    pub(crate) fn dialled(&self, elapsed: Duration) {
        self.dials.observe(elapsed.as_secs_f64());
    }

    /// Counts a dial that failed.
    pub(crate) fn dial_failed(&self, why: DialTrouble) {
        self.dial_failures.get_or_create(&why.labels()).inc();
    }

    /// Counts a stream to a server that failed.
    pub(crate) fn server_failed(&self, direction: Direction) {
        let failures = self.server_failures.get_or_create(&direction.labels());
        failures.0.inc();
    }

    /// Counts the start of a connection to a target.
    pub(crate) fn endpoint_opened(&self) {
        self.endpoints.inc();
    }

    /// Counts the end of a connection to a target.
    pub(crate) fn endpoint_closed(&self) {
        self.endpoints.dec();
    }

    /// Sets the number of connected servers, and the number of servers that there should be.
    pub(crate) fn set_servers(&self, reached: usize, known: usize) {
        set(&self.servers, reached);
        set(&self.known_servers, known);
    }
}
