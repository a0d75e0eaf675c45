//! The server's end of an agent's stream, without I/O: dials, their connections, and the
//! distinction between a living agent and a stuck one.
//!
//! One stream carries everything, in order and without flow control of its own, and the agent
//! handles packets one at a time. Three things follow.
//!
//! **The barrier.** Every agent answers, in turn, a CLOSE_REQ for a connection that can't exist:
//! ids count up from 1, and barriers use ids below 0. The answer proves that the agent has taken
//! everything before it off the stream. So a barrier is the heartbeat as well: [`Event::Silent`]
//! after [`SILENT_AFTER`] without an answer, [`Event::Alive`] at the next one, and the end after
//! [`LOST_AFTER`]. A new agent counts as silent until its first answer.
//!
//! **Closing.** An agent that receives CLOSE_REQ discards the bytes that it has yet to write to the
//! target, and the protocol has no half-close. So this end delays a client's end of file. A barrier
//! comes first, then a delay in which the target can take, at [`SLOWEST_TARGET`], the bytes that
//! the agent may hold for it. CLOSE_REQ follows at once for a client that reads no more
//! ([`ServerEnd::stop`]), and for one whose last bytes end a session
//! ([`ServerEnd::note_session_end`]). A client that is known to read on ([`ServerEnd::finish_half`]),
//! and one whose bytes the target has not answered, get answers for [`LINGER`]. Of any other client
//! this end does not know whether it reads on: that client gets the rest of its answer until the
//! target has been quiet for [`QUIET`]. Two things are lost: bytes that a slower target has not
//! taken, and an answer that comes later than that. Bytes of the target are never lost: the agent
//! sends them before CLOSE_RSP, and they can be read after that.
//!
//! **Halves.** An agent of ours announces that it supports halves ([`ServerEnd::with_halves`]). For
//! such an agent DATA without data is the end of file, behind everything sent before, and the
//! target may go on. CLOSE_REQ follows when the client reads no more. So nothing has to be delayed.
//!
//! **Slow readers.** A connection holds at most [`RECEIVE_QUEUE`] unread bytes and one packet.
//! Above that the driver must take no further packet off the stream ([`ServerEnd::wants_packets`]),
//! which blocks the other connections as well. A reader that takes no data for [`STALLED_AFTER`]
//! then loses its connection, and the others go on. Timeouts that count against the agent stop
//! meanwhile.
//!
//! Bounds: one entry for each dial of this server, plus [`MAX_CLOSING`] ids. Every dial ends, by
//! its answer or by its caller, who must cancel it in time. The driver decides which destinations
//! may be dialled and when packets are written, and chooses the value by which it knows a
//! connection (`W`).

mod backlog;
mod barrier;
mod connection;
mod packets;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use thiserror::Error;

use self::barrier::Barriers;
use self::connection::{Connection, ExpectedData, Sending};
use super::{MAX_DATA, Packet};
use crate::close::CloseReason;

pub use self::connection::{Answer, ReadEnd, WriteEnd};

/// Bytes of one connection that may wait to be read before the stream is held.
pub const RECEIVE_QUEUE: usize = 1 << 20;

/// Time after which a reader that takes no data and so blocks the stream loses its connection.
pub const STALLED_AFTER: Duration = Duration::from_secs(10);

/// Between an answered barrier and the next, while there are connections.
pub const HEARTBEAT_BUSY: Duration = Duration::from_millis(2500);

/// The same without any.
pub const HEARTBEAT_IDLE: Duration = Duration::from_secs(10);

/// An agent that has not answered a barrier for so long gets no new dials.
pub const SILENT_AFTER: Duration = Duration::from_secs(5);

/// Time without an answer after which the agent is lost: only a new stream gets past the cause. It
/// is long, because the target that blocks the stream may still go on, and with it every
/// connection.
pub const LOST_AFTER: Duration = Duration::from_secs(300);

/// Time after which a quiet target has no more data for a client that may have left.
pub const QUIET: Duration = Duration::from_millis(500);

/// Assumed minimum speed of a target's reads, in bytes a second. It decides how long a target keeps
/// its connection for the bytes that the agent may hold.
pub const SLOWEST_TARGET: u32 = 1 << 20;

/// Maximum number of bytes that an agent holds for one target: 150 packets of this server.
const AGENT_QUEUE: usize = 150 * MAX_DATA;

/// Time for which answers are taken after a client's end of file.
pub const LINGER: Duration = Duration::from_secs(10);

/// Time without CLOSE_RSP after which a closed connection is given up, though the agent answers
/// barriers.
pub const CLOSED_AFTER: Duration = Duration::from_secs(30);

/// Maximum number of ids with a CLOSE_REQ but no CLOSE_RSP yet.
pub const MAX_CLOSING: usize = 16 * 1024;

