//! Backoff between retries.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

/// Shortest delay, which doubles from here.
const MIN_DELAY: Duration = Duration::from_millis(200);

/// Half of the longest delay: jitter adds up to as much, so that clients that failed together don't
/// retry together.
const MAX_BASE_DELAY: Duration = Duration::from_secs(5);

/// The delays of one run of failures.
#[derive(Debug)]
pub(super) struct Delays(<ExponentialBuilder as BackoffBuilder>::Backoff);

impl Default for Delays {
    fn default() -> Self {
        let delays = ExponentialBuilder::new()
            .with_min_delay(MIN_DELAY)
            .with_max_delay(MAX_BASE_DELAY)
            .without_max_times()
            .with_jitter();
        Self(delays.build())
    }
}

impl Delays {
    /// Returns the delay after one more failure.
    pub(super) fn next(&mut self) -> Duration {
        self.0.next().unwrap_or(MAX_BASE_DELAY)
    }
}

/// Returns a random time between `shortest` and twice that, for work that many do after the same event.
pub(super) fn jittered(shortest: Duration) -> Duration {
    let delays = ExponentialBuilder::new().with_min_delay(shortest);
    delays.with_jitter().build().next().unwrap_or(shortest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_a_bound_and_differ() {
        let mut delays = Delays::default();
        let first = delays.next();
        assert!((MIN_DELAY..2 * MIN_DELAY).contains(&first), "{first:?}");
        let later: Vec<_> = (0..20).map(|_| delays.next()).skip(10).collect();
        assert!(
            later
                .iter()
                .all(|d| (MAX_BASE_DELAY..2 * MAX_BASE_DELAY).contains(d)),
            "{later:?}"
        );
        assert!(later.windows(2).any(|d| d[0] != d[1]), "{later:?}");
    }
}
