//! The fate of each packet, and its time: without a socket and without a clock.
//!
//! A packet passes the parts of a path in this order: the largest size that it carries, what it
//! loses, a bottleneck with a bounded queue, and the distance. Each kind of decision has random
//! numbers of its own, one a packet whether it is needed or not: so the n-th packet meets the same
//! fate for a given seed, whatever else has been configured meanwhile.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

/// Maximum bytes of the packets in a path with any configuration: the cost of a test.
const MOST: usize = 64 << 20;

/// Jitter is another one so often: slower than packets follow each other, as that of a network is,
/// where queues grow and shrink.
const JITTER_LASTS: Duration = Duration::from_millis(10);

/// Treatment of the packets of one direction. The default changes nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Impairment {
    /// Delay of each packet.
    pub delay: Duration,
    /// Maximum additional delay, in steps; packets stay in order.
    pub jitter: Duration,
    /// Part of the packets that is lost, 0 to 1.
    pub loss: f64,
    /// Part of the packets that come late, 0 to 1.
    pub reorder: f64,
    /// Maximum additional delay of late packets.
    pub reorder_by: Duration,
    /// The bottleneck, in bits a second; `None`: there is none.
    pub rate: Option<u64>,
    /// Bytes that wait before the bottleneck; further packets are lost.
    pub queue: usize,
    /// The largest packet that passes, in bytes with its IP header; others vanish without a word.
    pub mtu: Option<usize>,
}

/// Counts of the packets so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Packets in.
    pub packets: u64,
    /// Bytes out, with their IP headers.
    pub bytes: u64,
    /// Lost at random.
    pub lost: u64,
    /// Found the queue full.
    pub overflowed: u64,
    /// Too large.
    pub too_large: u64,
    /// Held back, so that others overtook them.
    pub held_back: u64,
}

/// One direction of a path, with the packets in it.
#[derive(Debug)]
pub struct Schedule {
    loss: Random,
    reorder: Random,
    jitter: Random,
    /// Time until which the bottleneck is busy.
    busy: Option<Instant>,
    /// Time at which the last packet in order leaves.
    last: Option<Instant>,
    /// Part of the jitter in force, and since when.
    unrest: (f64, Option<Instant>),
    held: usize,
    number: u64,
    under_way: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    counts: Counts,
}

impl Schedule {
    /// Creates an empty path whose decisions follow from `seed`.
    pub fn new(seed: u64) -> Self {
        let mut seeds = Random(seed);
        let [loss, reorder, jitter] = std::array::from_fn(|_| Random(seeds.next()));
        Self {
            loss,
            reorder,
            jitter,
            busy: None,
            last: None,
            unrest: (0.0, None),
            held: 0,
            number: 0,
            under_way: BinaryHeap::new(),
            counts: Counts::default(),
        }
    }

    /// Takes a packet at `now`.
    pub fn push(&mut self, path: &Impairment, now: Instant, packet: &[u8]) {
        let (is_lost, late) = (self.loss.part() < path.loss, self.reorder.part());
        self.counts.packets += 1;
        if path.mtu.is_some_and(|mtu| packet.len() > mtu) {
            self.counts.too_large += 1;
            return;
        }
        if is_lost {
            self.counts.lost += 1;
            return;
        }
        let Some(passed) = self.pass_bottleneck(path, now, packet.len()) else {
            self.counts.overflowed += 1;
            return;
        };
        let mut due = passed + path.delay + path.jitter.mul_f64(self.unrest(now));
        if late < path.reorder {
            self.counts.held_back += 1;
            // Again evenly between 0 and 1: it is known to be below the probability.
            due += path.reorder_by.mul_f64(late / path.reorder);
        } else {
            // Also when the path has just become shorter.
            due = self.last.map_or(due, |last| due.max(last));
            self.last = Some(due);
        }
        self.held += packet.len();
        self.number += 1;
        let entry = (due, self.number, packet.to_vec());
        self.under_way.push(Reverse(entry));
    }

    /// Returns the next packet that leaves at `now` or has left before.
    pub fn pop(&mut self, now: Instant) -> Option<Vec<u8>> {
        let Reverse((due, ..)) = self.under_way.peek()?;
        if *due > now {
            return None;
        }
        let Reverse((_, _, packet)) = self.under_way.pop()?;
        self.held -= packet.len();
        self.counts.bytes += packet.len() as u64;
        Some(packet)
    }

    /// Returns the time at which the next packet leaves.
    pub fn next(&self) -> Option<Instant> {
        self.under_way.peek().map(|Reverse((due, ..))| *due)
    }

    /// Returns the counts of the packets so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Returns the time at which a packet of `size` bytes has passed the bottleneck; `None` when it
    /// does not.
    fn pass_bottleneck(&mut self, path: &Impairment, now: Instant, size: usize) -> Option<Instant> {
        if self.held + size > MOST {
            return None;
        }
        let Some(rate) = path.rate else {
            return Some(now);
        };
        let takes = |bytes: usize| Duration::from_secs_f64(bytes as f64 * 8.0 / rate as f64);
        let start = self.busy.map_or(now, |busy| busy.max(now));
        if start > now && start - now + takes(size) > takes(path.queue) {
            return None;
        }
        let passed = start + takes(size);
        self.busy = Some(passed);
        Some(passed)
    }

    /// Returns the part of the jitter in force at `now`.
    fn unrest(&mut self, now: Instant) -> f64 {
        let (_, since) = self.unrest;
        if since.is_none_or(|since| now >= since + JITTER_LASTS) {
            self.unrest = (self.jitter.part(), Some(now));
        }
        self.unrest.0
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, and even enough for this.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number from 0 up to, not including, 1.
    fn part(&mut self) -> f64 {
        // 53 bits are what a double holds exactly.
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests;