/// Number of a dial and of its connection: `random` on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DialId(pub i64);

/// The dial's id is in use on this stream: choose another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("dial id {} is in use on this stream", .0.0)]
pub struct InUse(pub DialId);

/// Reason why a stream can't continue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum StreamError {
    /// The agent handles no packets any more.
    #[error(
        "the agent has taken nothing off the stream for {} s: a target that reads nothing may block it",
        LOST_AFTER.as_secs()
    )]
    Lost,
    /// The agent keeps sending for connections that this server has closed.
    #[error("the agent names more than {MAX_CLOSING} unknown connections")]
    Flood,
}

impl StreamError {
    /// Returns the reason in the closed set.
    #[must_use]
    pub fn reason(self) -> CloseReason {
        match self {
            Self::Lost => CloseReason::IdleTimeout,
            Self::Flood => CloseReason::ProtocolError,
        }
    }
}

/// Event for the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<W> {
    /// The state of this connection has changed: its waiting tasks must look again.
    Changed(W),
    /// The reader took no data for [`STALLED_AFTER`] and blocked the others: the connection was
    /// reset.
    Stalled(W),
    /// The agent answers: at first, and after each [`Event::Silent`].
    Alive,
    /// The agent has not answered for [`SILENT_AFTER`].
    Silent,
    /// The agent is about to leave: dials should go elsewhere where they can.
    Draining,
}

/// The server's end of one agent's stream. After each call the driver takes everything from
/// [`poll_transmit`](Self::poll_transmit) and [`poll_event`](Self::poll_event).
#[derive(Debug)]
pub struct ServerEnd<W> {
    connections: HashMap<DialId, Connection<W>>,
    /// Owners of the agent's ids.
    ids: HashMap<i64, IdOwner>,
    /// Ids that are being closed, oldest first, with the last barrier that was sent before.
    closing: VecDeque<(u64, i64)>,
    barriers: Barriers,
    /// Lingering connections, by the time of their next check.
    lingering: BinaryHeap<Reverse<(Instant, DialId)>>,
    slow_reader: Option<SlowReader>,
    /// Whether the agent supports halves.
    halves: bool,
    transmit: VecDeque<Packet>,
    events: VecDeque<Event<W>>,
}

/// Owner of an agent's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IdOwner {
    Connection(DialId),
    /// Closed, after this number of barriers; later packets for it are dropped.
    Closing(u64),
}

/// The connection whose reader is waited for.
#[derive(Debug, Clone, Copy)]
struct SlowReader {
    dial: DialId,
    until: Instant,
}

