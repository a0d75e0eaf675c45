//! Timers of the connections of an endpoint.
//!
//! A connection's deadline moves with almost every packet, mostly later. So a later one is only noted,
//! and found when the earlier one has come.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use quinn_proto::ConnectionHandle;

/// Timer of a connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Timer {
    /// Deadline at which it must be driven.
    pub(super) at: Option<Instant>,
    /// Earliest queued entry of the connection.
    queued: Option<Instant>,
}

/// The timers of one endpoint.
#[derive(Debug, Default)]
pub(super) struct Timers {
    queue: BinaryHeap<Reverse<(Instant, usize)>>,
}

impl Timers {
    /// Sets the deadline of `handle` to `at`.
    pub(super) fn set(&mut self, handle: ConnectionHandle, timer: &mut Timer, at: Option<Instant>) {
        timer.at = at;
        if let Some(at) = at
            && timer.queued.is_none_or(|queued| at < queued)
        {
            timer.queued = Some(at);
            self.queue.push(Reverse((at, handle.0)));
        }
    }

    /// Returns the time of the next entry.
    pub(super) fn next(&self) -> Option<Instant> {
        self.queue.peek().map(|Reverse((at, _))| *at)
    }

    /// Returns a connection with an entry that is due by `now`; see [`is_due`](Self::is_due).
    pub(super) fn pop(&mut self, now: Instant) -> Option<(Instant, ConnectionHandle)> {
        if self.next()? > now {
            return None;
        }
        let Reverse((at, handle)) = self.queue.pop()?;
        Some((at, ConnectionHandle(handle)))
    }

    /// Whether the connection of an entry that was due at `entry` must be driven by `now`.
    pub(super) fn is_due(
        &mut self,
        handle: ConnectionHandle,
        timer: &mut Timer,
        entry: Instant,
        now: Instant,
    ) -> bool {
        if timer.queued != Some(entry) {
            // An earlier one has stood for it since.
            return false;
        }
        timer.queued = None;
        match timer.at {
            Some(at) if at <= now => {
                timer.at = None;
                true
            }
            at => {
                self.set(handle, timer, at);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ONE: ConnectionHandle = ConnectionHandle(1);

    #[test]
    fn a_deadline_that_moves_is_met_once() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let (mut timers, mut timer) = (Timers::default(), Timer::default());
        for ms in [50, 60, 20, 30] {
            timers.set(ONE, &mut timer, Some(at(ms)));
        }
        assert_eq!(timers.queue.len(), 2);
        let mut met = Vec::new();
        for ms in 0..100 {
            while let Some((entry, handle)) = timers.pop(at(ms)) {
                if timers.is_due(handle, &mut timer, entry, at(ms)) {
                    met.push(ms);
                }
            }
        }
        assert_eq!(met, [30]);
        assert_eq!(timers.next(), None);
    }

    #[test]
    fn a_deadline_that_is_taken_back_is_not_met() {
        let now = Instant::now();
        let (mut timers, mut timer) = (Timers::default(), Timer::default());
        timers.set(ONE, &mut timer, Some(now));
        timers.set(ONE, &mut timer, None);
        let (entry, handle) = timers.pop(now).unwrap();
        assert!(!timers.is_due(handle, &mut timer, entry, now));
        assert!(timers.pop(now).is_none());
    }
}
