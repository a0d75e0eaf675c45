//! Estimate of the time that a target needs for the bytes sent to it.

use std::time::{Duration, Instant};

use super::{AGENT_QUEUE, SLOWEST_TARGET};

/// Bytes that an agent may hold for a target that reads [`SLOWEST_TARGET`] bytes a second, as the
/// time at which it has read all of them.
#[derive(Debug, Default)]
pub(super) struct Backlog(Option<Instant>);

impl Backlog {
    /// Adds `bytes` that were sent.
    pub(super) fn add(&mut self, bytes: usize, now: Instant) {
        let max = now + duration(AGENT_QUEUE);
        self.0 = Some((self.written(now) + duration(bytes)).min(max));
    }

    /// Returns the time at which everything is read; now if nothing is held.
    pub(super) fn written(&self, now: Instant) -> Instant {
        self.0.map_or(now, |at| at.max(now))
    }
}

fn duration(bytes: usize) -> Duration {
    // No more than a queue at once, which fits in 32 bits.
    Duration::from_secs(1) * bytes.min(AGENT_QUEUE) as u32 / SLOWEST_TARGET
}
