//! Metrics of the configuration: whether the process runs with the content of its file.

use std::time::SystemTime;

use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Outcome of the last reload of the configuration. A start counts as one.
#[derive(Clone, Debug)]
pub struct ReloadMetrics {
    is_successful: Gauge,
    succeeded_at: Gauge,
}

impl ReloadMetrics {
    /// Registers the metrics of a process that has read its configuration at `now`.
    pub fn register(registry: &mut Registry, now: SystemTime) -> Self {
        let metrics = Self {
            is_successful: Gauge::default(),
            succeeded_at: Gauge::default(),
        };
        registry.register(
            "config_last_reload_successful",
            "Whether the last reload of the configuration put every reloadable setting in force",
            metrics.is_successful.clone(),
        );
        registry.register(
            "config_last_reload_success_timestamp_seconds",
            "Time at which the configuration last took effect",
            metrics.succeeded_at.clone(),
        );
        metrics.note(true, now);
        metrics
    }

    /// Notes the outcome of a reload that ended at `now`.
    pub fn note(&self, is_successful: bool, now: SystemTime) {
        self.is_successful.set(is_successful.into());
        if is_successful {
            let since = now.duration_since(SystemTime::UNIX_EPOCH);
            let seconds = since.unwrap_or_default().as_secs();
            self.succeeded_at
                .set(i64::try_from(seconds).unwrap_or(i64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::exposition::Format;

    #[test]
    fn a_reload_that_failed_shows_until_one_succeeds() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let mut registry = Registry::default();
        let metrics = ReloadMetrics::register(&mut registry, at(10));
        let shows = |is_successful, seconds| {
            let page = Format::Text.page(&registry).unwrap();
            for line in [
                format!("config_last_reload_successful {is_successful}\n"),
                format!("config_last_reload_success_timestamp_seconds {seconds}\n"),
            ] {
                assert!(page.contains(&line), "no {line} in {page}");
            }
        };
        shows(1, 10);
        metrics.note(false, at(20));
        shows(0, 10);
        metrics.note(true, at(30));
        shows(1, 30);
    }
}
