//! The metrics of proxy-server.

use std::time::Duration;

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::{ClientTraffic, Exact, Label, LeaseCalls, StreamMetrics, set};
use cpc_observe::metrics::GaugeGuard;

const PREFIX: &str = "konnectivity_network_proxy_server";

/// Buckets of latencies, 1 us to 12.5 s.
const LATENCY: [f64; 9] = [1e-6, 1e-5, 1e-4, 0.005, 0.025, 0.1, 0.5, 2.5, 12.5];

/// Buckets of lifetimes, 1 s to a day.
const LIFETIME: [f64; 12] = [
    1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 14400.0, 43200.0, 86400.0,
];

/// Buckets of requests to the Kubernetes API, 5 ms to 10 s.
const CALL: [f64; 11] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Creates a histogram of the latency of requests to the Kubernetes API.
pub(super) fn call_latency() -> Histogram {
    Histogram::new(CALL)
}

/// A gRPC method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    /// Method of clients.
    Proxy,
    /// Method of agents.
    Connect,
}

impl Service {
    const ALL: [Self; 2] = [Self::Proxy, Self::Connect];

    fn labels(self) -> [Label; 1] {
        let name = match self {
            Self::Proxy => "Proxy",
            Self::Connect => "Connect",
        };
        [("service_method", name)]
    }
}

/// Reason of a failed dial, as seen by a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DialFailure {
    /// No agent was available.
    NoAgent,
    /// The agent answered with an error.
    ErrorResponse,
    /// The tunnel was lost, or its agent gave up the dial.
    BackendClose,
    /// No answer arrived in time.
    BackendDialTimeout,
    /// The client gave up the dial.
    FrontendClose,
}

impl DialFailure {
    fn labels(self) -> [Label; 1] {
        let reason = match self {
            Self::NoAgent => "no_agent",
            Self::ErrorResponse => "error_response",
            Self::BackendClose => "backend_close",
            Self::BackendDialTimeout => "backend_dial_timeout",
            Self::FrontendClose => "frontend_close",
        };
        [("reason", reason)]
    }
}

/// All metrics of proxy-server.
#[derive(Clone, Debug)]
pub(crate) struct ProxyServerMetrics {
    /// Packets, of clients and of agents.
    pub streams: StreamMetrics,
    /// Requests about leases.
    pub leases: LeaseCalls,
    dials: Histogram,
    writes: Histogram,
    lifetimes: Histogram,
    rpcs: Family<[Label; 1], Gauge>,
    http: Gauge,
    backends: Gauge,
    by_strategy: Family<[Label; 1], Gauge>,
    pending: Gauge,
    established: Gauge,
    full: Family<[Label; 1], Gauge>,
    failures: Family<[Label; 1], Exact>,
}

impl Default for ProxyServerMetrics {
    fn default() -> Self {
        let metrics = Self {
            streams: StreamMetrics::default(),
            leases: LeaseCalls::default(),
            dials: Histogram::new(LATENCY),
            writes: Histogram::new(LATENCY),
            lifetimes: Histogram::new(LIFETIME),
            rpcs: Family::default(),
            http: Gauge::default(),
            backends: Gauge::default(),
            by_strategy: Family::default(),
            pending: Gauge::default(),
            established: Gauge::default(),
            full: Family::default(),
            failures: Family::default(),
        };
        // What begins at its first event hides that event from a rate.
        for service in Service::ALL {
            drop(metrics.rpcs.get_or_create(&service.labels()));
            drop(metrics.full.get_or_create(&service.labels()));
        }
        metrics
    }
}

impl ProxyServerMetrics {
    /// Registers the metrics; `registry` must have no prefix.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix(PREFIX);
        self.streams.register(registry);
        self.leases.register(registry);
        registry.register(
            "dial_duration_seconds",
            "Time from accepting a client to the target's answer, of dials that succeeded",
            self.dials.clone(),
        );
        registry.register(
            "frontend_write_duration_seconds",
            "Time that packets waited until a client took them",
            self.writes.clone(),
        );
        registry.register(
            "connection_duration_seconds",
            "Time from the target's answer to the end of a connection",
            self.lifetimes.clone(),
        );
        registry.register(
            "grpc_connections",
            "Open gRPC streams, by method",
            self.rpcs.clone(),
        );
        registry.register(
            "http_connections",
            "Open connections of HTTP CONNECT",
            self.http.clone(),
        );
        registry.register(
            "ready_backend_connections",
            "Agents that can be asked to dial; ready_backends has them by strategy",
            self.backends.clone(),
        );
        registry.register(
            "ready_backends",
            "Agents that can be asked to dial, by the strategy that would choose them",
            self.by_strategy.clone(),
        );
        registry.register(
            "pending_backend_dials",
            "Dials that agents have not answered yet",
            self.pending.clone(),
        );
        registry.register(
            "established_connections",
            "Current number of established end-to-end connections (post-dial)",
            self.established.clone(),
        );
        registry.register(
            "full_receive_channels",
            "Connections that hold up their gRPC stream because their reader takes nothing",
            self.full.clone(),
        );
        registry.register(
            "dial_failure_count",
            "Number of dial failures observed. Multiple failures can occur for a single dial request",
            self.failures.clone(),
        );
    }

    /// Observes a dial that succeeded.
    pub(crate) fn dialled(&self, elapsed: Duration) {
        self.dials.observe(elapsed.as_secs_f64());
    }

    /// Counts a dial that failed.
    pub(crate) fn dial_failed(&self, why: DialFailure) {
        self.failures.get_or_create(&why.labels()).0.inc();
    }

    /// Returns counters of the packets of clients.
    pub(crate) fn clients(&self) -> ClientTraffic {
        ClientTraffic::new(&self.streams, &self.writes)
    }

    /// Observes the duration of a connection.
    pub(crate) fn ended(&self, elapsed: Duration) {
        self.lifetimes.observe(elapsed.as_secs_f64());
    }

    /// Counts an open gRPC stream.
    pub(crate) fn rpc(&self, service: Service) -> GaugeGuard {
        GaugeGuard::new(&self.rpcs.get_or_create(&service.labels()))
    }

    /// Counts an open connection of HTTP CONNECT.
    pub(crate) fn http_connection(&self) -> GaugeGuard {
        GaugeGuard::new(&self.http)
    }

    /// Counts a dial that is under way.
    pub(crate) fn pending_dial(&self) -> GaugeGuard {
        GaugeGuard::new(&self.pending)
    }

    /// Counts an open connection.
    pub(crate) fn established(&self) -> GaugeGuard {
        GaugeGuard::new(&self.established)
    }

    /// Counts a connection that holds up its gRPC stream.
    pub(crate) fn full_receive_channel(&self, service: Service) -> GaugeGuard {
        GaugeGuard::new(&self.full.get_or_create(&service.labels()))
    }

    /// Sets the number of agents that can serve a dial: in all, and by strategy.
    pub(crate) fn set_backends(
        &self,
        all: usize,
        by_strategy: impl IntoIterator<Item = (&'static str, usize)>,
    ) {
        set(&self.backends, all);
        for (strategy, count) in by_strategy {
            let labels = [("proxy_strategy", strategy)];
            set(&self.by_strategy.get_or_create(&labels), count);
        }
    }
}
