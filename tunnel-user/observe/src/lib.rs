//! Observability: logs ([`logging`]), metrics ([`metrics`]), and one record per connection that feeds
//! both ([`access`]) and the [`audit`]. Further metrics are those of the
//! [`process`] and of its last [`reload`]; [`exposition`] writes them.

pub mod access;
pub mod admin;
pub mod audit;
pub mod error_dedup;
pub mod exposition;
mod journal;
pub mod limits;
mod line_end;
mod line_writer;
pub mod logging;
pub mod metrics;
pub mod process;
pub mod reload;
pub mod sessions;
pub mod targets;
pub mod throttle;

use std::time::Duration;

/// Returns milliseconds, rounded to the microsecond.
pub fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Returns seconds, rounded to the microsecond.
pub fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e6
}
