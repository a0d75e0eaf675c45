//! Who may begin a handshake at a port: bounds by where strangers come from.
//!
//! A handshake costs CPU and a place before anybody is known. So each source, a prefix of addresses,
//! has a bucket of handshakes that fills at a steady rate, and of the places that are left no source
//! takes more than it leaves to others. Sources are not remembered one by one: two keyed hashes lead
//! each to two of `SLOTS` counters, and the lower one counts. So memory is bounded whoever comes, and
//! a crowd hurts only those with whom it shares both, which nobody can choose.
//!
//! Without locks, for all threads; time is an argument.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// Counters of a port, 16 bytes each.
const SLOTS: usize = 4096;

/// Of all places, the part up to which nobody has to prove his address.
const UNPROVEN: usize = 16;

/// Bounds on handshakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Under way at once, from everywhere.
    pub at_once: usize,
    /// Of a source in the long run, more than 0.
    pub per_second: u32,
    /// Of a source that has long been quiet, more than 0.
    pub burst: u32,
    /// Length of the prefix that is a source of IPv4, 32 at most.
    pub ipv4_prefix: u8,
    /// Length of the prefix that is a source of IPv6, 128 at most.
    pub ipv6_prefix: u8,
}

/// Handshakes of one port. Clones share it.
#[derive(Clone, Debug)]
pub struct Sources(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    bounds: Bounds,
    /// What one handshake takes out of a bucket, in nanoseconds.
    period: u64,
    began: Instant,
    hashes: [RandomState; 2],
    slots: Box<[Slot]>,
    inside: AtomicUsize,
}

#[derive(Debug, Default)]
struct Slot {
    /// When the bucket will be full again, in nanoseconds since the beginning: the "theoretical
    /// arrival time" of the generic cell rate algorithm (ITU-T I.371).
    full_at: AtomicU64,
    inside: AtomicU32,
}

/// What is to be done with a stranger.
#[derive(Debug)]
pub enum Verdict {
    /// Go on.
    Enter(Place),
    /// Have him prove his address first.
    Prove,
    /// Send him away.
    Refuse(Crowded),
}

/// Why a stranger is sent away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Crowded {
    /// All places are taken.
    #[error("as many handshakes are under way as may be (limits.handshakes.at_once)")]
    Full,
    /// His source has as many places as are left for others.
    #[error("its network has its share of handshakes under way (limits.handshakes.at_once)")]
    Share,
    /// The bucket of his source is empty.
    #[error("its network begins too many handshakes (limits.handshakes.per_second, burst)")]
    Rate,
}

/// A handshake that is under way until this is dropped.
#[derive(Debug)]
pub struct Place {
    of: Arc<Shared>,
    slots: [u16; 2],
}

impl Sources {
    /// Nobody has come yet.
    pub fn new(bounds: Bounds, now: Instant) -> Self {
        Self(Arc::new(Shared {
            bounds,
            period: 1_000_000_000 / u64::from(bounds.per_second.max(1)),
            began: now,
            hashes: [RandomState::new(), RandomState::new()],
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            inside: AtomicUsize::new(0),
        }))
    }

    /// What to do with a stranger at `address`, which he has proven or not. Whoever has not can take
    /// half of a bucket at most: the other half is for those who have, since anybody can come with
    /// somebody else's address.
    ///
    /// Takes nothing out of the bucket: see [`Place::charge`].
    pub fn judge(&self, address: IpAddr, is_proven: bool, now: Instant) -> Verdict {
        let shared = &self.0;
        let slots = shared.slots_of(address);
        let room = shared.period * u64::from(shared.bounds.burst);
        let inside = shared.inside.load(Ordering::Relaxed);
        let free = shared.bounds.at_once.saturating_sub(inside);
        let crowded = if free == 0 {
            Some(Crowded::Full)
        } else if shared.inside_of(slots) >= free {
            Some(Crowded::Share)
        } else if shared.taken(slots, now) + shared.period > room {
            Some(Crowded::Rate)
        } else {
            None
        };
        if !is_proven {
            let is_busy = inside >= shared.bounds.at_once / UNPROVEN;
            if crowded.is_some() || is_busy || shared.taken(slots, now) + shared.period > room / 2 {
                return Verdict::Prove;
            }
        }
        match crowded {
            Some(why) => Verdict::Refuse(why),
            None => Verdict::Enter(Place::take(shared.clone(), slots)),
        }
    }

    /// Handshakes under way.
    pub fn inside(&self) -> usize {
        self.0.inside.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn slots_of(&self, address: IpAddr) -> [u16; 2] {
        let source = source(address, &self.bounds);
        // Below SLOTS.
        let slot = |hash: &RandomState| (hash.hash_one(source) % SLOTS as u64) as u16;
        [slot(&self.hashes[0]), slot(&self.hashes[1])]
    }

    fn slot(&self, index: u16) -> &Slot {
        &self.slots[usize::from(index)]
    }

    /// How many a source has under way, or more where it shares both counters.
    fn inside_of(&self, slots: [u16; 2]) -> usize {
        let [a, b] = slots.map(|slot| self.slot(slot).inside.load(Ordering::Relaxed));
        a.min(b) as usize
    }

    /// When the bucket of a source will be full again, or later where it shares both.
    fn full_at(&self, slots: [u16; 2]) -> u64 {
        let [a, b] = slots.map(|slot| self.slot(slot).full_at.load(Ordering::Relaxed));
        a.min(b)
    }

    /// What is missing from it, in nanoseconds.
    fn taken(&self, slots: [u16; 2], now: Instant) -> u64 {
        self.full_at(slots).saturating_sub(self.since(now))
    }

    fn since(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.began);
        // After 584 years.
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX / 2)
    }
}

impl Place {
    fn take(of: Arc<Shared>, slots: [u16; 2]) -> Self {
        of.inside.fetch_add(1, Ordering::Relaxed);
        for slot in slots {
            of.slot(slot).inside.fetch_add(1, Ordering::Relaxed);
        }
        Self { of, slots }
    }

    /// Takes this handshake out of the bucket of its source: before it begins, or where those who
    /// have a certificate may come as often as they like, once it has failed.
    pub fn charge(&self, now: Instant) {
        let (of, slots) = (&self.of, self.slots);
        let full_at = of.full_at(slots).max(of.since(now)) + of.period;
        // No higher than this source needs it: others may share one of the two.
        for slot in slots {
            of.slot(slot).full_at.fetch_max(full_at, Ordering::Relaxed);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for slot in self.slots {
            self.of.slot(slot).inside.fetch_sub(1, Ordering::Relaxed);
        }
        self.of.inside.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The prefix that an address counts for. IPv4 is the same in both families' clothes.
fn source(address: IpAddr, bounds: &Bounds) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let gone = 32_u32.saturating_sub(bounds.ipv4_prefix.into());
            let mask = u32::MAX.checked_shl(gone).unwrap_or(0);
            Ipv4Addr::from_bits(v4.to_bits() & mask).into()
        }
        IpAddr::V6(v6) => {
            let gone = 128_u32.saturating_sub(bounds.ipv6_prefix.into());
            let mask = u128::MAX.checked_shl(gone).unwrap_or(0);
            Ipv6Addr::from_bits(v6.to_bits() & mask).into()
        }
    }
}

#[cfg(test)]
mod tests;
