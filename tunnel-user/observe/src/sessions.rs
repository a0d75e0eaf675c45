//! Metrics of sessions: connections that outlive their tunnel.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tunnel_proto::close::CloseReason;

/// Upper bounds of the buckets of stalls, in seconds.
const STALL_SECONDS: [f64; 9] = [0.05, 0.2, 0.5, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CauseLabels {
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FamilyLabels {
    family: &'static str,
}

impl CauseLabels {
    fn of(cause: CloseReason) -> Self {
        Self {
            cause: cause.label(),
        }
    }
}

/// Metrics of sessions, the same on server and agent.
#[derive(Clone, Debug)]
pub struct SessionMetrics {
    /// Connections that both ends hold.
    pub held: Gauge,
    /// Connections that wait for another tunnel.
    pub waiting: WaitingSessions,
    /// Connections that outlive a crash of this process.
    pub kept: Gauge,
    resumed: Family<CauseLabels, Counter>,
    lost: Family<CauseLabels, Counter>,
    stall: Histogram,
    peek_offset: Family<FamilyLabels, Gauge>,
}

/// Connections that wait for another tunnel. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct WaitingSessions {
    count: Gauge,
    /// Number of connections by the start of their wait.
    starts: Arc<Mutex<BTreeMap<Instant, usize>>>,
}

/// Counts a connection as waiting while it lives.
#[derive(Debug)]
pub struct WaitingGuard {
    sessions: WaitingSessions,
    start: Instant,
}

impl WaitingSessions {
    /// Counts a connection that waits since `start`.
    pub fn add(&self, start: Instant) -> WaitingGuard {
        self.count.inc();
        *self.starts().entry(start).or_default() += 1;
        WaitingGuard {
            sessions: self.clone(),
            start,
        }
    }

    /// Returns for how long the first of them has waited.
    pub fn longest(&self) -> Option<Duration> {
        let starts = self.starts();
        starts.first_key_value().map(|(start, _)| start.elapsed())
    }

    fn starts(&self) -> MutexGuard<'_, BTreeMap<Instant, usize>> {
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for WaitingGuard {
    fn drop(&mut self) {
        self.sessions.count.dec();
        let mut starts = self.sessions.starts();
        if let Some(count) = starts.get_mut(&self.start) {
            *count -= 1;
            if *count == 0 {
                starts.remove(&self.start);
            }
        }
    }
}

impl SessionMetrics {
    /// Registers the metrics.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            held: Gauge::default(),
            waiting: WaitingSessions::default(),
            kept: Gauge::default(),
            resumed: Family::default(),
            lost: Family::default(),
            stall: Histogram::new(STALL_SECONDS),
            peek_offset: Family::default(),
        };
        // From the start: an alert on a rate needs the first event too.
        for cause in [CloseReason::LinkLost, CloseReason::IdentityRefused] {
            drop(metrics.lost.get_or_create(&CauseLabels::of(cause)));
        }
        for cause in [
            CloseReason::LinkLost,
            CloseReason::IdleTimeout,
            CloseReason::Replaced,
        ] {
            drop(metrics.resumed.get_or_create(&CauseLabels::of(cause)));
        }
        registry.register(
            "sessions_held",
            "Connections that outlive the loss of their tunnel",
            metrics.held.clone(),
        );
        registry.register(
            "sessions_waiting",
            "Connections whose tunnel was lost and that wait for another one",
            metrics.waiting.count.clone(),
        );
        registry.register(
            "sessions_kept",
            "Connections whose sockets a keeper holds: they outlive a crash of this process",
            metrics.kept.clone(),
        );
        registry.register(
            "sessions_resumed",
            "Connections that went on over another tunnel, by the reason why the last one was lost",
            metrics.resumed.clone(),
        );
        registry.register(
            "sessions_lost",
            "Connections that waited for another tunnel in vain, by the reason of their end",
            metrics.lost.clone(),
        );
        registry.register(
            "session_stall_seconds",
            "Time from the loss of a tunnel until a connection went on over another one",
            metrics.stall.clone(),
        );
        registry.register(
            "peek_offset",
            "1 where the kernel has SO_PEEK_OFF for TCP, by address family",
            metrics.peek_offset.clone(),
        );
        metrics
    }

    /// Tells whether the kernel has `SO_PEEK_OFF` for TCP over IPv4, and over IPv6.
    pub fn set_peek_offset(&self, ipv4: bool, ipv6: bool) {
        for (family, is_there) in [("ipv4", ipv4), ("ipv6", ipv6)] {
            let gauge = self.peek_offset.get_or_create(&FamilyLabels { family });
            gauge.set(is_there.into());
        }
    }

    /// Counts a session that went on after `stall`; its tunnel was lost for `cause`.
    pub fn resumed(&self, cause: CloseReason, stall: Duration) {
        self.resumed.get_or_create(&CauseLabels::of(cause)).inc();
        self.stall.observe(stall.as_secs_f64());
    }

    /// Counts a session that waited in vain, and ended with `reason`.
    pub fn lost(&self, reason: CloseReason) {
        self.lost.get_or_create(&CauseLabels::of(reason)).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_waits_has_waited_longest() {
        let waiting = WaitingSessions::default();
        assert_eq!(waiting.longest(), None);
        let now = Instant::now();
        let minute = Duration::from_secs(60);
        let before = now.checked_sub(minute).unwrap();
        let guards = [before, now, before].map(|start| waiting.add(start));
        assert_eq!(waiting.count.get(), 3);
        let [first, second, third] = guards;
        drop(first);
        assert!(waiting.longest().unwrap() >= minute);
        drop(third);
        assert!(waiting.longest().unwrap() < minute);
        drop(second);
        assert_eq!((waiting.longest(), waiting.count.get()), (None, 0));
    }
}
