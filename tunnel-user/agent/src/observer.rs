//! Observation of an agent's work, for counters outside of this crate.

use std::sync::Arc;
use std::time::Duration;

use tunnel_proto::close::CloseReason;

/// An observer of dials and servers, on any thread.
pub trait Observer: Send + Sync {
    /// A target was connected after this time.
    fn target_connected(&self, elapsed: Duration);

    /// A target was not connected.
    fn target_failed(&self, reason: CloseReason);

    /// A connection to a target begins to be relayed.
    fn connection_opened(&self);

    /// A connection to a target has ended.
    fn connection_closed(&self);

    /// So many servers are reached, of those that are known. Called before metrics are read.
    fn servers_counted(&self, reached: usize, known: usize);
}

/// An open connection, observed until dropped.
pub(super) struct ObservedConnection(Option<Arc<dyn Observer>>);

impl ObservedConnection {
    /// Observes the start of a connection.
    pub(super) fn new(observer: Option<Arc<dyn Observer>>) -> Self {
        if let Some(observer) = &observer {
            observer.connection_opened();
        }
        Self(observer)
    }
}

impl Drop for ObservedConnection {
    fn drop(&mut self) {
        if let Some(observer) = &self.0 {
            observer.connection_closed();
        }
    }
}
