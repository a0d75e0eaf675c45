//! Dials and connections under the names of proxy-server, whatever frontend and tunnel they use.

use std::time::Duration;

use tunnel_proto::close::CloseReason;

use crate::metrics::{DialFailure, ProxyServerMetrics};
use cpc_observe::metrics::{Closer, GaugeGuard};
use cpc_server::extension::{DialError, Observer};
use cpc_server::registry::Backends;

/// Counters of dials and connections.
#[derive(Debug)]
pub(super) struct DialCounters(ProxyServerMetrics);

impl DialCounters {
    /// Creates counters in `metrics`.
    pub(super) fn new(metrics: ProxyServerMetrics) -> Self {
        Self(metrics)
    }
}

impl Observer for DialCounters {
    fn dial_begins(&self) -> GaugeGuard {
        self.0.pending_dial()
    }

    fn dialled(&self, elapsed: Duration) {
        self.0.dialled(elapsed);
    }

    fn dial_failed(&self, error: &DialError) {
        self.0.dial_failed(failure(error));
    }

    fn http_connection(&self) -> GaugeGuard {
        self.0.http_connection()
    }

    fn connection(&self) -> GaugeGuard {
        self.0.established()
    }

    fn connection_ended(&self, elapsed: Duration) {
        self.0.ended(elapsed);
    }

    fn set_backends(&self, backends: &Backends) {
        let by_strategy = backends.by_strategy.iter();
        let by_strategy = by_strategy.map(|(strategy, count)| (strategy.label(), *count));
        self.0.set_backends(backends.all, by_strategy);
    }
}

fn failure(error: &DialError) -> DialFailure {
    match (error.by, error.reason) {
        (Closer::Agent, _) => DialFailure::ErrorResponse,
        (Closer::Client, _) => DialFailure::FrontendClose,
        (_, CloseReason::NoRoute | CloseReason::NoAgent) => DialFailure::NoAgent,
        (_, CloseReason::DialTimeout) => DialFailure::BackendDialTimeout,
        _ => DialFailure::BackendClose,
    }
}
