//! Observation of the requests about leases.

use std::time::Duration;

/// Answer of the API server: status code and one of few reasons. `None` for no answer.
pub type Outcome<'a> = Option<(u16, &'a str)>;

/// Counts requests about leases, under names of its own. By default it counts nothing.
pub trait LeaseObserver: Send + Sync {
    /// Observes a list.
    fn listed(&self, _outcome: Outcome<'_>, _elapsed: Duration) {}

    /// Observes the start of a watch.
    fn watched(&self, _outcome: Outcome<'_>) {}

    /// Observes a deletion.
    fn deleted(&self, _outcome: Outcome<'_>, _elapsed: Duration) {}

    /// Observes that an expired lease was deleted.
    fn cleared(&self) {}
}

impl LeaseObserver for () {}
