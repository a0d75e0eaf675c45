//! Metrics in the Prometheus text format, under `cpc_`.
//!
//! Units are base units. Labels come from closed sets and never hold an address or an agent's name.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tunnel_proto::close::CloseReason;

/// Kind of frontend that accepted a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FrontendKind {
    /// The eBPF redirect.
    Redirect,
    /// HTTP CONNECT.
    HttpConnect,
    /// Konnectivity's gRPC `ProxyService`.
    Grpc,
    /// A tunnel (on an agent).
    Tunnel,
}

impl FrontendKind {
    /// Returns the metric label and log field.
    pub fn label(self) -> &'static str {
        match self {
            Self::Redirect => "redirect",
            Self::HttpConnect => "http_connect",
            Self::Grpc => "grpc",
            Self::Tunnel => "tunnel",
        }
    }

    /// Returns the kind with this label, if there is one.
    pub fn from_label(label: &str) -> Option<Self> {
        let all = [Self::Redirect, Self::HttpConnect, Self::Grpc, Self::Tunnel];
        all.into_iter().find(|kind| kind.label() == label)
    }
}

/// Party that ended a connection, named from the side that writes the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Closer {
    /// The program that connected.
    Client,
    /// The program at the destination.
    Target,
    /// The tunnel in between.
    Tunnel,
    /// The agent, before it reached the target.
    Agent,
    /// The server, before it sent a dial request.
    Server,
}

impl Closer {
    /// Returns the metric label and log field.
    pub fn label(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Target => "target",
            Self::Tunnel => "tunnel",
            Self::Agent => "agent",
            Self::Server => "server",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClosedLabels {
    frontend: &'static str,
    by: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FrontendLabels {
    frontend: &'static str,
}

/// Counters of connections, the same on server and agent.
#[derive(Clone, Debug)]
pub struct DialMetrics {
    closed: Family<ClosedLabels, Counter>,
    dialled: Family<FrontendLabels, Histogram>,
    /// Open connections.
    pub open: Gauge,
    /// Bytes from clients to targets.
    pub up: Counter,
    /// Bytes from targets to clients.
    pub down: Counter,
}

impl DialMetrics {
    /// Registers the counters.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            closed: Family::default(),
            dialled: Family::new_with_constructor(|| Histogram::new(DIAL_SECONDS)),
            open: Gauge::default(),
            up: Counter::default(),
            down: Counter::default(),
        };
        registry.register(
            "connections_closed",
            "Ended connections, by closing side and reason",
            metrics.closed.clone(),
        );
        registry.register(
            "dial_duration_seconds",
            "Time from accepting a client to the target's answer, of dials that succeeded",
            metrics.dialled.clone(),
        );
        registry.register("connections", "Open connections", metrics.open.clone());
        registry.register(
            "up_bytes",
            "Bytes from clients to targets",
            metrics.up.clone(),
        );
        registry.register(
            "down_bytes",
            "Bytes from targets to clients",
            metrics.down.clone(),
        );
        metrics
    }

    /// Counts a dial that succeeded after `elapsed`.
    pub fn connected(&self, frontend: FrontendKind, elapsed: Duration) {
        let labels = FrontendLabels {
            frontend: frontend.label(),
        };
        self.dialled
            .get_or_create(&labels)
            .observe(elapsed.as_secs_f64());
    }

    pub(super) fn ended(&self, frontend: FrontendKind, by: Closer, reason: CloseReason) {
        let (frontend, by, reason) = (frontend.label(), by.label(), reason.label());
        self.closed
            .get_or_create(&ClosedLabels {
                frontend,
                by,
                reason,
            })
            .inc();
    }
}

/// Buckets of dials, 100 us to 10 s: from a loopback to the dial's deadline.
const DIAL_SECONDS: [f64; 11] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.025, 0.1, 0.5, 2.5, 10.0,
];

/// A unit of a gauge, counted until dropped.
#[derive(Debug)]
pub struct GaugeGuard(Gauge);

impl GaugeGuard {
    /// Counts one more.
    pub fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Returns the part of `registry` that has the prefix `cpc_`.
pub fn ours(registry: &mut Registry) -> &mut Registry {
    registry.sub_registry_with_prefix("cpc")
}
