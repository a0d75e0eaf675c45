//! Scheduling of the streams of a connection: the number of bytes that a stream writes before the others.
//!
//! quinn-proto sends all bytes that a stream has written in one run, so that its packets lie together
//! and the peer writes them to their socket at once, rather than a packet of each stream in a round.
//! Small data goes ahead of large data, but a run that has begun is not interrupted. So a run is short:
//! a stream that has written enough waits until everything has been sent.
//!
//! quinn-proto does not tell how much it has yet to send. But it asks the congestion controller before
//! it sends more, so a controller that was asked in vain tells that something is left.

use std::any::Any;
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics};

/// Approximate duration of a run, and its minimum in bytes: one full send.
const RUN: Duration = Duration::from_millis(2);
const LEAST: u32 = 64 << 10;

/// Maximum number of bytes in a turn that go ahead of others.
const SMALL: u32 = 4 << 10;

thread_local! {
    /// Whether a connection of this thread wanted to send more.
    static ASKED: Cell<bool> = const { Cell::new(false) };
}

/// Calls `send`, and returns whether the congestion window left something unsent.
pub(super) fn watch<T>(send: impl FnOnce() -> T) -> (T, bool) {
    ASKED.set(false);
    let sent = send();
    (sent, ASKED.get())
}

/// Scheduler of the streams of a connection.
#[derive(Debug)]
pub(super) struct SendScheduler {
    number: u16,
    /// Approximate number of bytes that a stream may write in this turn.
    run: u32,
}

impl Default for SendScheduler {
    fn default() -> Self {
        Self {
            number: 0,
            run: LEAST,
        }
    }
}

impl SendScheduler {
    /// Begins the next turn, on a path that takes `window` bytes in `rtt`.
    pub(super) fn next(&mut self, window: u64, rtt: Duration) {
        self.number = self.number.wrapping_add(1);
        let run = u128::from(window) * RUN.as_nanos() / rtt.as_nanos().max(1);
        self.run = u32::try_from(run).unwrap_or(u32::MAX).max(LEAST);
    }
}

/// Bytes that a stream has written in its turn, and its priority.
#[derive(Debug, Default)]
pub(super) struct Turn {
    number: u16,
    place: Place,
    written: u32,
}

/// Priorities, by quinn-proto's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
enum Place {
    #[default]
    Behind = 0,
    Ahead = 1,
    /// Highest, without turns: the stream that keeps the tunnel alive.
    First = 2,
}

impl Turn {
    /// Whether more may be written now.
    pub(super) fn allows_more(&mut self, send_scheduler: &SendScheduler) -> bool {
        if self.number != send_scheduler.number {
            self.number = send_scheduler.number;
            self.written = 0;
        }
        self.written < send_scheduler.run || self.place == Place::First
    }

    /// Puts the stream before all others, and returns its new priority.
    pub(super) fn go_first(&mut self) -> i32 {
        self.place = Place::First;
        self.place as i32
    }

    /// Returns the stream's priority, if `length` more bytes change it.
    pub(super) fn priority(&mut self, length: usize) -> Option<i32> {
        let place = match self.place {
            Place::First => Place::First,
            _ if length <= SMALL.saturating_sub(self.written) as usize => Place::Ahead,
            _ => Place::Behind,
        };
        let before = std::mem::replace(&mut self.place, place);
        (before != place).then_some(place as i32)
    }

    /// Adds written bytes.
    pub(super) fn add(&mut self, written: usize) {
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.written = self.written.saturating_add(written);
    }
}

/// A factory of controllers that note when they are asked.
pub(super) struct Watched(pub(super) Arc<dyn ControllerFactory + Send + Sync>);

impl ControllerFactory for Watched {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Asked(self.0.clone().build(now, current_mtu)))
    }
}

struct Asked(Box<dyn Controller>);

impl Controller for Asked {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.0.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.0.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.0
            .on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.0
            .on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.0.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        ASKED.set(true);
        self.0.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.0.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self(self.0.clone_box()))
    }

    fn initial_window(&self) -> u64 {
        self.0.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
