//! Permits: each counts one connection, dial or tunnel until it is dropped, on any shard.

use prometheus_client::metrics::gauge::Gauge;

use cpc_host::concurrency::Permit;
use cpc_observe::metrics::GaugeGuard;

/// Counts a connection among all, among those of its tenant, and in the metric of open connections.
pub struct ConnectionPermit {
    _permits: (Permit, Permit),
    _open: GaugeGuard,
}

/// Counts a dial among all and among those of its tenant.
pub(super) struct DialPermit {
    _permits: (Permit, Permit),
}

/// Counts a tunnel among all and among those of its tenant.
pub type TunnelPermit = (Permit, Permit);

impl ConnectionPermit {
    /// Creates the permit of a connection that both limits admit.
    pub(super) fn new(permits: (Permit, Permit), open: &Gauge) -> Self {
        Self {
            _permits: permits,
            _open: GaugeGuard::new(open),
        }
    }
}

impl DialPermit {
    /// Creates the permit of a dial that both limits admit.
    pub(super) fn new(permits: (Permit, Permit)) -> Self {
        Self { _permits: permits }
    }
}
