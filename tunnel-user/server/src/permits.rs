//! Permits: each counts one connection, dial or tunnel until it is dropped, on any shard.

use prometheus_client::metrics::gauge::Gauge;

use cpc_host::concurrency::Permit;

/// Counts a connection among all, among those of its tenant, and in the metric of open connections.
pub struct ConnectionPermit {
    _permits: (Permit, Permit),
    open: Gauge,
}

/// Counts a dial among all and among those of its tenant.
pub(super) struct DialPermit {
    _permits: (Permit, Permit),
}

/// Counts a tunnel among all and among those of its tenant.
pub type TunnelPermit = (Permit, Permit);

impl ConnectionPermit {
    /// A connection that both limits admit.
    pub(super) fn new(entered: (Permit, Permit), open: Gauge) -> Self {
        open.inc();
        Self {
            _permits: entered,
            open,
        }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.open.dec();
    }
}

impl DialPermit {
    /// A dial that both limits admit.
    pub(super) fn new(entered: (Permit, Permit)) -> Self {
        Self { _permits: entered }
    }
}
