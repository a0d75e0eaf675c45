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
const BELIEVED_AFTER: Duration = Duration::from_secs(3600);

/// Time for which the clock must have been right before expired entries are forgotten.
const STEADY: Duration = Duration::from_secs(24 * 3600);

/// Distance from the last settled time at which a clock counts as far ahead, after an ordinary
/// downtime.
const FAR: Duration = Duration::from_secs(24 * 3600);

/// Maximum difference of the clocks of two hosts, or of one clock at two times.
pub const SKEW: Duration = Duration::from_secs(300);

/// A time for decisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time {
    /// Time of the clock.
    pub now: SystemTime,
    /// Same or earlier time: whatever has expired by it has expired.
    pub settled: SystemTime,
    /// Whether expired entries may be forgotten.
    pub is_steady: bool,
}

impl Time {
    /// Creates a time from the clock alone. Nothing is forgotten by it.
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
    Ahead(Duration),
    /// Into the past.
    Back(Duration),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (by, where_to) = match self {
            Self::Ahead(by) => (by, "ahead"),
            Self::Back(by) => (by, "back"),
        };
        let by = Duration::from_secs(by.as_secs());
        write!(f, "{} {where_to}", humantime::format_duration(by))
    }
}

/// A clock that is checked at each read.
#[derive(Debug)]
pub struct Clock(Mutex<Watch>);

