//! A bound on concurrent work, on one thread or on all shards of a process.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bit in the count of a closed gate.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// A bound on concurrent work. Clones share it.
#[derive(Clone, Debug)]
pub struct Gate {
    inside: Arc<AtomicUsize>,
    most: usize,
}

/// The permit for one unit of work. Dropping it returns the unit.
#[derive(Debug)]
pub struct Entered(Arc<AtomicUsize>);

impl Gate {
    /// Creates a gate for `most` units at once.
    pub fn new(most: usize) -> Self {
        Self {
            inside: Arc::default(),
            most,
        }
    }

    /// Takes a permit. Returns `None` at the bound, and once the gate is closed.
    pub fn enter(&self) -> Option<Entered> {
        let before = self.inside.fetch_add(1, Ordering::Relaxed);
        // Leaves again when it is dropped: others may be refused meanwhile, but never one too many
        // let in.
        let entered = Entered(self.inside.clone());
        (before < self.most && before & CLOSED == 0).then_some(entered)
    }

    /// Returns the number of permits in use.
    pub fn inside(&self) -> usize {
        self.inside.load(Ordering::Relaxed) & !CLOSED
    }

    /// Closes the gate for good if no permit is in use. Returns whether the gate is closed: then
    /// nothing is under way, and nothing will be.
    pub fn close_if_empty(&self) -> bool {
        let order = (Ordering::Acquire, Ordering::Relaxed);
        let closed = self.inside.compare_exchange(0, CLOSED, order.0, order.1);
        closed.is_ok() || self.is_closed()
    }

    /// Whether the gate is closed.
    pub fn is_closed(&self) -> bool {
        self.inside.load(Ordering::Relaxed) & CLOSED != 0
    }
}

impl Drop for Entered {
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
        let gate = Gate::new(1);
        let entered = gate.enter().unwrap();
        assert!(gate.enter().is_none());
        drop(entered);
        assert_eq!(gate.inside(), 0);
        assert!(gate.enter().is_some());
    }

    #[test]
    fn an_empty_gate_can_be_closed_for_good() {
        let gate = Gate::new(usize::MAX);
        let entered = gate.enter().unwrap();
        assert!(!gate.close_if_empty());
        let other = gate.clone().enter().unwrap();
        drop((entered, other));
        assert!(gate.close_if_empty() && gate.close_if_empty() && gate.is_closed());
        assert!(gate.enter().is_none());
        assert_eq!(gate.inside(), 0);
    }

    #[test]
    fn threads_share_the_bound() {
        let gate = Gate::new(3);
        let entered = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| gate.enter())).collect();
            let entered = threads.into_iter().map(|thread| thread.join().unwrap());
            entered.flatten().collect::<Vec<_>>()
        });
        assert!((1..=3).contains(&entered.len()));
        assert_eq!(gate.inside(), entered.len());
    }
}
