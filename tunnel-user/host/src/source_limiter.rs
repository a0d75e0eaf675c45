//! Bounds on the handshakes at a port, by source.
//!
//! A handshake costs CPU and a place before the peer is known. So each source, a prefix of addresses,
//! has a bucket of handshakes that fills at a steady rate, and no source takes more of the free places
//! than it leaves to others. Memory is bounded: two keyed hashes map each source to two of `SLOTS`
//! counters, and the lower one counts. A flood affects only the sources that share both counters with
//! it, which no peer can choose.
//!
//! Lock-free and shared by all threads; time is an argument.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// Number of counters of a port, 16 bytes each.
const SLOTS: usize = 4096;

/// Divisor: up to this part of all places, peers need not prove their address.
const UNPROVEN: usize = 16;

/// Bounds on handshakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Maximum number of concurrent handshakes, of all sources.
    pub at_once: usize,
    /// Long-term rate of one source, more than 0.
    pub per_second: u32,
    /// Burst of a source that was quiet before, more than 0.
    pub burst: u32,
    /// Length of the prefix of an IPv4 source, 32 at most.
    pub ipv4_prefix: u8,
    /// Length of the prefix of an IPv6 source, 128 at most.
    pub ipv6_prefix: u8,
}

/// Limiter of the handshakes of one port. Clones share it.
#[derive(Clone, Debug)]
pub struct SourceLimiter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    bounds: Bounds,
    /// Cost of one handshake in a bucket, in nanoseconds.
    period: u64,
    started: Instant,
    hashes: [RandomState; 2],
    slots: Box<[Slot]>,
    in_use: AtomicUsize,
}

#[derive(Debug, Default)]
struct Slot {
    /// Time at which the bucket will be full, in nanoseconds since the beginning: the "theoretical
    /// arrival time" of the generic cell rate algorithm (ITU-T I.371).
    full_at: AtomicU64,
    in_use: AtomicU32,
}

/// Decision about an unauthenticated peer.
#[derive(Debug)]
pub enum Verdict {
    /// The peer may begin its handshake.
    Enter(HandshakePermit),
    /// The peer must prove its address first.
    Prove,
    /// The peer is refused.
    Refuse(Overload),
}

/// Reason of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Overload {
    /// All slots are in use.
    #[error("too many handshakes are under way (limits.handshakes.at_once)")]
    Full,
    /// The source uses as many places as it leaves for other sources.
    #[error("the peer's network has its share of handshakes under way (limits.handshakes.at_once)")]
    Share,
    /// The bucket of the source is empty.
    #[error("the peer's network begins too many handshakes (limits.handshakes.per_second, burst)")]
    Rate,
}

/// The permit for one handshake, until dropped.
#[derive(Debug)]
pub struct HandshakePermit {
    of: Arc<Shared>,
    slots: [u16; 2],
}

impl SourceLimiter {
    /// Creates a limiter without handshakes.
    pub fn new(bounds: Bounds, now: Instant) -> Self {
        Self(Arc::new(Shared {
            bounds,
            period: 1_000_000_000 / u64::from(bounds.per_second.max(1)),
            started: now,
            hashes: [RandomState::new(), RandomState::new()],
            slots: (0..SLOTS).map(|_| Slot::default()).collect(),
            in_use: AtomicUsize::new(0),
        }))
    }

    /// Decides about a peer at `address`, which the peer has proven or not. Unproven peers take at most
    /// half of a bucket. The other half is for proven ones, because any peer can send from another's
    /// address.
    ///
    /// Takes nothing out of the bucket: see [`HandshakePermit::charge`].
    pub fn judge(&self, address: IpAddr, is_proven: bool, now: Instant) -> Verdict {
        let shared = &self.0;
        let slots = shared.slots_of(address);
        let room = shared.period * u64::from(shared.bounds.burst);
        let in_use = shared.in_use.load(Ordering::Relaxed);
        let free = shared.bounds.at_once.saturating_sub(in_use);
        let crowded = if free == 0 {
            Some(Overload::Full)
        } else if shared.inside_of(slots) >= free {
            Some(Overload::Share)
        } else if shared.taken(slots, now) + shared.period > room {
            Some(Overload::Rate)
        } else {
            None
        };
        if !is_proven {
            let is_busy = in_use >= shared.bounds.at_once / UNPROVEN;
            if crowded.is_some() || is_busy || shared.taken(slots, now) + shared.period > room / 2 {
                return Verdict::Prove;
            }
        }
        match crowded {
            Some(why) => Verdict::Refuse(why),
            None => Verdict::Enter(HandshakePermit::take(shared.clone(), slots)),
        }
    }

    /// Returns the number of concurrent handshakes.
    pub fn in_use(&self) -> usize {
        self.0.in_use.load(Ordering::Relaxed)
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

    /// Returns the number of handshakes of a source, or more where another source shares both counters.
    fn inside_of(&self, slots: [u16; 2]) -> usize {
        let [a, b] = slots.map(|slot| self.slot(slot).in_use.load(Ordering::Relaxed));
        a.min(b) as usize
    }

    /// Returns the time at which the bucket of a source will be full, or a later one where another
    /// source shares both counters.
    fn full_at(&self, slots: [u16; 2]) -> u64 {
        let [a, b] = slots.map(|slot| self.slot(slot).full_at.load(Ordering::Relaxed));
        a.min(b)
    }

    /// Returns the missing part of a bucket, in nanoseconds.
    fn taken(&self, slots: [u16; 2], now: Instant) -> u64 {
        self.full_at(slots).saturating_sub(self.since(now))
    }

    fn since(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.started);
        // After 584 years.
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX / 2)
    }
}

impl HandshakePermit {
    fn take(of: Arc<Shared>, slots: [u16; 2]) -> Self {
        of.in_use.fetch_add(1, Ordering::Relaxed);
        for slot in slots {
            of.slot(slot).in_use.fetch_add(1, Ordering::Relaxed);
        }
        Self { of, slots }
    }

    /// Charges this handshake to the bucket of its source: before its start, or after its failure
    /// where peers with a certificate may come at any rate.
    pub fn charge(&self, now: Instant) {
        let (of, slots) = (&self.of, self.slots);
        let full_at = of.full_at(slots).max(of.since(now)) + of.period;
        // No higher than this source needs it: others may share one of the two.
        for slot in slots {
            of.slot(slot).full_at.fetch_max(full_at, Ordering::Relaxed);
        }
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        for slot in self.slots {
            self.of.slot(slot).in_use.fetch_sub(1, Ordering::Relaxed);
        }
        self.of.in_use.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Returns the source of an address. IPv4-mapped IPv6 addresses count as IPv4.
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
