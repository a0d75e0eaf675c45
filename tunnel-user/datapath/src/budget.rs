//! The bound on the memory that peers can make a process hold.
//!
//! The charge covers data that has arrived and has not been passed on: unread bytes, bytes behind a
//! gap, and the cost of keeping them. A tunnel takes its charge before it keeps more, and ends its
//! largest stream where the budget refuses. So the process never holds more than the budget, whatever a
//! peer sends.
//!
//! The last quarter of a budget is for small holders. Large ones are refused from three quarters on, so
//! that a tunnel which takes all it can get leaves the others enough to go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Maximum size of a holder that may use the last quarter of a budget, in bytes.
const LITTLE: u64 = 256 << 10;

/// A bound on the bytes held for all peers of a process, or for some of them.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    used: AtomicU64,
    peak: AtomicU64,
    max: u64,
    stalled: AtomicUsize,
    /// The budget that this one is a part of.
    whole: Option<Budget>,
}

impl Budget {
    /// Creates a budget of `bytes`.
    pub fn new(bytes: u64) -> Self {
        Self::within(None, bytes)
    }

    /// Creates a part of this budget with a bound of its own: its charges count for both.
    pub fn part(&self, bytes: u64) -> Self {
        Self::within(Some(self.clone()), bytes)
    }

    fn within(whole: Option<Self>, max: u64) -> Self {
        Self(Arc::new(Counts {
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            max,
            stalled: AtomicUsize::new(0),
            whole,
        }))
    }

    /// Whether this bound admits a new stream.
    pub fn has_room(&self) -> bool {
        self.used() < self.most_for(u64::MAX)
    }

    /// Returns the number of charged bytes.
    pub fn used(&self) -> u64 {
        self.0.used.load(Ordering::Relaxed)
    }

    /// Returns the maximum number of bytes charged at once since the last call.
    pub fn take_peak(&self) -> u64 {
        self.0.peak.swap(self.used(), Ordering::Relaxed)
    }

    /// Returns the number of streams whose local socket takes nothing at the moment.
    pub fn stalled(&self) -> usize {
        self.0.stalled.load(Ordering::Relaxed)
    }

    /// Counts a stalled stream until the guard is dropped.
    pub(super) fn stall(&self) -> Stalled<'_> {
        for budget in self.with_whole() {
            budget.0.stalled.fetch_add(1, Ordering::Relaxed);
        }
        Stalled(self)
    }

    /// Returns how much of this budget a holder of `held` bytes may use.
    fn most_for(&self, held: u64) -> u64 {
        match self.0.max {
            max if held <= LITTLE => max,
            max => max - max / 4,
        }
    }

    /// Charges `bytes` more to a holder that then holds `held`. Charges nothing where any bound
    /// refuses.
    fn take(&self, bytes: u64, held: u64) -> bool {
        for (done, budget) in self.with_whole().enumerate() {
            let max = budget.most_for(held);
            let add = |used: u64| used.checked_add(bytes).filter(|used| *used <= max);
            let relaxed = Ordering::Relaxed;
            match budget.0.used.fetch_update(relaxed, relaxed, add) {
                Ok(before) => drop(budget.0.peak.fetch_max(before + bytes, relaxed)),
                Err(_) => {
                    self.with_whole().take(done).for_each(|it| it.put(bytes));
                    return false;
                }
            }
        }
        true
    }

    fn put(&self, bytes: u64) {
        self.0.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn with_whole(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |budget| budget.0.whole.as_ref())
    }
}

/// The count of one stalled stream.
pub(super) struct Stalled<'a>(&'a Budget);

impl Drop for Stalled<'_> {
    fn drop(&mut self) {
        for budget in self.0.with_whole() {
            budget.0.stalled.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Charge of one holder, given back on drop.
#[derive(Debug)]
pub struct Charge {
    budget: Budget,
    bytes: u64,
}

impl Charge {
    /// Creates an empty charge.
    pub fn new(budget: Budget) -> Self {
        Self { budget, bytes: 0 }
    }

    /// Returns the number of charged bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Replaces the charge by `bytes`. Returns `false` if the budget refuses; the charge stays then.
    pub fn set(&mut self, bytes: u64) -> bool {
        if let Some(more) = bytes.checked_sub(self.bytes)
            && more > 0
            && !self.budget.take(more, bytes)
        {
            return false;
        }
        let less = self.bytes.saturating_sub(bytes);
        if less > 0 {
            self.budget.with_whole().for_each(|it| it.put(less));
        }
        self.bytes = bytes;
        true
    }

    /// Moves the charge to `budget`, a part of the former one. Returns `false` if it refuses; nothing
    /// is charged then.
    pub fn move_to(&mut self, budget: &Budget) -> bool {
        let bytes = self.bytes;
        *self = Self::new(budget.clone());
        self.set(bytes)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_returns_when_a_charge_goes() {
        let budget = Budget::new(4000);
        let mut charge = Charge::new(budget.clone());
        assert!(charge.set(3500) && !charge.set(4001));
        assert_eq!((charge.bytes(), budget.used()), (3500, 3500));
        assert!(!budget.has_room());
        assert!(charge.set(100) && budget.has_room());
        drop(charge);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_part_counts_for_the_whole_but_not_for_another() {
        let whole = Budget::new(1000);
        let [one, other] = [400, 900].map(|bytes| Charge::new(whole.part(bytes)));
        let ([mut one, mut other], whole) = ([one, other], whole);
        assert!(one.set(400) && !one.set(401));
        // Refused by the whole: nothing is left charged to the part.
        assert!(!other.set(700));
        assert_eq!((other.budget.used(), whole.used()), (0, 400));
        assert!(other.set(600));
        drop(one);
        assert_eq!(whole.used(), 600);
    }

    #[test]
    fn the_last_quarter_is_for_holders_of_little() {
        let budget = Budget::new(4 << 20);
        let [mut much, mut little] = [(); 2].map(|()| Charge::new(budget.clone()));
        assert!(much.set(3 << 20) && !much.set((3 << 20) + 1));
        assert!(little.set(LITTLE) && !little.set(LITTLE + 1));
    }

    #[test]
    fn a_charge_moves_to_a_part() {
        let whole = Budget::new(1000);
        let mut charge = Charge::new(whole.clone());
        assert!(charge.set(300));
        assert!(charge.move_to(&whole.part(300)));
        assert_eq!(whole.used(), 300);
        assert!(!charge.move_to(&whole.part(200)));
        assert_eq!((charge.bytes(), whole.used()), (0, 0));
    }

    #[test]
    fn a_peak_between_two_looks_is_seen_once() {
        let budget = Budget::new(1000);
        let mut charge = Charge::new(budget.clone());
        assert!(charge.set(500) && charge.set(100));
        assert_eq!((budget.take_peak(), budget.take_peak()), (500, 100));
    }

    #[test]
    fn stalled_streams_count_for_the_whole() {
        let whole = Budget::new(1000);
        let part = whole.part(100);
        let stalled = part.stall();
        assert_eq!((part.stalled(), whole.stalled()), (1, 1));
        drop(stalled);
        assert_eq!(whole.stalled(), 0);
    }
}
