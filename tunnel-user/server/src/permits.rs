//! Permits: each counts one connection, dial or tunnel until it is dropped, on any shard.

use prometheus_client::metrics::gauge::Gauge;

use cpc_host::concurrency::Entered;

/// Counts a connection among all, among those of its tenant, and in the metric of open connections.
pub(super) struct ConnectionPermit {
    _entered: (Entered, Entered),
    open: Gauge,
}

/// Counts a dial among all and among those of its tenant.
pub(super) struct DialPermit {
    _entered: (Entered, Entered),
}

/// Counts a tunnel among all and among those of its tenant.
pub(super) type TunnelPermit = (Entered, Entered);

impl ConnectionPermit {
    /// A connection that both limits admit.
    pub(super) fn new(entered: (Entered, Entered), open: Gauge) -> Self {
        open.inc();
        Self {
            _entered: entered,
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
    pub(super) fn new(entered: (Entered, Entered)) -> Self {
        Self { _entered: entered }
    }
}
