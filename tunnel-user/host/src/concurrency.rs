//! A bound on concurrent work, on one thread or on all shards of a process.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bit in the count of a closed limit.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// A bound on concurrent work. Clones share it.
#[derive(Clone, Debug)]
pub struct ConcurrencyLimit {
    in_use: Arc<AtomicUsize>,
    max: usize,
}

/// The permit for one unit of work. Dropping it returns the unit.
#[derive(Debug)]
pub struct Permit(Arc<AtomicUsize>);

impl ConcurrencyLimit {
    /// Creates a limit for `max` units at once.
    pub fn new(max: usize) -> Self {
        Self {
            in_use: Arc::default(),
            max,
        }
    }

    /// Takes a permit. Returns `None` at the bound, and once the limit is closed.
    pub fn acquire(&self) -> Option<Permit> {
        let before = self.in_use.fetch_add(1, Ordering::Relaxed);
        // A permit above the bound is dropped at once: meanwhile another caller may be refused, but
        // never one too many gets a permit.
        let permit = Permit(self.in_use.clone());
        (before < self.max && before & CLOSED == 0).then_some(permit)
    }

    /// Returns the number of permits in use.
    pub fn in_use(&self) -> usize {
        self.in_use.load(Ordering::Relaxed) & !CLOSED
    }

    /// Closes the limit permanently if no permit is in use. Returns whether the limit is closed:
    /// then no work is under way, and none will start.
    pub fn close_if_empty(&self) -> bool {
        let order = (Ordering::Acquire, Ordering::Relaxed);
        let closed = self.in_use.compare_exchange(0, CLOSED, order.0, order.1);
        closed.is_ok() || self.is_closed()
    }

    /// Whether the limit is closed.
    pub fn is_closed(&self) -> bool {
        self.in_use.load(Ordering::Relaxed) & CLOSED != 0
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        // A thread that sees the permit returned also sees the work of its holder.
        self.0.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_when_its_holder_leaves() {
        let limit = ConcurrencyLimit::new(1);
        let permit = limit.acquire().unwrap();
        assert!(limit.acquire().is_none());
        drop(permit);
        assert_eq!(limit.in_use(), 0);
        assert!(limit.acquire().is_some());
    }

    #[test]
    fn an_empty_limit_can_be_closed_for_good() {
        let limit = ConcurrencyLimit::new(usize::MAX);
        let permit = limit.acquire().unwrap();
        assert!(!limit.close_if_empty());
        let other = limit.clone().acquire().unwrap();
        drop((permit, other));
        assert!(limit.close_if_empty() && limit.close_if_empty() && limit.is_closed());
        assert!(limit.acquire().is_none());
        assert_eq!(limit.in_use(), 0);
    }

    #[test]
    fn threads_share_the_bound() {
        let limit = ConcurrencyLimit::new(3);
        let permits = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| limit.acquire())).collect();
            let permits = threads.into_iter().map(|thread| thread.join().unwrap());
            permits.flatten().collect::<Vec<_>>()
        });
        assert!((1..=3).contains(&permits.len()));
        assert_eq!(limit.in_use(), permits.len());
    }
}
