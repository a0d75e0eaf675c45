//! Slots for connections of unauthenticated peers, shared by source. Sans-IO.
//!
//! Every new connection is admitted. Without free slot the oldest connection of the source with the
//! most connections is evicted. So one network, however many connections it holds, keeps no other out.
//! Loopback, where probes and operators come from, keeps a part that others can't take.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Divisor: the part of all slots that only loopback may take from loopback.
const LOOPBACK_PART: usize = 4;

/// Source of a connection: the /24 of IPv4, the /56 of IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    Loopback,
    Network(IpAddr),
}

/// The place of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotId {
    source: Source,
    number: u64,
}

/// Slots for `max` connections.
#[derive(Debug)]
pub struct ConnectionSlots {
    max: usize,
    in_use: usize,
    last: u64,
    /// Connections of each source, the oldest first.
    sources: HashMap<Source, VecDeque<u64>>,
}

impl ConnectionSlots {
    /// Creates slots for `max` connections, at least 1.
    pub fn new(max: usize) -> Self {
        Self {
            max: max.max(1),
            in_use: 0,
            last: 0,
            sources: HashMap::new(),
        }
    }

    /// Admits a connection. Returns its slot and, if it replaces a connection, the slot of that
    /// one, which is free already.
    pub fn acquire(&mut self, address: IpAddr) -> (SlotId, Option<SlotId>) {
        let source = source(address);
        let evicted = if self.in_use < self.max {
            None
        } else {
            self.largest(source).and_then(|largest| self.evict(largest))
        };
        self.last += 1;
        self.in_use += 1;
        self.sources.entry(source).or_default().push_back(self.last);
        let number = self.last;
        (SlotId { source, number }, evicted)
    }

    /// Forgets a connection that has ended. An evicted one has no effect.
    pub fn release(&mut self, slot: SlotId) {
        let Some(own) = self.sources.get_mut(&slot.source) else {
            return;
        };
        if let Ok(at) = own.binary_search(&slot.number) {
            own.remove(at);
            self.in_use -= 1;
        }
        if own.is_empty() {
            self.sources.remove(&slot.source);
        }
    }

    /// Returns the source that loses a connection to `newcomer`: the one with the most connections,
    /// and among equals the one with the oldest connection.
    fn largest(&self, newcomer: Source) -> Option<Source> {
        let reserved = self.max.div_ceil(LOOPBACK_PART);
        let may_go = |source: Source, held: usize| {
            source != Source::Loopback || newcomer == Source::Loopback || held > reserved
        };
        let candidates = self
            .sources
            .iter()
            .filter(|(source, own)| may_go(**source, own.len()));
        // The oldest connection has the lowest number.
        let largest = candidates.max_by_key(|(_, own)| {
            let oldest = own.front().copied().unwrap_or_default();
            (own.len(), std::cmp::Reverse(oldest))
        });
        largest.map(|(source, _)| *source)
    }

    fn evict(&mut self, source: Source) -> Option<SlotId> {
        let number = *self.sources.get(&source)?.front()?;
        let slot = SlotId { source, number };
        self.release(slot);
        Some(slot)
    }
}

fn source(address: IpAddr) -> Source {
    match address.to_canonical() {
        address if address.is_loopback() => Source::Loopback,
        IpAddr::V4(v4) => {
            Source::Network(Ipv4Addr::from_bits(v4.to_bits() & (u32::MAX << 8)).into())
        }
        IpAddr::V6(v6) => {
            Source::Network(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 72)).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn fill(slots: &mut ConnectionSlots, address: &str, count: usize) -> Vec<SlotId> {
        (0..count).map(|_| slots.acquire(ip(address)).0).collect()
    }

    #[test]
    fn who_has_the_most_gives_way_and_the_oldest_first() {
        let mut slots = ConnectionSlots::new(8);
        let few = fill(&mut slots, "192.0.2.1", 2);
        let many = fill(&mut slots, "198.51.100.1", 6);
        for oldest in &many[..4] {
            assert_eq!(slots.acquire(ip("203.0.113.1")).1, Some(*oldest));
        }
        // Two, two and four: those who came last have the most now.
        let evicted = slots.acquire(ip("198.51.100.1")).1.unwrap();
        assert_eq!(evicted.source, source(ip("203.0.113.1")));
        assert!(!few.contains(&evicted));
        assert_eq!(slots.in_use, 8);
    }

    #[test]
    fn a_network_is_one_source_whatever_its_addresses() {
        let mut slots = ConnectionSlots::new(4);
        fill(&mut slots, "192.0.2.1", 1);
        for n in 2..200 {
            let address = ip(&format!("198.51.100.{n}"));
            let evicted = slots.acquire(address).1;
            assert!(evicted.is_none_or(|gone| gone.source == source(address)));
        }
        let v6 = source(ip("2001:db8:0:12ff::1"));
        assert_eq!(v6, source(ip("2001:db8:0:1201:2::9")));
        assert_ne!(v6, source(ip("2001:db8:0:1300::1")));
        assert_eq!(source(ip("::ffff:192.0.2.9")), source(ip("192.0.2.7")));
    }

    #[test]
    fn loopback_keeps_a_part_against_many_networks() {
        let mut slots = ConnectionSlots::new(8);
        let own = fill(&mut slots, "127.0.0.1", 2);
        for n in 0..100 {
            let evicted = slots.acquire(ip(&format!("10.0.{n}.1"))).1;
            assert!(evicted.is_none_or(|gone| !own.contains(&gone)));
        }
        assert!(slots.acquire(ip("::1")).1.is_some(), "it always comes in");
        // Beyond its reserved part loopback is a source like any other.
        let mut slots = ConnectionSlots::new(8);
        let own = fill(&mut slots, "127.0.0.1", 8);
        assert_eq!(slots.acquire(ip("10.0.0.1")).1, Some(own[0]));
    }

    #[test]
    fn a_slot_is_free_again_when_its_connection_ends() {
        let mut slots = ConnectionSlots::new(2);
        let ids = fill(&mut slots, "192.0.2.1", 2);
        slots.release(ids[0]);
        slots.release(ids[0]);
        assert_eq!(slots.acquire(ip("192.0.2.1")).1, None);
        assert_eq!(slots.acquire(ip("192.0.2.1")).1, Some(ids[1]));
        slots.release(ids[1]);
        assert_eq!(slots.in_use, 2);
    }
}
