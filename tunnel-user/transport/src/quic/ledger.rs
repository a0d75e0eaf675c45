//! Ledger of the memory that a tunnel holds for its peer's data, and its charge.
//!
//! quinn-proto keeps the unread data, and does not tell how much. So arrivals are counted: each frame
//! of a stream keeps its packet until the stream has been read out. The stream's reader keeps data
//! behind a gap, and its size counts. Where a bound refuses more, the largest stream ends; where there
//! is none, the tunnel does.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use prometheus_client::metrics::counter::Counter;
use quinn_proto::StreamId;
use rustc_hash::FxBuildHasher;

use cpc_datapath::Budget;
use cpc_datapath::budget::Charge;

/// Memory cost of a frame beside its packet, in bytes: quinn-proto's entry of 56 bytes in a list that
/// grows by doubling, the packet's reference count, and malloc's own.
pub(super) const FRAME: u64 = 192;

/// Maximum number of frames that quinn-proto keeps for one stream (`COMPACT_THRESHOLD`): it joins them
/// above that, and ends the connection where that does not help.
const FRAMES: u64 = 2048;

/// Size of an entry in quinn-proto's list of a stream's frames, in bytes. The list keeps its capacity,
/// a power of two, when it is read out. When a stream of ours has ended its list goes to the next one that
/// we open, so it stays charged until the tunnel ends. A peer's stream gets its list long before it begins:
/// that one is charged while the stream is open.
const ENTRY: u64 = 56;

/// Number of entries of a list that are part of a tunnel's fixed cost.
const FEW_ENTRIES: u64 = 64;

/// Cost in bytes of half a stream that we have ended and the peer has not, by an end or by an
/// acknowledgement of ours: quinn-proto keeps its state.
const UNENDED: u64 = 512;

/// Number of such halves that are part of a tunnel's fixed cost: an end that crosses our stop is not
/// seen.
const FEW_UNENDED: u64 = 1024;

/// Number of bytes that are part of a tunnel's fixed cost: a few requests charge nothing.
const FREE: u64 = 16 << 10;

/// Unit of charging, in bytes.
const BLOCK: u64 = 64 << 10;

/// Maximum number of bytes of packets that quinn-proto keeps for a stream whose reader has stopped, by its window: its
/// assembler joins chunks once they take one and a half windows more than they hold.
fn held_of(window: u32) -> u64 {
    u64::from(window) / 2 * 5
}

/// Maximum number of bytes that one stream may hold behind a gap, by its window: early reads give credit. A gap is
/// filled in two round trips; a stream moves a window in each. A window that is no larger than a short path needs is a
/// part of that.
fn ahead_of(window: u32) -> u64 {
    (u64::from(window) * 4).max(8 << 20)
}

/// Bounds of the memory that this process holds for peers.
#[derive(Clone, Debug)]
pub struct MemoryBounds {
    /// Budget of all tunnels together.
    pub budget: Budget,
    /// Maximum number of bytes of one tunnel.
    pub per_tunnel: u64,
    /// Maximum number of bytes that the peer may send on one stream before they are read.
    pub stream_window: u32,
    /// Counter of streams and tunnels that ended at the bound of a stream or tunnel.
    pub ended_by_tunnel: Counter,
    /// Counter of streams and tunnels that ended at the bound of the process or of a tenant.
    pub ended_by_budget: Counter,
}

impl MemoryBounds {
    /// Creates bounds with counters of their own, and a window of 1 MiB.
    pub fn new(budget: Budget, per_tunnel: u64) -> Self {
        Self {
            budget,
            per_tunnel,
            stream_window: 1 << 20,
            ended_by_tunnel: Counter::default(),
            ended_by_budget: Counter::default(),
        }
    }
}

/// Stream or tunnel that must end to stay within the bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Excess {
    /// The largest stream.
    Stream(StreamId),
    /// The tunnel: no stream of it holds more than its end would cost.
    Tunnel,
}

/// Memory of one tunnel.
#[derive(Debug)]
pub(super) struct Ledger {
    streams: HashMap<StreamId, Holding, FxBuildHasher>,
    /// Lists of ended streams of ours, in bytes; quinn-proto uses the last one first.
    spare_lists: Vec<u32>,
    /// Lists of streams of ours that were stopped and that the peer has not ended, in bytes, except empty
    /// ones.
    stopped_lists: BinaryHeap<Reverse<u32>>,
    /// Sum of the costs of streams and of the lists beside them.
    held: u64,
    /// Number of streams that were stopped and that the peer has not ended.
    unended: u64,
    /// Number of streams whose end the peer has not acknowledged.
    unacknowledged: u64,
    charge: Charge,
    bounds: MemoryBounds,
}

