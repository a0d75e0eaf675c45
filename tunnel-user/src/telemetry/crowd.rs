//! What many do is said of the first few, and how many there were: nobody fills a log from afar.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Events of one kind: up to `most` are said in each `interval`. For any thread.
#[derive(Debug)]
pub struct Crowd {
    most: u32,
    interval: Duration,
    counts: Mutex<Counts>,
}

#[derive(Debug)]
struct Counts {
    since: Option<Instant>,
    said: u32,
    unsaid: u64,
}

impl Crowd {
    /// None yet.
    pub const fn new(most: u32, interval: Duration) -> Self {
        let counts = Counts {
            since: None,
            said: 0,
            unsaid: 0,
        };
        Self {
            most,
            interval,
            counts: Mutex::new(counts),
        }
    }

    /// Whether one more is said: then how many were not since the last that was.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = |since| now.saturating_duration_since(since) >= self.interval;
        if counts.since.is_none_or(is_over) {
            (counts.since, counts.said) = (Some(now), 0);
        }
        if counts.said == self.most {
            counts.unsaid += 1;
            return None;
        }
        counts.said += 1;
        Some(std::mem::take(&mut counts.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_counted() {
        let interval = Duration::from_secs(60);
        let crowd = Crowd::new(3, interval);
        let start = Instant::now();
        let said = (0..8).filter_map(|_| crowd.admit(start));
        assert_eq!(said.collect::<Vec<_>>(), [0; 3]);
        assert_eq!(crowd.admit(start + interval), Some(5));
        assert_eq!(crowd.admit(start + interval), Some(0));
    }
}
