//! Number of tunnels of each shard, so that newcomers go to the shard with the fewest.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cpc_host::concurrency::{ConcurrencyLimit, Permit};

/// Tunnels by shard, including those on their way. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Loads(Arc<[Load]>);

/// Tunnels of a shard.
#[derive(Debug, Default)]
struct Load {
    tunnels: AtomicUsize,
    expected: Mutex<Expected>,
}

/// Newcomers that were sent to a shard.
#[derive(Debug, Default)]
struct Expected {
    /// Newcomers that have neither come nor expired.
    waiting: usize,
    /// Newcomers that have come, whose time has not expired.
    early: usize,
}

/// A tunnel, counted on its shard until dropped.
#[derive(Debug)]
pub(super) struct LoadPermit {
    loads: Loads,
    shard: usize,
}

/// A newcomer that was sent to another shard, counted there until it comes, or this is dropped.
#[derive(Debug)]
pub(super) struct ReservedLoad {
    loads: Loads,
    shard: usize,
    _under_way: Permit,
}

impl ReservedLoad {
    /// Returns the shard that it was sent to.
    pub(super) fn shard(&self) -> usize {
        self.shard
    }
}

impl Loads {
    /// Creates the counters of `shards`.
    pub(super) fn new(shards: usize) -> Self {
        Self((0..shards).map(|_| Load::default()).collect())
    }

    /// Counts a tunnel on `shard`.
    pub(super) fn enter(&self, shard: usize) -> LoadPermit {
        if let Some(load) = self.0.get(shard) {
            load.tunnels.fetch_add(1, Ordering::Relaxed);
        }
        LoadPermit {
            loads: self.clone(),
            shard,
        }
    }

    /// Moves a newcomer from `shard` to the one with the fewest tunnels, if that has fewer, and counts
    /// it there. `under_way` bounds the newcomers that have not arrived: beyond it newcomers stay.
    pub(super) fn move_from(
        &self,
        shard: usize,
        under_way: &ConcurrencyLimit,
    ) -> Option<ReservedLoad> {
        let at = self.lighter(shard)?;
        let _under_way = under_way.acquire()?;
        self.0.get(at)?.expected().waiting += 1;
        Some(ReservedLoad {
            loads: self.clone(),
            shard: at,
            _under_way,
        })
    }

    /// Notes that a newcomer has come to `shard`, to which it was sent.
    pub(super) fn arrived(&self, shard: usize) {
        let Some(load) = self.0.get(shard) else {
            return;
        };
        let mut expected = load.expected();
        // None is waiting for one that comes too late.
        if expected.waiting > 0 {
            expected.waiting -= 1;
            expected.early += 1;
        }
    }

    fn lighter(&self, shard: usize) -> Option<usize> {
        let own = self.0.get(shard)?.all();
        let loads = self.0.iter().map(Load::all).enumerate();
        let (lightest, least) = loads.min_by_key(|(_, load)| *load)?;
        (least < own).then_some(lightest)
    }
}

impl Load {
    fn all(&self) -> usize {
        self.tunnels.load(Ordering::Relaxed) + self.expected().waiting
    }

    fn expected(&self) -> MutexGuard<'_, Expected> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LoadPermit {
    fn drop(&mut self) {
        if let Some(load) = self.loads.0.get(self.shard) {
            load.tunnels.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for ReservedLoad {
    fn drop(&mut self) {
        if let Some(load) = self.loads.0.get(self.shard) {
            let mut expected = load.expected();
            // They wait equally long: the number of those that still wait is right, whichever came.
            match expected.early {
                0 => expected.waiting = expected.waiting.saturating_sub(1),
                early => expected.early = early - 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wherever they arrive, no shard has two tunnels more than another.
    #[test]
    fn tunnels_are_spread_evenly_wherever_they_arrive() {
        for arrivals in [[0; 12], [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2], [2; 12]] {
            let loads = Loads::new(3);
            let mut counted: Vec<LoadPermit> = Vec::new();
            for (n, at) in arrivals.into_iter().enumerate() {
                let shard = loads.lighter(at).unwrap_or(at);
                counted.push(loads.enter(shard));
                let on = |shard| counted.iter().filter(|c| c.shard == shard).count();
                let each = [on(0), on(1), on(2)];
                let apart = each.iter().max().unwrap() - each.iter().min().unwrap();
                assert!(apart <= 1, "{each:?} after {n} of {arrivals:?}");
            }
        }
    }

    /// Newcomers come to the shard that they were sent to a round trip later.
    #[test]
    fn newcomers_that_arrive_at_once_are_spread_up_to_a_bound() {
        let (loads, under_way) = (Loads::new(4), ConcurrencyLimit::new(40));
        let here: Vec<_> = (0..40).map(|_| loads.enter(0)).collect();
        let mut moved: Vec<_> = (0..30)
            .map(|_| loads.move_from(0, &under_way).unwrap())
            .collect();
        for shard in 1..4 {
            assert_eq!(moved.iter().filter(|it| it.shard() == shard).count(), 10);
        }
        moved.extend((0..10).map(|_| loads.move_from(0, &under_way).unwrap()));
        assert!(loads.move_from(0, &under_way).is_none(), "the bound");
        drop(moved);
        assert_eq!(loads.move_from(0, &under_way).unwrap().shard(), 1);
        drop(here);
        assert!(loads.move_from(0, &under_way).is_none(), "all are alike");
    }

    #[test]
    fn places_are_free_again() {
        let loads = Loads::new(2);
        let first = loads.enter(0);
        assert_eq!(loads.lighter(0), Some(1));
        assert_eq!(loads.lighter(1), None);
        drop(first);
        assert_eq!(loads.lighter(0), None);
        // One shard serves all tunnels.
        assert_eq!(Loads::new(1).lighter(0), None);
        assert_eq!(Loads::new(1).lighter(5), None);
    }

    /// Replaces the reservation by the tunnel.
    #[test]
    fn a_newcomer_that_has_come_counts_once() {
        let (loads, under_way) = (Loads::new(2), ConcurrencyLimit::new(10));
        let _here = loads.enter(0);
        let sent = loads.move_from(0, &under_way).unwrap();
        assert_eq!(sent.shard(), 1);
        loads.arrived(1);
        let there = loads.enter(1);
        assert_eq!(loads.0[1].all(), 1);
        drop(there);
        assert_eq!(loads.0[1].all(), 0);
        // One that is late takes nothing from another one.
        let other = loads.move_from(0, &under_way).unwrap();
        drop(sent);
        assert_eq!(loads.0[1].all(), 1);
        drop(other);
        loads.arrived(1);
        assert_eq!(loads.0[1].all(), 0);
    }
}