/// Memory of one stream, in bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Holding {
    /// Packets with unread frames.
    packets: u64,
    /// Number of these frames.
    frames: u64,
    /// The list in which quinn-proto keeps them.
    list: u64,
    /// The list goes to a later stream when this one ends.
    passes_list_on: bool,
    /// Data that was read and lies behind a gap.
    ahead: u64,
    /// Data that the reader has received and may not have passed on.
    given: u64,
}

impl Holding {
    fn unread(&self) -> u64 {
        self.packets + (self.frames.min(FRAMES) * FRAME).max(self.list)
    }

    fn cost(&self) -> u64 {
        self.unread() + self.ahead + self.given
    }

    /// The list that stays charged when the stream ends.
    fn kept(&self) -> u64 {
        if self.passes_list_on { self.list } else { 0 }
    }
}

impl Ledger {
    pub(super) fn new(bounds: MemoryBounds) -> Self {
        Self {
            streams: HashMap::default(),
            spare_lists: Vec::new(),
            stopped_lists: BinaryHeap::new(),
            held: 0,
            unended: 0,
            unacknowledged: 0,
            charge: Charge::new(bounds.budget.clone()),
            bounds,
        }
    }

    /// Charges a part of the process's budget from now on. Returns `false` if it has no room for the
    /// present memory.
    pub(super) fn charge_to(&mut self, budget: &Budget) -> bool {
        self.charge.move_to(budget)
    }

    /// Adds the stream `id` of ours, with a spare list where there is one.
    pub(super) fn opened(&mut self, id: StreamId) {
        let list = self.spare_lists.pop().map_or(0, u64::from);
        self.held -= list;
        self.change(id, |holding| {
            (holding.list, holding.passes_list_on) = (list, true)
        });
    }

    /// Adds a frame of `id` that arrived in a packet of `size` bytes.
    pub(super) fn arrived(&mut self, id: StreamId, size: usize) {
        let most = held_of(self.bounds.stream_window);
        self.change(id, |holding| {
            holding.packets = most.min(holding.packets + size as u64);
            holding.frames += 1;
            holding.list = holding.list.max(list_of(holding.frames));
        });
    }

    /// Returns the number of frames since `id` was read out.
    pub(super) fn frames(&self, id: StreamId) -> u64 {
        self.streams.get(&id).map_or(0, |holding| holding.frames)
    }

    /// Notes that the reader of `id` has passed on its data, because it asks for more.
    pub(super) fn passed_on(&mut self, id: StreamId) {
        if self.streams.get(&id).is_some_and(|it| it.given > 0) {
            self.change(id, |holding| holding.given = 0);
        }
    }

    /// Notes that `frames` chunks of `id` with `bytes` in all were read, and more wait. `ahead` bytes
    /// of it lie behind a gap. The rest of the packets stays charged until the stream is read out.
    pub(super) fn read(&mut self, id: StreamId, (frames, bytes): (u64, u64), ahead: u64) {
        self.change(id, |holding| {
            let before = holding.unread() + holding.ahead;
            holding.packets = holding.packets.saturating_sub(bytes);
            holding.frames = holding.frames.saturating_sub(frames);
            holding.ahead = ahead;
            holding.given += before.saturating_sub(holding.unread() + ahead);
        });
    }

    /// Notes that `id` was read out. `ahead` bytes of it lie behind a gap; `gives` tells whether the
    /// reader received data.
    pub(super) fn read_out(&mut self, id: StreamId, ahead: u64, gives: bool) {
        self.change(id, |holding| {
            let before = holding.unread() + holding.ahead;
            (holding.packets, holding.frames, holding.ahead) = (0, 0, ahead);
            holding.given = match gives {
                true => holding.given + before.saturating_sub(holding.unread() + ahead),
                false => 0,
            };
        });
    }

    /// Removes `id`, of which nothing is held any more.
    pub(super) fn forget(&mut self, id: StreamId) {
        if let Some(holding) = self.streams.remove(&id) {
            self.held = self.held - holding.cost() + holding.kept();
            if holding.passes_list_on {
                self.spare_lists.push(size_of_list(holding.list));
            }
            self.relax();
        }
    }

    /// Notes that `id` was stopped before its end, or reset.
    pub(super) fn stopped(&mut self, id: StreamId) {
        self.unended += 1;
        let list = self.streams.get(&id).map_or(0, Holding::kept);
        if list > 0 {
            self.stopped_lists.push(Reverse(size_of_list(list)));
            self.held += list;
            self.change(id, |holding| {
                (holding.list, holding.passes_list_on) = (0, false)
            });
        }
    }

