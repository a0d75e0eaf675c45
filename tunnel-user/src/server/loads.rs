//! How many tunnels each shard has, so that newcomers go where there are fewest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Tunnels by shard, those on their way included. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Loads(Arc<[AtomicUsize]>);

/// A tunnel that counts on its shard until this is dropped.
#[derive(Debug)]
pub(super) struct Counted {
    loads: Loads,
    shard: usize,
}

impl Loads {
    /// Of `shards` that serve tunnels.
    pub(super) fn new(shards: usize) -> Self {
        Self((0..shards).map(|_| AtomicUsize::new(0)).collect())
    }

    /// Counts a tunnel on `shard`.
    pub(super) fn enter(&self, shard: usize) -> Counted {
        if let Some(load) = self.0.get(shard) {
            load.fetch_add(1, Ordering::Relaxed);
        }
        Counted {
            loads: self.clone(),
            shard,
        }
    }

    /// The shard with the fewest tunnels, if it has fewer than `shard`.
    pub(super) fn lighter(&self, shard: usize) -> Option<usize> {
        let load = |of: &AtomicUsize| of.load(Ordering::Relaxed);
        let own = load(self.0.get(shard)?);
        let loads = self.0.iter().map(load).enumerate();
        let (lightest, least) = loads.min_by_key(|(_, load)| *load)?;
        (least < own).then_some(lightest)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(load) = self.loads.0.get(self.shard) {
            load.fetch_sub(1, Ordering::Relaxed);
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
            let mut counted: Vec<Counted> = Vec::new();
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
}
