//! Paths between hosts: delay, loss, reordering, duplication, corruption, rate and partitions.

use std::net::SocketAddrV4;

use crate::random::Random;

/// A path in one direction. Times are nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// Least delay.
    pub delay: u64,
    /// Further delay, up to which packets vary and overtake each other.
    pub jitter: u64,
    /// Lost packets in a thousand.
    pub loss: u64,
    /// Packets in a thousand that arrive twice.
    pub duplicates: u64,
    /// Packets in a thousand of which a damaged copy arrives as well.
    pub damaged: u64,
    /// Bytes per second; 0 is no bound.
    pub rate: u64,
    /// Largest IP packet in bytes.
    pub mtu: usize,
    /// Whether nothing arrives.
    pub is_cut: bool,
}

impl Default for Path {
    fn default() -> Self {
        Self {
            delay: 1_000_000,
            jitter: 0,
            loss: 0,
            duplicates: 0,
            damaged: 0,
            rate: 0,
            mtu: 1500,
            is_cut: false,
        }
    }
}

/// Queue of a path with a rate, in nanoseconds of sending.
const QUEUE: u64 = 100_000_000;

/// Headers of IPv4 and UDP.
const HEADERS: usize = 28;

/// A path with its queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub(super) path: Path,
    /// Time until which earlier packets occupy the path.
    busy_until: u64,
}

/// A packet at its arrival.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub(super) from: SocketAddrV4,
    pub(super) to: SocketAddrV4,
    pub(super) ecn: u8,
    pub(super) bytes: Vec<u8>,
}

impl Link {
    /// Creates an idle path.
    pub(super) fn new(path: Path) -> Self {
        Self {
            path,
            busy_until: 0,
        }
    }

    /// Passes a packet on: calls `deliver` with the time of arrival of each copy.
    pub(super) fn carry(
        &mut self,
        packet: Packet,
        now: u64,
        random: &mut Random,
        mut deliver: impl FnMut(u64, Packet),
    ) {
        let path = self.path;
        // Numbers are drawn in any case, so that a fault changes no others.
        let [loss, twice, damage] = [0; 3].map(|_: u64| random.below(1000));
        let mut jitter = || path.delay + random.below(path.jitter + 1);
        let (first, second) = (jitter(), jitter());
        if path.is_cut || packet.bytes.len() + HEADERS > path.mtu || loss < path.loss {
            return;
        }
        let size = (packet.bytes.len() + HEADERS) as u64;
        let sending = (size * 1_000_000_000).checked_div(path.rate).unwrap_or(0);
        let waits = self.busy_until.saturating_sub(now);
        if waits > QUEUE {
            return;
        }
        self.busy_until = now + waits + sending;
        let sent = self.busy_until;
        if damage < path.damaged {
            let mut damaged = packet.clone();
            damage_bytes(&mut damaged.bytes, random);
            deliver(sent + second, damaged);
        } else if twice < path.duplicates {
            deliver(sent + second, packet.clone());
        }
        deliver(sent + first, packet);
    }
}

/// Flips a bit, or cuts the end off.
fn damage_bytes(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(bytes.len() as u64) as usize;
    match random.chance(1, 4) {
        true => bytes.truncate(at),
        false => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
    }
}
