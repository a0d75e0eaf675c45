//! The system clock, and how far it can be trusted.
//!
//! A clock may be ahead for seconds: a wrong time source, a virtual machine that resumes. So nothing
//! expires and nothing is forgotten because of a clock that has just been set, or that was ahead when
//! the server started: the last settled time is on record.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Maximum difference of the clock and the monotonic time between two reads.
const TOLERANCE: Duration = Duration::from_secs(60);

/// Time after which a clock that was set is trusted.
const TRUSTED_AFTER: Duration = Duration::from_secs(3600);

/// Time for which the clock must have been right before expired entries are forgotten.
const STEADY: Duration = Duration::from_secs(24 * 3600);

/// Distance from the last settled time at which a clock counts as far ahead, after an ordinary
/// downtime.
const FAR_AHEAD: Duration = Duration::from_secs(24 * 3600);

/// Maximum difference of the clocks of two hosts, or of one clock at two times.
pub const SKEW: Duration = Duration::from_secs(300);

/// A time for decisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time {
    /// Time of the clock.
    pub now: SystemTime,
    /// Same or earlier time: anything expired at this time has expired.
    pub settled: SystemTime,
    /// Whether expired entries may be forgotten.
    pub is_steady: bool,
}

impl Time {
    /// Creates a time from the clock alone, which expires no entry.
    pub fn of(now: SystemTime) -> Self {
        Self {
            now,
            settled: now,
            is_steady: false,
        }
    }
}

/// Distance by which a clock was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Into the future.
    Forward(Duration),
    /// Into the past.
    Backward(Duration),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (by, where_to) = match self {
            Self::Forward(by) => (by, "ahead"),
            Self::Backward(by) => (by, "back"),
        };
        let by = Duration::from_secs(by.as_secs());
        write!(f, "{} {where_to}", humantime::format_duration(by))
    }
}

/// A clock that is checked at each read.
#[derive(Debug)]
pub struct Clock(Mutex<ClockState>);

impl Clock {
    /// Creates a clock from the time that an earlier process last called `settled`. The length of the
    /// downtime is unknown: a clock far from that time counts as set, which is logged.
    pub fn resume(settled: Option<SystemTime>) -> Self {
        let (state, step) = ClockState::resume(settled, SystemTime::now(), Instant::now());
        match step {
            None => {}
            Some(Step::Forward(by)) if by < FAR_AHEAD => tracing::info!(
                "the last settled time on record is {} ago: certificates that ended since keep names and \
                 addresses for another hour",
                humantime::format_duration(Duration::from_secs(by.as_secs()))
            ),
            Some(step) => tracing::warn!(
                %step,
                "the clock of this host is far from the last settled time on record: it was set, or no server \
                 ran for long. Join tokens end by it at once; certificates that end by it keep names and \
                 addresses for another hour"
            ),
        }
        Self(Mutex::new(state))
    }

    /// Reads the time. Logs that the clock was set.
    pub fn read(&self) -> Time {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (time, step) = state.observe(SystemTime::now(), Instant::now());
        if let Some(step) = step {
            tracing::warn!(
                %step,
                "the clock of this host was set: join tokens end by it at once; certificates that end \
                 by it keep names and addresses for another hour"
            );
        }
        time
    }
}

#[derive(Debug)]
struct ClockState {
    /// Instant since which the clock agrees with the monotonic time.
    since: Instant,
    last: (SystemTime, Instant),
    /// Time of the clock since it was set, until that is trusted.
    set: Option<(SystemTime, Instant)>,
}

impl ClockState {
    fn new(now: SystemTime, at: Instant) -> Self {
        Self {
            since: at,
            last: (now, at),
            set: None,
        }
    }

    /// Continues from the time that was `settled` last, at the latest at `at`.
    fn resume(settled: Option<SystemTime>, now: SystemTime, at: Instant) -> (Self, Option<Step>) {
        let known = settled.map(|settled| (settled, at));
        let Some((known, step)) = known.and_then(|known| Some((known, step(known, (now, at))?)))
        else {
            return (Self::new(now, at), None);
        };
        let state = Self {
            since: at,
            last: known,
            set: Some((now, at)),
        };
        (state, Some(step))
    }

    fn observe(&mut self, now: SystemTime, at: Instant) -> (Time, Option<Step>) {
        let step = match step(self.last, (now, at)) {
            None => {
                (self.last, self.set) = ((now, at), None);
                let is_steady = at.saturating_duration_since(self.since) >= STEADY;
                let time = Time {
                    is_steady,
                    ..Time::of(now)
                };
                return (time, None);
            }
            Some(step) => step,
        };
        let unseen = match self.set {
            Some(set) if self::step(set, (now, at)).is_none() => {
                if at.saturating_duration_since(set.1) >= TRUSTED_AFTER {
                    *self = Self::new(now, at);
                    return (Time::of(now), None);
                }
                None
            }
            _ => {
                (self.set, self.since) = (Some((now, at)), at);
                Some(step)
            }
        };
        let time = Time {
            settled: now.min(expected_time(self.last, at)),
            ..Time::of(now)
        };
        (time, unseen)
    }
}

/// Returns the time that the clock would show had it not been set.
fn expected_time((then, since): (SystemTime, Instant), at: Instant) -> SystemTime {
    then + at.saturating_duration_since(since)
}