    /// Whether more streams are unended than an honest peer leaves.
    pub(super) fn has_unended(&self) -> bool {
        self.unended > FEW_UNENDED
    }

    /// Notes the number of stopped streams that the peer has reset.
    pub(super) fn ended(&mut self, streams: u64) {
        self.unended = self.unended.saturating_sub(streams);
        // Which they are is not told: those that cost least.
        while self.stopped_lists.len() as u64 > self.unended {
            self.spare_lists
                .extend(self.stopped_lists.pop().map(|it| it.0));
        }
    }

    /// Sets the number of streams whose end the peer has not acknowledged.
    pub(super) fn unacknowledged(&mut self, streams: u64) {
        self.unacknowledged = streams;
    }

    fn change(&mut self, id: StreamId, change: impl FnOnce(&mut Holding)) {
        let holding = self.streams.entry(id).or_default();
        let before = holding.cost();
        change(holding);
        let after = holding.cost();
        self.held = self.held - before + after;
        if after < before {
            self.relax();
        }
    }

    /// Returns the amount to charge.
    fn wanted(&self) -> u64 {
        let unended = self.unended + self.unacknowledged;
        let unended = unended.saturating_sub(FEW_UNENDED) * UNENDED;
        match self.held + unended {
            held if held <= FREE => 0,
            held => held.next_multiple_of(BLOCK),
        }
    }

    /// Releases the part of the charge that is not needed.
    fn relax(&mut self) {
        let wanted = self.wanted();
        if wanted <= self.charge.bytes() / 2 {
            self.charge.set(wanted);
        }
    }

    /// Charges the present memory. `Some` means that a bound refuses, and names what must end; call
    /// again then.
    pub(super) fn settle(&mut self) -> Option<Excess> {
        let wanted = self.wanted();
        if wanted <= self.charge.bytes() {
            return None;
        }
        let refused = if wanted > self.bounds.per_tunnel {
            &self.bounds.ended_by_tunnel
        } else if self.charge.set(wanted) {
            return None;
        } else {
            &self.bounds.ended_by_budget
        };
        refused.inc();
        let is_free = self.unended + self.unacknowledged < FEW_UNENDED;
        let helps = |freed| freed >= UNENDED || freed > 0 && is_free;
        let largest = self.largest().filter(|(_, freed)| helps(*freed));
        Some(largest.map_or(Excess::Tunnel, |(id, _)| Excess::Stream(id)))
    }

    /// Whether `id` holds more behind a gap than a stream may.
    pub(super) fn is_too_far_ahead(&self, id: StreamId) -> bool {
        let ahead = self.streams.get(&id).map_or(0, |holding| holding.ahead);
        let is_over = ahead > ahead_of(self.bounds.stream_window);
        if is_over {
            self.bounds.ended_by_tunnel.inc();
        }
        is_over
    }

    /// Returns the number of held bytes.
    #[cfg(test)]
    pub(super) fn held(&self) -> u64 {
        self.held
    }

    /// Returns the stream whose end frees most, and how much that is.
    fn largest(&self) -> Option<(StreamId, u64)> {
        let streams = self.streams.iter();
        let freed = streams.map(|(id, holding)| (*id, holding.cost() - holding.kept()));
        freed.max_by_key(|(_, freed)| *freed)
    }
}

/// Narrows the bytes of a list, which are `list_of(FRAMES)` at most.
fn size_of_list(bytes: u64) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// Returns the charged size of the list that holds so many frames, in bytes.
fn list_of(frames: u64) -> u64 {
    match frames.min(FRAMES) {
        frames if frames <= FEW_ENTRIES => 0,
        frames => frames.next_power_of_two() * ENTRY,
    }
}

#[cfg(test)]
mod tests {
    use quinn_proto::{Dir, Side};

    use super::*;

    const PACKET: usize = 1200;
    const MANY: u64 = 1000;

    fn stream(index: u64) -> StreamId {
        StreamId::new(Side::Server, Dir::Bi, index)
    }

    fn ledger(bytes: u64, per_tunnel: u64) -> (Ledger, Budget) {
        let budget = Budget::new(bytes);
        let bounds = MemoryBounds::new(budget.clone(), per_tunnel);
        (Ledger::new(bounds), budget)
    }

    /// `MANY` frames of one stream.
    fn pour(ledger: &mut Ledger, id: StreamId) -> u64 {
        (0..MANY).for_each(|_| ledger.arrived(id, PACKET));
        MANY * (PACKET as u64 + FRAME)
    }

