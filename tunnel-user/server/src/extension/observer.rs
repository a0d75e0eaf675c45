//! Observation of dials and connections, whatever frontend and tunnel they use.

use std::fmt;
use std::time::Duration;

use crate::dial::error::DialError;
use crate::registry::Backends;
use cpc_observe::metrics::GaugeGuard;

/// Counts what a server does for its clients, under names of its own. The calls are on the way of each
/// connection: they never wait.
pub trait Observer: Send + Sync + fmt::Debug {
    /// Counts a dial until the guard is dropped.
    fn dial_begins(&self) -> GaugeGuard;

    /// Observes a dial that succeeded after `elapsed`.
    fn dialled(&self, elapsed: Duration);

    /// Counts a dial that failed.
    fn dial_failed(&self, error: &DialError);

    /// Counts a connection of HTTP CONNECT until the guard is dropped.
    fn http_connection(&self) -> GaugeGuard;

    /// Counts a connection to a target until the guard is dropped.
    fn connection(&self) -> GaugeGuard;

    /// Observes the end of a connection that lasted for `elapsed`.
    fn connection_ended(&self, elapsed: Duration);

    /// Sets the number of available agents. Called before metrics are written.
    fn set_backends(&self, backends: &Backends);
}
