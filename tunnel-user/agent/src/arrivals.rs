//! Arrivals: the streams of a server that are still to come when the agent is about to leave a tunnel.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Minimum time in which a server is to say how many streams it has opened. One of an earlier release does not.
const ANSWER: Duration = Duration::from_millis(500);

/// Streams that have arrived on a tunnel, and those that the server has opened.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    arrived: Cell<u64>,
    opened: Cell<Option<u64>>,
    /// Time from which on the server is not waited for.
    until: Cell<Option<Instant>>,
}

impl Arrivals {
    /// Notes a stream.
    pub(super) fn arrived(&self) {
        self.arrived.set(self.arrived.get() + 1);
    }

    /// Notes that the server was asked, over a path with this round-trip time, to open no more streams.
    pub(super) fn asked(&self, now: Instant, rtt: Duration) {
        self.until.set(Some(now + ANSWER.max(3 * rtt)));
    }

    /// Notes that the server opens no more than `opened` streams.
    pub(super) fn announced(&self, opened: u64) {
        self.opened.set(Some(opened));
    }

    /// Returns `true` once the agent need not wait for more streams. Transports accept streams in the order in which they
    /// were opened.
    pub(super) fn are_over(&self, now: Instant) -> bool {
        match self.opened.get() {
            Some(opened) => self.arrived.get() >= opened,
            None => self.until.get().is_some_and(|until| now >= until),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_announced_stream_is_waited_for() {
        let (arrivals, now) = (Arrivals::default(), Instant::now());
        arrivals.arrived();
        assert!(!arrivals.are_over(now + 10 * ANSWER));
        arrivals.asked(now, Duration::ZERO);
        arrivals.announced(2);
        assert!(!arrivals.are_over(now + 10 * ANSWER));
        arrivals.arrived();
        assert!(arrivals.are_over(now));
    }

    #[test]
    fn a_server_that_does_not_answer_is_not_waited_for() {
        let now = Instant::now();
        for (rtt, limit) in [(0, 500), (100, 500), (600, 1800)] {
            let arrivals = Arrivals::default();
            arrivals.asked(now, Duration::from_millis(rtt));
            assert!(!arrivals.are_over(now + Duration::from_millis(limit - 1)));
            assert!(arrivals.are_over(now + Duration::from_millis(limit)));
        }
    }
}
