//! The bound on what stopped readers may hold.
//!
//! A stream whose local socket takes nothing holds what the far side may send before it is read;
//! one that moves holds next to nothing. So the stalled ones are counted, and at the bound new dials
//! are refused. Living streams are never stalled for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Shared by all that a process relays.
#[derive(Clone, Debug)]
pub struct Budget {
    counts: Arc<Counts>,
    most: usize,
}

#[derive(Debug, Default)]
struct Counts {
    stalled: AtomicUsize,
    peak: AtomicUsize,
}

impl Budget {
    /// A budget of `bytes`, of which a stalled stream may hold `held`.
    pub fn new(bytes: u64, held: u32) -> Self {
        let most = usize::try_from(bytes / u64::from(held.max(1))).unwrap_or(usize::MAX);
        Self {
            counts: Arc::default(),
            most,
        }
    }

    /// Whether a new stream may be taken.
    pub fn has_room(&self) -> bool {
        self.stalled() < self.most
    }

    /// Streams whose local socket takes nothing at the moment.
    pub fn stalled(&self) -> usize {
        self.counts.stalled.load(Ordering::Relaxed)
    }

    /// The most streams that were stalled at once since it was last asked.
    pub fn take_peak(&self) -> usize {
        self.counts.peak.swap(self.stalled(), Ordering::Relaxed)
    }

    /// Counts a stalled stream until the guard is dropped.
    pub(super) fn stall(&self) -> Stalled<'_> {
        let before = self.counts.stalled.fetch_add(1, Ordering::Relaxed);
        self.counts.peak.fetch_max(before + 1, Ordering::Relaxed);
        Stalled(self)
    }
}

/// One stalled stream.
pub(super) struct Stalled<'a>(&'a Budget);

impl Drop for Stalled<'_> {
    fn drop(&mut self) {
        self.0.counts.stalled.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_returns_when_a_reader_goes_on() {
        let budget = Budget::new(1000, 600);
        let stalled = budget.stall();
        assert!(!budget.has_room());
        drop(stalled);
        assert!(budget.has_room());
    }

    #[test]
    fn a_peak_between_two_looks_is_seen_once() {
        let budget = Budget::new(1000, 1);
        let stalled = [budget.stall(), budget.stall()];
        drop(stalled);
        let _one = budget.stall();
        assert_eq!((budget.take_peak(), budget.take_peak()), (2, 1));
    }
}