impl Clock {
    /// Creates a clock from the time that an earlier process last called `settled`. The length of the
    /// downtime is unknown: a clock far from that time counts as set, which is logged.
    pub fn resume(settled: Option<SystemTime>) -> Self {
        let (watch, step) = Watch::resume(settled, SystemTime::now(), Instant::now());
        match step {
            None => {}
            Some(Step::Ahead(by)) if by < FAR => tracing::info!(
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
        Self(Mutex::new(watch))
    }

    /// Reads the time. Logs that the clock was set.
    pub fn read(&self) -> Time {
        let mut watch = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (time, step) = watch.look(SystemTime::now(), Instant::now());
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
struct Watch {
    /// Instant since which the clock agrees with the monotonic time.
    since: Instant,
    last: (SystemTime, Instant),
    /// Time of the clock since it was set, until that is trusted.
    set: Option<(SystemTime, Instant)>,
}

impl Watch {
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
        let watch = Self {
            since: at,
            last: known,
            set: Some((now, at)),
        };
        (watch, Some(step))
    }

    fn look(&mut self, now: SystemTime, at: Instant) -> (Time, Option<Step>) {
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
                if at.saturating_duration_since(set.1) >= BELIEVED_AFTER {
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
            settled: now.min(passed(self.last, at)),
            ..Time::of(now)
        };
        (time, unseen)
    }
}

/// Returns the time that the clock would show had it not been set.
fn passed((then, since): (SystemTime, Instant), at: Instant) -> SystemTime {
    then + at.saturating_duration_since(since)
}

fn step(last: (SystemTime, Instant), (now, at): (SystemTime, Instant)) -> Option<Step> {
    let expected = passed(last, at);
    let step = match now.duration_since(expected) {
        Ok(by) => (by, Step::Ahead(by)),
        Err(error) => (error.duration(), Step::Back(error.duration())),
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
        let mut watch = Watch::new(wall, at);
        let (time, step) = watch.look(wall + 60 * DAY, at + SECOND);
        assert_eq!(step, Some(Step::Ahead(60 * DAY - SECOND)));
        assert_eq!(time.settled, wall + SECOND);
        assert_eq!(time.now, wall + 60 * DAY);
        // Said once; a further step is another one.
        assert_eq!(watch.look(wall + 60 * DAY, at + SECOND).1, None);
        let (time, step) = watch.look(wall + 200 * DAY, at + 2 * SECOND);
        assert!(step.is_some() && time.settled == wall + 2 * SECOND);
        let (time, step) = watch.look(wall + 3 * SECOND, at + 3 * SECOND);
        assert_eq!((time, step), (Time::of(wall + 3 * SECOND), None));
    }

    #[test]
    fn a_clock_that_was_set_is_believed_when_it_stays_so() {
        let (wall, at) = start();
        let mut watch = Watch::new(wall, at);
        let set = wall + 60 * DAY;
        assert!(watch.look(set, at).1.is_some());
        let nearly = BELIEVED_AFTER - SECOND;
        let (time, step) = watch.look(set + nearly, at + nearly);
        assert_eq!((time.settled, step), (wall + nearly, None));
        let (time, step) = watch.look(set + BELIEVED_AFTER, at + BELIEVED_AFTER);
        assert_eq!((time, step), (Time::of(set + BELIEVED_AFTER), None));
    }

    /// The clock was ahead before the server was there to see it step.
    #[test]
    fn a_clock_that_is_ahead_at_a_start_is_believed_when_it_stays_so() {
        let (known, at) = start();
        let ahead = known + 60 * DAY;
        let (mut watch, step) = Watch::resume(Some(known), ahead, at);
        assert_eq!(step, Some(Step::Ahead(60 * DAY)));
        let (time, step) = watch.look(ahead + SECOND, at + SECOND);
        assert_eq!((time.settled, step), (known + SECOND, None));
        assert_eq!(time.now, ahead + SECOND);
        let nearly = BELIEVED_AFTER - SECOND;
        assert_eq!(
            watch.look(ahead + nearly, at + nearly).0.settled,
            known + nearly
        );
        let (time, step) = watch.look(ahead + BELIEVED_AFTER, at + BELIEVED_AFTER);
        assert_eq!((time, step), (Time::of(ahead + BELIEVED_AFTER), None));

        // Put right: so long no server ran.
        let (mut watch, _) = Watch::resume(Some(known), ahead, at);
        let right = known + DAY;
        let (time, step) = watch.look(right, at + SECOND);
        assert!(step.is_some() && time.settled == known + SECOND);
        let (time, _) = watch.look(right + BELIEVED_AFTER, at + SECOND + BELIEVED_AFTER);
        assert_eq!(time.settled, right + BELIEVED_AFTER);
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
            let (mut watch, step) = Watch::resume(settled, now, at);
            assert_eq!(step, None);
            assert_eq!(watch.look(now, at), (Time::of(now), None));
        }
        // Behind what was settled: nothing ends by it.
        let (mut watch, step) = Watch::resume(Some(now + DAY), now, at);
        assert_eq!(step, Some(Step::Back(DAY)));
        assert_eq!(watch.look(now, at).0.settled, now);
    }

    #[test]
    fn a_clock_that_is_set_back_ends_nothing_either() {
        let (wall, at) = start();
        let mut watch = Watch::new(wall, at);
        let (time, step) = watch.look(wall - 60 * DAY, at);
        assert_eq!(step, Some(Step::Back(60 * DAY)));
        assert_eq!(step.unwrap().to_string(), "1month 29days 13h 26m 24s back");
        assert_eq!(time.settled, wall - 60 * DAY);
    }

    #[test]
    fn things_are_forgotten_after_a_steady_day() {
        let (wall, at) = start();
        let mut watch = Watch::new(wall, at);
        let steady = |watch: &mut Watch, after| watch.look(wall + after, at + after).0.is_steady;
        assert!(!steady(&mut watch, STEADY - SECOND));
        assert!(steady(&mut watch, STEADY));
        // Slow as it is, a clock that is put right all the time is steady.
        for n in 1..1000 {
            let after = STEADY + 60 * n * SECOND;
            assert!(
                watch
                    .look(wall + after + n * SECOND, at + after)
                    .0
                    .is_steady
            );
        }
        watch.look(wall + 60 * DAY, at + 2 * DAY);
        let again = 3 * DAY - SECOND;
        assert!(
            !watch
                .look(wall + again + 1000 * SECOND, at + again)
                .0
                .is_steady
        );
    }
}
