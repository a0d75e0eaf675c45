//! The bound on what stopped readers may hold.
//!
//! A stream whose local socket takes nothing holds what the far side may send before it is read;
//! one that moves holds next to nothing. So the stalled ones are counted, and at the bound new dials
//! are refused. Living streams are never stalled for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Shared by all that a process relays, or by a part of that.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    stalled: AtomicUsize,
    peak: AtomicUsize,
    most: usize,
    /// What this is a part of.
    whole: Option<Budget>,
}

impl Budget {
    /// A budget of `bytes`, of which a stalled stream may hold `held`.
    pub fn new(bytes: u64, held: u32) -> Self {
        Self::within(None, bytes, held)
    }

    /// A part of this budget with a bound of its own: what stalls there counts for both.
    pub fn part(&self, bytes: u64, held: u32) -> Self {
        Self::within(Some(self.clone()), bytes, held)
    }

    fn within(whole: Option<Self>, bytes: u64, held: u32) -> Self {
        Self(Arc::new(Counts {
            stalled: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            most: usize::try_from(bytes / u64::from(held.max(1))).unwrap_or(usize::MAX),
            whole,
        }))
    }

    /// Whether a new stream may be taken, as far as this bound goes.
    pub fn has_room(&self) -> bool {
        self.stalled() < self.0.most
    }

    /// Streams whose local socket takes nothing at the moment.
    pub fn stalled(&self) -> usize {
        self.0.stalled.load(Ordering::Relaxed)
    }

    /// The most streams that were stalled at once since it was last asked.
    pub fn take_peak(&self) -> usize {
        self.0.peak.swap(self.stalled(), Ordering::Relaxed)
    }

    /// Counts a stalled stream until the guard is dropped.
    pub(super) fn stall(&self) -> Stalled<'_> {
        for budget in self.with_whole() {
            let before = budget.0.stalled.fetch_add(1, Ordering::Relaxed);
            budget.0.peak.fetch_max(before + 1, Ordering::Relaxed);
        }
        Stalled(self)
    }

    fn with_whole(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |budget| budget.0.whole.as_ref())
    }
}

/// One stalled stream.
pub(super) struct Stalled<'a>(&'a Budget);

impl Drop for Stalled<'_> {
    fn drop(&mut self) {
        for budget in self.0.with_whole() {
            budget.0.stalled.fetch_sub(1, Ordering::Relaxed);
        }
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
    fn a_part_counts_for_the_whole_but_not_for_another() {
        let whole = Budget::new(1000, 400);
        let [one, other] = [whole.part(400, 400), whole.part(400, 400)];
        let stalled = one.stall();
        assert!(!one.has_room());
        assert!(whole.has_room() && other.has_room());
        assert_eq!(whole.stalled(), 1);
        drop(stalled);
        assert!(one.has_room());
        assert_eq!(whole.stalled(), 0);
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