impl<W: Clone> ServerEnd<W> {
    /// Creates an end that sends its first barrier at once.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        let mut end = Self {
            connections: HashMap::new(),
            ids: HashMap::new(),
            closing: VecDeque::new(),
            barriers: Barriers::new(now),
            lingering: BinaryHeap::new(),
            slow_reader: None,
            halves: false,
            transmit: VecDeque::new(),
            events: VecDeque::new(),
        };
        end.ask(None, now);
        end
    }

    /// Creates an end for an agent that supports halves, if `halves`.
    #[must_use]
    pub fn with_halves(mut self, halves: bool) -> Self {
        self.halves = halves;
        self
    }

    /// Asks the agent to dial `address` (`host:port`).
    ///
    /// # Errors
    /// [`InUse`].
    pub fn dial(&mut self, dial: DialId, address: String, waker: W) -> Result<(), InUse> {
        if self.connections.contains_key(&dial) {
            return Err(InUse(dial));
        }
        self.connections.insert(dial, Connection::new(waker));
        self.transmit.push_back(Packet::DialRequest {
            protocol: "tcp".into(),
            address,
            random: dial.0,
        });
        Ok(())
    }

    /// Returns the agent's answer to a dial; `None` before it.
    #[must_use]
    pub fn answer(&self, dial: DialId) -> Option<Answer> {
        self.connections.get(&dial)?.answer()
    }

    /// Returns the id for DATA towards the target; `None` before the answer and after the end.
    #[must_use]
    pub fn connect_id(&self, dial: DialId) -> Option<i64> {
        self.connections.get(&dial)?.sends_as()
    }

    /// Appends a part of the target's data; `Ok(false)`: there is none yet.
    ///
    /// # Errors
    /// [`ReadEnd`] once everything has been read.
    pub fn read(
        &mut self,
        dial: DialId,
        into: &mut Vec<Bytes>,
        now: Instant,
    ) -> Result<bool, ReadEnd> {
        let Some(connection) = self.connections.get_mut(&dial) else {
            return Err(ReadEnd::Reset(CloseReason::Aborted));
        };
        let read = connection.read(into)?;
        if read {
            self.note_space(dial, now);
        }
        Ok(read)
    }

    /// Returns why unread data no longer counts; `None` unless the connection was reset.
    #[must_use]
    pub fn reset_reason(&self, dial: DialId) -> Option<CloseReason> {
        match self.connections.get(&dial)?.read_end()? {
            ReadEnd::Reset(reason) => Some(reason),
            ReadEnd::Finished | ReadEnd::Link(_) => None,
        }
    }

    /// Returns why the target gets no more data; `None` while it does.
    #[must_use]
    pub fn write_end(&self, dial: DialId) -> Option<WriteEnd> {
        self.connections.get(&dial)?.write_end()
    }

    /// Reports that `bytes` of DATA were sent to the target.
    pub fn sent(&mut self, dial: DialId, bytes: usize, now: Instant) {
        if let Some(connection) = self.connections.get_mut(&dial) {
            connection.backlog.add(bytes, now);
            connection.expected = ExpectedData::Answer;
        }
    }

    /// Reports that the bytes sent last end a session within the connection, which needs no answer.
    pub fn note_session_end(&mut self, dial: DialId) {
        if let Some(connection) = self.connections.get_mut(&dial) {
            connection.expected = ExpectedData::Nothing;
        }
    }

    /// Reports that the target gets no more data. CLOSE_REQ follows once the target has had time to
    /// take the earlier bytes, and to answer where an answer may follow.
    pub fn finish(&mut self, dial: DialId, now: Instant) {
        let expected = self.connections.get(&dial).map(|c| c.expected);
        self.finish_expecting(dial, expected.unwrap_or(ExpectedData::Rest), now);
    }

    /// Does the same as [`finish`](Self::finish) for a client that is known to read on.
    pub fn finish_half(&mut self, dial: DialId, now: Instant) {
        self.finish_expecting(dial, ExpectedData::Answer, now);
    }

    fn finish_expecting(&mut self, dial: DialId, expected: ExpectedData, now: Instant) {
        let connection = self.connections.get_mut(&dial);
        let Some(connection) = connection.filter(|c| c.sends_as().is_some()) else {
            return;
        };
        if !self.halves {
            connection.sending = Sending::Barrier(expected);
            return self.ask(Some(dial), now);
        }
        connection.sending = Sending::Half;
        if let Some(connect_id) = connection.connect_id {
            let data = Bytes::new();
            self.transmit.push_back(Packet::Data { connect_id, data });
        }
        if connection.is_discarding() {
            self.send_close(dial, now);
        }
    }

    /// Reports that the target's further data has no reader.
    pub fn stop(&mut self, dial: DialId, now: Instant) {
        if let Some(connection) = self.connections.get_mut(&dial) {
            connection.discard();
            self.note_space(dial, now);
            match self.connections.get(&dial).map(|c| c.sending) {
                Some(Sending::Half) => self.send_close(dial, now),
                Some(Sending::Linger { .. }) => self.linger(dial, now),
                _ => {}
            }
        }
    }

    /// Cancels a connection or a dial; data under way may be lost.
    pub fn reset(&mut self, dial: DialId, reason: CloseReason, now: Instant) {
        let Some(connection) = self.connections.get_mut(&dial) else {
            return;
        };
        if connection.read_end().is_none() {
            match connection.connect_id {
                Some(id) => {
                    if !matches!(connection.sending, Sending::CloseSent(_)) {
                        self.transmit
                            .push_back(Packet::CloseRequest { connect_id: id });
                    }
                    self.close(id);
                }
                None => self
                    .transmit
                    .push_back(Packet::CloseDial { random: dial.0 }),
            }
        }
        if let Some(connection) = self.connections.get_mut(&dial) {
            connection.end(ReadEnd::Reset(reason));
            connection.discard();
            self.events
                .push_back(Event::Changed(connection.waker.clone()));
        }
        self.note_space(dial, now);
    }

    /// Releases a connection that has no user any more. A finished one still closes in order, any
    /// other is reset.
    pub fn release(&mut self, dial: DialId, now: Instant) {
        let Some(connection) = self.connections.get_mut(&dial) else {
            return;
        };
        if connection.read_end().is_none() && connection.sending != Sending::Open {
            connection.released = true;
            self.stop(dial, now);
            return;
        }
        self.reset(dial, CloseReason::Aborted, now);
        self.connections.remove(&dial);
    }

    /// Ends every connection, because the link is lost.
    pub fn close_all(&mut self, reason: CloseReason) {
        self.ids.clear();
        self.lingering.clear();
        self.slow_reader = None;
        self.connections.retain(|_, connection| {
            connection.end(ReadEnd::Link(reason));
            self.events
                .push_back(Event::Changed(connection.waker.clone()));
            !connection.released
        });
    }

    /// Whether a packet may be taken off the stream now.
    #[must_use]
    pub fn wants_packets(&self) -> bool {
        self.slow_reader.is_none()
    }

    /// Whether no connection and no dial is open.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.connections.is_empty()
    }

    /// Does everything due by `now`.
    ///
    /// # Errors
    /// [`StreamError::Lost`]: end the stream.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), StreamError> {
        if let Some(held) = self.slow_reader {
            if now >= held.until {
                self.reset_stalled(held.dial, now);
            }
            return Ok(());
        }
        if self.barriers.is_lost(now) {
            return Err(StreamError::Lost);
        }
        if self.barriers.falls_silent(now) {
            self.events.push_back(Event::Silent);
        }
        if !self.barriers.is_pending() && now >= self.heartbeat_at() {
            self.ask(None, now);
        }
        while let Some(&Reverse((at, dial))) = self.lingering.peek()
            && at <= now
        {
            self.lingering.pop();
            self.linger(dial, now);
        }
        Ok(())
    }

    /// Returns the next time at which to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self) -> Instant {
        if let Some(held) = self.slow_reader {
            return held.until;
        }
        let lingering = self.lingering.peek().map(|Reverse((at, _))| *at);
        let barrier = self.barriers.timeout().unwrap_or(self.heartbeat_at());
        lingering.map_or(barrier, |at| at.min(barrier))
    }

    /// Returns the next packet for the stream.
    pub fn poll_transmit(&mut self) -> Option<Packet> {
        self.transmit.pop_front()
    }

    /// Returns the next event.
    pub fn poll_event(&mut self) -> Option<Event<W>> {
        self.events.pop_front()
    }

    /// Sends CLOSE_REQ for a lingering connection when that is due, and gives the connection up
    /// when no answer follows.
    fn linger(&mut self, dial: DialId, now: Instant) {
        let connection = self.connections.get_mut(&dial);
        let Some(connection) = connection.filter(|c| c.read_end().is_none()) else {
            return;
        };
        if let Sending::CloseSent(at) = connection.sending {
            let released = connection.released;
            let due = self.barriers.resumed().max(at) + CLOSED_AFTER;
            if due > now || self.barriers.is_pending() {
                self.lingering.push(Reverse((due.max(now + QUIET), dial)));
            } else {
                self.reset(dial, CloseReason::ProtocolError, now);
                if released {
                    self.connections.remove(&dial);
                }
            }
            return;
        }
        match connection.due(now, self.barriers.resumed()) {
            None => {}
            Some(due) if due > now => self.lingering.push(Reverse((due, dial))),
            Some(_) => self.send_close(dial, now),
        }
    }

    /// Sends CLOSE_REQ for a connection.
    fn send_close(&mut self, dial: DialId, now: Instant) {
        let connection = self.connections.get_mut(&dial);
        let Some(connection) = connection.filter(|c| c.read_end().is_none()) else {
            return;
        };
        if let Some(connect_id) = connection.connect_id {
            connection.sending = Sending::CloseSent(now);
            self.transmit.push_back(Packet::CloseRequest { connect_id });
            self.lingering.push(Reverse((now + CLOSED_AFTER, dial)));
        }
    }

    fn reset_stalled(&mut self, dial: DialId, now: Instant) {
        if let Some(connection) = self.connections.get(&dial) {
            self.events
                .push_back(Event::Stalled(connection.waker.clone()));
        }
        // It may have been told to close already, or have closed: then only its bytes are dropped.
        self.reset(dial, CloseReason::Stalled, now);
    }

    /// Notes that CLOSE_REQ for `id` was sent.
    fn close(&mut self, id: i64) {
        let after = self.barriers.sent();
        self.ids.insert(id, IdOwner::Closing(after));
        self.closing.push_back((after, id));
    }

    fn ask(&mut self, dial: Option<DialId>, now: Instant) {
        let connect_id = self.barriers.ask(dial, now);
        self.transmit.push_back(Packet::CloseRequest { connect_id });
    }

    fn heartbeat_at(&self) -> Instant {
        let interval = if self.connections.is_empty() {
            HEARTBEAT_IDLE
        } else {
            HEARTBEAT_BUSY
        };
        self.barriers.heard() + interval
    }

    /// Notes that data of `dial` was read or dropped.
    fn note_space(&mut self, dial: DialId, now: Instant) {
        let Some(held) = self.slow_reader.as_mut().filter(|held| held.dial == dial) else {
            return;
        };
        if self.connections.get(&dial).is_some_and(Connection::is_full) {
            held.until = now + STALLED_AFTER;
        } else {
            self.slow_reader = None;
            self.barriers.resume(now);
        }
    }
}

#[cfg(test)]
mod tests;