    #[test]
    fn what_is_read_and_passed_on_is_given_back() {
        let (mut ledger, budget) = ledger(8 << 20, 8 << 20);
        ledger.opened(stream(0));
        let poured = pour(&mut ledger, stream(0));
        assert_eq!(ledger.settle(), None);
        assert!(budget.used() >= poured && budget.used() < poured + BLOCK);
        assert_eq!(ledger.frames(stream(0)), MANY);
        // Given to a reader, which may not get rid of it.
        for part in [MANY / 2, MANY / 4] {
            ledger.read(stream(0), (part, part * PACKET as u64), 0);
        }
        assert_eq!(ledger.held, poured);
        ledger.read_out(stream(0), 0, true);
        assert_eq!(ledger.held, poured);
        ledger.passed_on(stream(0));
        let list = list_of(MANY);
        assert_eq!(ledger.held, list);
        // The list stays with quinn-proto, for the next stream.
        ledger.forget(stream(0));
        ledger.forget(stream(0));
        assert!(ledger.streams.is_empty() && budget.used() >= list);
        ledger.opened(stream(1));
        assert_eq!((ledger.held, ledger.spare_lists.len()), (list, 0));
        drop(ledger);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_lies_behind_a_gap_stays_charged() {
        let (mut ledger, budget) = ledger(8 << 20, 8 << 20);
        pour(&mut ledger, stream(0));
        let list = list_of(MANY);
        assert_eq!(ledger.settle(), None);
        ledger.read_out(stream(0), 500_000, false);
        assert_eq!(ledger.held, 500_000 + list);
        ledger.passed_on(stream(0));
        assert!(budget.used() >= 500_000);
        // Part of it goes to the reader, then the rest, beside what has arrived since.
        ledger.read_out(stream(0), 200_000, true);
        assert_eq!(ledger.held, 500_000 + list);
        ledger.passed_on(stream(0));
        assert_eq!(ledger.held, 200_000 + list);
        ledger.arrived(stream(0), PACKET);
        let all = 200_000 + PACKET as u64 + list;
        ledger.read(stream(0), (1, PACKET as u64), 50_000);
        assert_eq!(ledger.held, all);
        ledger.read_out(stream(0), 0, true);
        assert_eq!(ledger.held, all);
        ledger.passed_on(stream(0));
        assert_eq!(ledger.held, list);
    }

    #[test]
    fn small_chunks_that_are_read_leave_large_packets_charged() {
        let (mut ledger, _) = ledger(8 << 20, 8 << 20);
        for size in [100, PACKET] {
            (0..10).for_each(|_| ledger.arrived(stream(0), size));
        }
        ledger.read(stream(0), (10, 1000), 0);
        ledger.passed_on(stream(0));
        assert_eq!(ledger.held, 10 * (PACKET as u64 + FRAME));
    }

    #[test]
    fn at_the_bound_the_largest_stream_ends() {
        for (bytes, per_tunnel) in [(64 << 20, 2 << 20), (2 << 20, 64 << 20)] {
            let (mut ledger, budget) = ledger(bytes, per_tunnel);
            ledger.arrived(stream(1), PACKET);
            pour(&mut ledger, stream(2));
            assert_eq!(ledger.settle(), None);
            pour(&mut ledger, stream(2));
            assert_eq!(ledger.settle(), Some(Excess::Stream(stream(2))));
            assert!(budget.used() <= 2 << 20);
            ledger.forget(stream(2));
            assert_eq!(ledger.settle(), None);
            assert_eq!(budget.used(), 0);
            let ended = [
                &ledger.bounds.ended_by_tunnel,
                &ledger.bounds.ended_by_budget,
            ];
            let ended = ended.map(Counter::get);
            assert_eq!(ended, if bytes > per_tunnel { [1, 0] } else { [0, 1] });
        }
    }

    /// quinn-proto joins what is kept of a stream: it never holds more than that.
    #[test]
    fn a_stream_costs_no_more_than_quinn_keeps_of_it() {
        let (mut ledger, _) = ledger(1 << 30, 1 << 30);
        for _ in 0..20 {
            pour(&mut ledger, stream(0));
        }
        assert_eq!(ledger.held, held_of(1 << 20) + FRAMES * FRAME);
    }

    #[test]
    fn streams_that_the_peer_never_ends_end_the_tunnel() {
        let (mut ledger, budget) = ledger(1 << 20, 1 << 20);
        (0..FEW_UNENDED).for_each(|index| ledger.stopped(stream(index)));
        assert!(!ledger.has_unended());
        assert_eq!((ledger.settle(), budget.used()), (None, 0));
        (0..(1 << 20) / UNENDED).for_each(|index| ledger.stopped(stream(index)));
        assert_eq!(ledger.settle(), Some(Excess::Tunnel));
        ledger.ended(1 << 10);
        assert_eq!(ledger.settle(), None);
        assert!(budget.used() > 0);
    }

    #[test]
    fn a_stream_whose_end_frees_nothing_is_not_ended() {
        for (unended, ends_tunnel) in [(FEW_UNENDED - 1, false), (FEW_UNENDED, true)] {
            let (mut ledger, _) = ledger(1 << 20, 1 << 20);
            (0..unended).for_each(|index| ledger.stopped(stream(index)));
            (0..(1 << 20) / FRAME).for_each(|index| ledger.arrived(stream(index), 60));
            let excess = ledger.settle();
            assert_eq!(excess == Some(Excess::Tunnel), ends_tunnel, "{excess:?}");
            ledger.arrived(stream(7), PACKET);
            assert_eq!(ledger.settle(), Some(Excess::Stream(stream(7))));
        }
    }

    #[test]
    fn a_tunnel_that_goes_gives_everything_back() {
        let (mut ledger, budget) = ledger(8 << 20, 8 << 20);
        pour(&mut ledger, stream(0));
        assert_eq!(ledger.settle(), None);
        let tenant = budget.part(4 << 20);
        assert!(ledger.charge_to(&tenant));
        assert_eq!(tenant.used(), budget.used());
        drop(ledger);
        assert_eq!((tenant.used(), budget.used()), (0, 0));
    }

    /// A peer that fills and drains one list after another, and one that never ends what we have stopped.
    #[test]
    fn lists_stay_charged_until_the_tunnel_ends() {
        let (mut ledger, _) = ledger(1 << 30, 1 << 30);
        let list = list_of(MANY);
        for index in 0..10 {
            ledger.opened(stream(index));
            pour(&mut ledger, stream(index));
            ledger.read_out(stream(index), 0, false);
        }
        assert_eq!(ledger.held, 10 * list);
        for index in 0..5 {
            ledger.stopped(stream(index));
            ledger.forget(stream(index));
        }
        assert_eq!((ledger.held, ledger.spare_lists.len()), (10 * list, 0));
        // Streams that are opened now may have new lists.
        for index in 10..15 {
            ledger.opened(stream(index));
            pour(&mut ledger, stream(index));
            ledger.read_out(stream(index), 0, false);
        }
        assert_eq!(ledger.held, 15 * list);
        ledger.ended(5);
        assert_eq!((ledger.held, ledger.spare_lists.len()), (15 * list, 5));
        for index in 15..20 {
            ledger.opened(stream(index));
            pour(&mut ledger, stream(index));
            ledger.read_out(stream(index), 0, false);
        }
        assert_eq!((ledger.held, ledger.spare_lists.len()), (15 * list, 0));
    }

    /// The end of a stream that was read out frees nothing: another one ends, or the tunnel.
    #[test]
    fn a_stream_ends_for_what_its_end_frees() {
        let (mut ledger, _) = ledger(1 << 20, 1 << 20);
        for index in 0..20 {
            ledger.opened(stream(index));
            pour(&mut ledger, stream(index));
            ledger.read_out(stream(index), 0, false);
        }
        assert!(ledger.held > 1 << 20);
        assert_eq!(ledger.settle(), Some(Excess::Tunnel));
        ledger.arrived(stream(7), PACKET);
        assert_eq!(ledger.settle(), Some(Excess::Stream(stream(7))));
    }

    #[test]
    fn a_peers_stream_gives_its_list_back() {
        let (mut ledger, budget) = ledger(8 << 20, 8 << 20);
        for index in 0..10 {
            pour(&mut ledger, stream(index));
            ledger.stopped(stream(index));
            ledger.forget(stream(index));
        }
        assert_eq!((ledger.held, budget.used()), (0, 0));
        assert!(ledger.spare_lists.is_empty() && ledger.stopped_lists.is_empty());
    }

    /// Each stream has one list, however it ends.
    #[test]
    fn spare_lists_are_as_many_as_streams_have_ended() {
        let (mut ledger, _) = ledger(1 << 30, 1 << 30);
        for round in 0..100 {
            let id = stream(round);
            ledger.opened(id);
            pour(&mut ledger, id);
            ledger.stopped(id);
            ledger.forget(id);
            ledger.ended(1);
            assert_eq!(ledger.spare_lists, [size_of_list(list_of(MANY))]);
        }
        assert_eq!(ledger.held, list_of(MANY));
    }
}
