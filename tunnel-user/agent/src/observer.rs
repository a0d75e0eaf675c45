//! Observation of an agent's work, for counters outside of this crate.

use std::sync::Arc;
use std::time::Duration;

use tunnel_proto::close::CloseReason;

/// An observer of dials and servers, on any thread. By default it ignores everything.
pub trait Observer: Send + Sync {
    /// A target was connected after this time.
    fn target_connected(&self, _elapsed: Duration) {}

    /// A target was not connected.
    fn target_failed(&self, _reason: CloseReason) {}

    /// A connection to a target begins to be relayed.
    fn connection_opened(&self) {}

    /// A connection to a target has ended.
    fn connection_closed(&self) {}

    /// So many servers are reached, of those that are known. Called before metrics are read.
    fn servers_counted(&self, _reached: usize, _known: usize) {}
}

impl Observer for () {}

/// An open connection, observed until dropped.
pub(super) struct ObservedConnection(Arc<dyn Observer>);

impl ObservedConnection {
    /// Observes the start of a connection.
    pub(super) fn new(observer: Arc<dyn Observer>) -> Self {
        observer.connection_opened();
        Self(observer)
    }
}

impl Drop for ObservedConnection {
    fn drop(&mut self) {
        self.0.connection_closed();
    }
}