fn step(last: (SystemTime, Instant), (now, at): (SystemTime, Instant)) -> Option<Step> {
    let expected = expected_time(last, at);
    let step = match now.duration_since(expected) {
        Ok(by) => (by, Step::Forward(by)),
        Err(error) => (error.duration(), Step::Backward(error.duration())),
    };
    (step.0 > TOLERANCE).then_some(step.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const DAY: Duration = Duration::from_secs(86_400);

    fn start() -> (SystemTime, Instant) {
        (SystemTime::UNIX_EPOCH + 20_000 * DAY, Instant::now())
    }

    #[test]
    fn a_clock_that_is_ahead_for_seconds_ends_nothing() {
        let (wall, at) = start();
        let mut state = ClockState::new(wall, at);
        let (time, step) = state.observe(wall + 60 * DAY, at + SECOND);
        assert_eq!(step, Some(Step::Forward(60 * DAY - SECOND)));
        assert_eq!(time.settled, wall + SECOND);
        assert_eq!(time.now, wall + 60 * DAY);
        // Said once; a further step is another one.
        assert_eq!(state.observe(wall + 60 * DAY, at + SECOND).1, None);
        let (time, step) = state.observe(wall + 200 * DAY, at + 2 * SECOND);
        assert!(step.is_some() && time.settled == wall + 2 * SECOND);
        let (time, step) = state.observe(wall + 3 * SECOND, at + 3 * SECOND);
        assert_eq!((time, step), (Time::of(wall + 3 * SECOND), None));
    }

    #[test]
    fn a_clock_that_was_set_is_believed_when_it_stays_so() {
        let (wall, at) = start();
        let mut state = ClockState::new(wall, at);
        let set = wall + 60 * DAY;
        assert!(state.observe(set, at).1.is_some());
        let nearly = TRUSTED_AFTER - SECOND;
        let (time, step) = state.observe(set + nearly, at + nearly);
        assert_eq!((time.settled, step), (wall + nearly, None));
        let (time, step) = state.observe(set + TRUSTED_AFTER, at + TRUSTED_AFTER);
        assert_eq!((time, step), (Time::of(set + TRUSTED_AFTER), None));
    }

    /// The clock was ahead before the server was there to see it step.
    #[test]
    fn a_clock_that_is_ahead_at_a_start_is_believed_when_it_stays_so() {
        let (known, at) = start();
        let ahead = known + 60 * DAY;
        let (mut state, step) = ClockState::resume(Some(known), ahead, at);
        assert_eq!(step, Some(Step::Forward(60 * DAY)));
        let (time, step) = state.observe(ahead + SECOND, at + SECOND);
        assert_eq!((time.settled, step), (known + SECOND, None));
        assert_eq!(time.now, ahead + SECOND);
        let nearly = TRUSTED_AFTER - SECOND;
        assert_eq!(
            state.observe(ahead + nearly, at + nearly).0.settled,
            known + nearly
        );
        let (time, step) = state.observe(ahead + TRUSTED_AFTER, at + TRUSTED_AFTER);
        assert_eq!((time, step), (Time::of(ahead + TRUSTED_AFTER), None));

        // Put right: so long no server ran.
        let (mut state, _) = ClockState::resume(Some(known), ahead, at);
        let right = known + DAY;
        let (time, step) = state.observe(right, at + SECOND);
        assert!(step.is_some() && time.settled == known + SECOND);
        let (time, _) = state.observe(right + TRUSTED_AFTER, at + SECOND + TRUSTED_AFTER);
        assert_eq!(time.settled, right + TRUSTED_AFTER);
    }

    #[test]
    fn a_start_goes_by_the_clock_where_nothing_speaks_against_it() {
        let (now, at) = start();
        for settled in [
            None,
            Some(now),
            Some(now - TOLERANCE),
            Some(now + TOLERANCE),
        ] {
            let (mut state, step) = ClockState::resume(settled, now, at);
            assert_eq!(step, None);
            assert_eq!(state.observe(now, at), (Time::of(now), None));
        }
        // Behind what was settled: nothing ends by it.
        let (mut state, step) = ClockState::resume(Some(now + DAY), now, at);
        assert_eq!(step, Some(Step::Backward(DAY)));
        assert_eq!(state.observe(now, at).0.settled, now);
    }

    #[test]
    fn a_clock_that_is_set_back_ends_nothing_either() {
        let (wall, at) = start();
        let mut state = ClockState::new(wall, at);
        let (time, step) = state.observe(wall - 60 * DAY, at);
        assert_eq!(step, Some(Step::Backward(60 * DAY)));
        assert_eq!(step.unwrap().to_string(), "1month 29days 13h 26m 24s back");
        assert_eq!(time.settled, wall - 60 * DAY);
    }

    #[test]
    fn things_are_forgotten_after_a_steady_day() {
        let (wall, at) = start();
        let mut state = ClockState::new(wall, at);
        let steady =
            |state: &mut ClockState, after| state.observe(wall + after, at + after).0.is_steady;
        assert!(!steady(&mut state, STEADY - SECOND));
        assert!(steady(&mut state, STEADY));
        // Slow as it is, a clock that is put right all the time is steady.
        for n in 1..1000 {
            let after = STEADY + 60 * n * SECOND;
            assert!(
                state
                    .observe(wall + after + n * SECOND, at + after)
                    .0
                    .is_steady
            );
        }
        state.observe(wall + 60 * DAY, at + 2 * DAY);
        let again = 3 * DAY - SECOND;
        assert!(
            !state
                .observe(wall + again + 1000 * SECOND, at + again)
                .0
                .is_steady
        );
    }
}
