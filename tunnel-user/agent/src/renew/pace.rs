//! The time of a certificate's renewal. Decides without reading a clock.
//!
//! The due time follows from the certificate and this host's clock, which may be wrong: then a
//! certificate that was just issued is due again. So a hold follows each renewal. It ends by monotonic
//! time, or when the clock is set.

use std::time::{Duration, Instant, SystemTime};

use cpc_identity::issue::CLOCK_SKEW;

/// Hold after a renewal, whatever the clock shows. A server renews no certificate that is younger.
const SHORTEST_HOLD: Duration = Duration::from_secs(60);

/// Hold after a certificate that is not valid by this host's clock.
pub(super) const CLOCK_HOLD: Duration = Duration::from_secs(6 * 3600);

/// Maximum difference of two clocks that agree.
const TOLERANCE: Duration = Duration::from_secs(300);

/// Difference from the expected time beyond which this host's clock was set.
const STEP: Duration = Duration::from_secs(60);

/// Readings of both clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    /// Wall clock, which may be set.
    pub wall: SystemTime,
    /// Monotonic clock, which stands still while the host sleeps.
    pub steady: Instant,
}

impl Moment {
    /// Reads both clocks.
    pub(super) fn now() -> Self {
        Self {
            wall: SystemTime::now(),
            steady: Instant::now(),
        }
    }
}

/// The pace of renewals.
#[derive(Debug, Default)]
pub(super) struct Pace {
    hold: Option<(Moment, Duration)>,
}

impl Pace {
    /// Returns the time until the renewal of a certificate that is valid `from` .. `until`: two thirds
    /// of its validity, and up to a twentieth in proportion to `share`, of 255.
    pub(super) fn wait(
        &self,
        (from, until): (SystemTime, SystemTime),
        share: u8,
        now: Moment,
    ) -> Duration {
        let life = until.duration_since(from).unwrap_or_default();
        let due = from + life * 2 / 3 + life / 20 * u32::from(share) / 255;
        let due = due.duration_since(now.wall).unwrap_or_default();
        due.max(self.held(now))
    }

    fn held(&self, now: Moment) -> Duration {
        let Some((since, length)) = self.hold else {
            return Duration::ZERO;
        };
        let passed = now.steady.saturating_duration_since(since.steady);
        match apart(now.wall, since.wall + passed) {
            // It was set, or the host slept: what it says counts again.
            Some((off, _)) if off > STEP => SHORTEST_HOLD.saturating_sub(passed),
            _ => length.saturating_sub(passed),
        }
    }

    /// Notes that a certificate was issued at `now` for `life`.
    pub(super) fn issued(&mut self, life: Duration, now: Moment) {
        self.hold = Some((now, (life / 10).max(SHORTEST_HOLD)));
    }

    /// Notes a failure, after which the next attempt comes after `hold`.
    pub(super) fn failed(&mut self, hold: Duration, now: Moment) {
        self.hold = Some((now, hold));
    }
}

/// Returns the difference of this host's clock from the server's, whose certificate was valid from
/// `not_before` on when it was issued just now; and whether it is ahead.
pub(super) fn clock_error(not_before: SystemTime, now: SystemTime) -> Option<(Duration, bool)> {
    apart(now, not_before + CLOCK_SKEW).filter(|(off, _)| *off > TOLERANCE)
}

/// Returns the difference of `one` from `other`, and whether it is later.
fn apart(one: SystemTime, other: SystemTime) -> Option<(Duration, bool)> {
    match one.duration_since(other) {
        Ok(ahead) => Some((ahead, true)),
        Err(behind) => Some((behind.duration(), false)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const DAY: Duration = Duration::from_secs(86_400);

    fn after(moment: Moment, wall: Duration, steady: Duration) -> Moment {
        Moment {
            wall: moment.wall + wall,
            steady: moment.steady + steady,
        }
    }

    /// A certificate as a server issues it at `at`.
    fn certificate(at: SystemTime) -> (SystemTime, SystemTime) {
        (at - CLOCK_SKEW, at + 30 * DAY)
    }

    #[test]
    fn two_thirds_and_a_bit() {
        let now = Moment::now();
        let pace = Pace::default();
        let certificate = (now.wall, now.wall + 30 * DAY);
        assert_eq!(pace.wait(certificate, 0, now), 20 * DAY);
        assert_eq!(pace.wait(certificate, 255, now), 20 * DAY + 36 * DAY / 24);
        let late = after(now, 21 * DAY, 21 * DAY);
        assert_eq!(pace.wait(certificate, 0, late), Duration::ZERO);
        // Past its end as well, and from a clock that is behind.
        assert_eq!(
            pace.wait(certificate, 0, after(now, 99 * DAY, DAY)),
            Duration::ZERO
        );
        let early = Moment {
            wall: now.wall - DAY,
            ..now
        };
        assert_eq!(pace.wait(certificate, 0, early), 21 * DAY);
    }

    /// Each new certificate is due at once by a clock that is 25 days ahead.
    #[test]
    fn a_clock_that_is_ahead_renews_at_a_tenth_of_the_life() {
        let server = SystemTime::now();
        let now = Moment {
            wall: server + 25 * DAY,
            steady: Instant::now(),
        };
        let issued = certificate(server);
        let mut pace = Pace::default();
        assert_eq!(pace.wait(issued, 0, now), Duration::ZERO);
        pace.issued(30 * DAY, now);
        assert_eq!(pace.wait(issued, 0, now), 3 * DAY);
        let later = after(now, DAY, DAY);
        assert_eq!(pace.wait(certificate(server + DAY), 0, later), 2 * DAY);
        let (off, ahead) = clock_error(issued.0, now.wall).unwrap();
        assert_eq!((off, ahead), (25 * DAY, true));
        let (off, ahead) = clock_error(issued.0, server - DAY).unwrap();
        assert_eq!((off, ahead), (DAY, false));
        for near in [server, server + 4 * MINUTE, server - 4 * MINUTE] {
            assert_eq!(clock_error(issued.0, near), None);
        }
    }

    #[test]
    fn a_clock_that_is_set_ends_a_hold() {
        let now = Moment::now();
        let mut pace = Pace::default();
        let due = (now.wall - 30 * DAY, now.wall + DAY);
        pace.failed(CLOCK_HOLD, now);
        let later = after(now, 10 * MINUTE, 10 * MINUTE);
        assert_eq!(pace.wait(due, 0, later), CLOCK_HOLD - 10 * MINUTE);
        // Back by an hour, forward by one, and a host that slept.
        let back = Moment {
            wall: now.wall - 60 * MINUTE,
            ..later
        };
        for set in [
            back,
            after(now, 70 * MINUTE, 10 * MINUTE),
            after(now, DAY, 10 * MINUTE),
        ] {
            assert_eq!(pace.wait(due, 0, set), Duration::ZERO);
        }
        // Not at once: a clock that is set all the time would renew all the time.
        pace.issued(30 * DAY, now);
        let set = after(now, DAY, MINUTE / 2);
        assert_eq!(pace.wait(due, 0, set), MINUTE / 2);
    }

    #[test]
    fn a_short_life_is_held_for_a_minute() {
        let now = Moment::now();
        let mut pace = Pace::default();
        pace.issued(5 * MINUTE, now);
        let ends = (now.wall - CLOCK_SKEW, now.wall);
        assert_eq!(pace.wait(ends, 0, now), MINUTE);
        assert_eq!(
            pace.wait(ends, 0, after(now, MINUTE, MINUTE)),
            Duration::ZERO
        );
    }
}
