//! The server's end of an agent's stream, without I/O: dials, the connections that come of them,
//! and what tells a living agent from a wedged one.
//!
//! One stream carries everything, in order and without flow control of its own, and the agent
//! handles packets one at a time. Three things follow.
//!
//! **The barrier.** A CLOSE_REQ for a connection that can't exist (ids count up from 1, ours are
//! below 0) is answered by every agent, in turn. Its answer says that all that was sent before has
//! been taken off the stream. So it is the heartbeat as well: [`Event::Silent`] after
//! [`SILENT_AFTER`] without an answer, [`Event::Alive`] at the next, and the end after [`LOST_AFTER`].
//! A fresh agent counts as silent until it has answered once.
//!
//! **Closing.** An agent that is told to close throws away what it has yet to write to the target, and
//! the protocol knows no half-close. So a client's end of file is not passed on at once. First a barrier,
//! then the target gets the time to take what the agent may hold of it, at [`SLOWEST_TARGET`]. A client
//! that reads no more ([`ServerEnd::stop`]) waits for nothing else, nor does one whose last word ends a
//! session ([`ServerEnd::says_goodbye`]): CLOSE_REQ follows. For one that is known to read on
//! ([`ServerEnd::finish_half`]), and one whose bytes the target has not answered, answers are taken for
//! [`LINGER`]. Of any other it is not known whether it reads on: the rest of its answer is taken until the
//! target has been quiet for [`QUIET`]. What is lost all the same: what a slower target has not taken, and
//! an answer that comes later than that. What comes from the target is never lost: the agent sends it
//! before CLOSE_RSP, and it can be read after that.
//!
//! **Halves.** An agent of ours says that it knows of them ([`ServerEnd::with_halves`]): to it DATA
//! without data is the end of file, behind all that was sent, and the target may go on. CLOSE_REQ follows
//! when nothing of that is read any more. So nothing is waited for.
//!
//! **Slow readers.** A connection holds at most [`RECEIVE_QUEUE`] bytes and one packet that nobody
//! has read. Beyond, nothing more is to be taken off the stream ([`ServerEnd::wants_packets`]),
//! which stops its neighbours as well. A reader that takes nothing for [`STALLED_AFTER`] then loses
//! its connection, and the others go on. Clocks that run against the agent stand still meanwhile.
//!
//! Bounds: what is kept is what our own dials opened, plus [`MAX_CLOSING`] ids. Every dial ends, by
//! its answer or when it is given up, which is the caller's to do in time. Who may be dialled, when
//! packets are written and what a connection is otherwise known by (`W`) is left to the driver.

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
use self::connection::{Await, Connection, Sending};
use super::{MAX_DATA, Packet};
use crate::close::CloseReason;

pub use self::connection::{Answer, ReadEnd, WriteEnd};

/// Bytes of one connection that may wait to be read before the stream is held.
pub const RECEIVE_QUEUE: usize = 1 << 20;

/// A held stream goes on at the expense of the reader that takes nothing for so long.
pub const STALLED_AFTER: Duration = Duration::from_secs(10);

/// Between an answered barrier and the next, while there are connections.
pub const HEARTBEAT_BUSY: Duration = Duration::from_millis(2500);

/// The same without any.
pub const HEARTBEAT_IDLE: Duration = Duration::from_secs(10);

/// An agent that has not answered a barrier for so long gets no new dials.
pub const SILENT_AFTER: Duration = Duration::from_secs(5);

/// One that has not answered for so long is lost: only a new stream gets past what blocks it. Long,
/// since the target that blocks it may still go on, and with it everybody on the stream.
pub const LOST_AFTER: Duration = Duration::from_secs(300);

/// A target that has sent nothing for so long has no more to say to a client that may have left.
pub const QUIET: Duration = Duration::from_millis(500);

/// What a target is taken to read at least, in bytes a second: for so long it is left what the agent
/// may hold of what was sent to it.
pub const SLOWEST_TARGET: u32 = 1 << 20;

/// The most that an agent holds for one target: 150 packets of ours.
const AGENT_QUEUE: usize = 150 * MAX_DATA;

/// For so long answers are taken after a client's end of file.
pub const LINGER: Duration = Duration::from_secs(10);

/// A connection that the agent was told to close is given up when it has not said for so long that
/// it has, though it answers barriers.
pub const CLOSED_AFTER: Duration = Duration::from_secs(30);

/// Ids that the agent has been told to close and may not have closed yet.
pub const MAX_CLOSING: usize = 16 * 1024;

/// A dial, and the connection that comes of it: what the wire calls `random`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DialId(pub i64);

/// The dial's id is in use on this stream: choose another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("dial id {} is in use on this stream", .0.0)]
pub struct InUse(pub DialId);

/// Why a stream can't go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum StreamError {
    /// The agent handles no packets any more.
    #[error(
        "the agent has taken nothing off the stream for {} s: a target that reads nothing may block it",
        LOST_AFTER.as_secs()
    )]
    Lost,
    /// The agent goes on about connections that it was told to close.
    #[error("the agent names more than {MAX_CLOSING} connections that are not known here")]
    Flood,
}

impl StreamError {
    /// What it is in the closed set.
    #[must_use]
    pub fn reason(self) -> CloseReason {
        match self {
            Self::Lost => CloseReason::IdleTimeout,
            Self::Flood => CloseReason::ProtocolError,
        }
    }
}

/// What the driver is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<W> {
    /// Something about this connection has changed: whoever waits for it may look again.
    Changed(W),
    /// Its reader took nothing for [`STALLED_AFTER`] and held up the others: it was reset.
    Stalled(W),
    /// The agent answers: at first, and after each [`Event::Silent`].
    Alive,
    /// The agent has not answered for [`SILENT_AFTER`].
    Silent,
    /// The agent is about to leave: dials should go elsewhere where they can.
    Draining,
}

/// The server's end of one agent's stream. After each call the driver takes what there is from
/// [`poll_transmit`](Self::poll_transmit) and [`poll_event`](Self::poll_event).
#[derive(Debug)]
pub struct ServerEnd<W> {
    connections: HashMap<DialId, Connection<W>>,
    /// What the agent's ids stand for.
    ids: HashMap<i64, Holder>,
    /// Ids that are being closed, oldest first, with the last barrier that was sent before.
    closing: VecDeque<(u64, i64)>,
    barriers: Barriers,
    /// When connections that linger want to be looked at.
    lingering: BinaryHeap<Reverse<(Instant, DialId)>>,
    held: Option<Held>,
    /// Whether the agent knows of halves.
    halves: bool,
    transmit: VecDeque<Packet>,
    events: VecDeque<Event<W>>,
}

/// What an agent's id stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Connection(DialId),
    /// Told to close, after this many barriers; what still comes of it is dropped.
    Closing(u64),
}

/// The connection whose reader is waited for.
#[derive(Debug, Clone, Copy)]
struct Held {
    dial: DialId,
    until: Instant,
}

impl<W: Clone> ServerEnd<W> {
    /// An end that asks its first question at once.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        let mut end = Self {
            connections: HashMap::new(),
            ids: HashMap::new(),
            closing: VecDeque::new(),
            barriers: Barriers::new(now),
            lingering: BinaryHeap::new(),
            held: None,
            halves: false,
            transmit: VecDeque::new(),
            events: VecDeque::new(),
        };
        end.ask(None, now);
        end
    }

    /// The same for an agent that knows of halves, if `halves`.
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

    /// What the agent said to a dial; `None` while it has said nothing.
    #[must_use]
    pub fn answer(&self, dial: DialId) -> Option<Answer> {
        self.connections.get(&dial)?.answer()
    }

    /// The id that DATA towards the target carries; `None` before the answer and after the end.
    #[must_use]
    pub fn connect_id(&self, dial: DialId) -> Option<i64> {
        self.connections.get(&dial)?.sends_as()
    }

    /// Appends some of what the target has sent; `Ok(false)`: there is nothing yet.
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
            self.made_room(dial, now);
        }
        Ok(read)
    }

    /// Why nothing that waits to be read counts any more; `None` unless the connection was reset.
    #[must_use]
    pub fn reset_reason(&self, dial: DialId) -> Option<CloseReason> {
        match self.connections.get(&dial)?.read_end()? {
            ReadEnd::Reset(reason) => Some(reason),
            ReadEnd::Finished | ReadEnd::Link(_) => None,
        }
    }

    /// Why nothing more can be sent to the target; `None` while it can.
    #[must_use]
    pub fn write_end(&self, dial: DialId) -> Option<WriteEnd> {
        self.connections.get(&dial)?.write_end()
    }

    /// `bytes` of DATA were sent to the target.
    pub fn sent(&mut self, dial: DialId, bytes: usize, now: Instant) {
        if let Some(connection) = self.connections.get_mut(&dial) {
            connection.backlog.add(bytes, now);
            connection.awaits = Await::Answer;
        }
    }

    /// What was sent last ends a session within the connection: it wants no answer.
    pub fn says_goodbye(&mut self, dial: DialId) {
        if let Some(connection) = self.connections.get_mut(&dial) {
            connection.awaits = Await::Nothing;
        }
    }

    /// Nothing more will be sent to the target: it is told when it has had time to take what was, and
    /// to answer where an answer may be waited for.
    pub fn finish(&mut self, dial: DialId, now: Instant) {
        let awaits = self.connections.get(&dial).map(|c| c.awaits);
        self.finish_awaiting(dial, awaits.unwrap_or(Await::Rest), now);
    }

    /// As [`finish`](Self::finish), of a client that is known to read on.
    pub fn finish_half(&mut self, dial: DialId, now: Instant) {
        self.finish_awaiting(dial, Await::Answer, now);
    }

    fn finish_awaiting(&mut self, dial: DialId, awaits: Await, now: Instant) {
        let connection = self.connections.get_mut(&dial);
        let Some(connection) = connection.filter(|c| c.sends_as().is_some()) else {
            return;
        };
        if !self.halves {
            connection.sending = Sending::Barrier(awaits);
            return self.ask(Some(dial), now);
        }
        connection.sending = Sending::Half;
        if let Some(connect_id) = connection.connect_id {
            let data = Bytes::new();
            self.transmit.push_back(Packet::Data { connect_id, data });
        }
        if connection.is_discarding() {
            self.tell(dial, now);
        }
    }

    /// Nothing more of what the target sends will be read.
    pub fn stop(&mut self, dial: DialId, now: Instant) {
        if let Some(connection) = self.connections.get_mut(&dial) {
            connection.discard();
            self.made_room(dial, now);
            match self.connections.get(&dial).map(|c| c.sending) {
                Some(Sending::Half) => self.tell(dial, now),
                Some(Sending::Linger { .. }) => self.linger(dial, now),
                _ => {}
            }
        }
    }

    /// Gives a connection or a dial up: what is under way may be lost.
    pub fn reset(&mut self, dial: DialId, reason: CloseReason, now: Instant) {
        let Some(connection) = self.connections.get_mut(&dial) else {
            return;
        };
        if connection.read_end().is_none() {
            match connection.connect_id {
                Some(id) => {
                    if !matches!(connection.sending, Sending::Told(_)) {
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
        self.made_room(dial, now);
    }

    /// Nobody asks after this connection any more. One that was finished is still closed in order,
    /// any other is reset.
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

    /// The link is gone, and every connection with it.
    pub fn close_all(&mut self, reason: CloseReason) {
        self.ids.clear();
        self.lingering.clear();
        self.held = None;
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
        self.held.is_none()
    }

    /// Whether no connection and no dial is open.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.connections.is_empty()
    }

    /// Does what is due by `now`; nothing if nothing is.
    ///
    /// # Errors
    /// [`StreamError::Lost`]: end the stream.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), StreamError> {
        if let Some(held) = self.held {
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
        if !self.barriers.awaits() && now >= self.heartbeat_at() {
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

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Instant {
        if let Some(held) = self.held {
            return held.until;
        }
        let lingering = self.lingering.peek().map(|Reverse((at, _))| *at);
        let barrier = self.barriers.timeout().unwrap_or(self.heartbeat_at());
        lingering.map_or(barrier, |at| at.min(barrier))
    }

    /// The next packet for the stream.
    pub fn poll_transmit(&mut self) -> Option<Packet> {
        self.transmit.pop_front()
    }

    /// The next thing to know.
    pub fn poll_event(&mut self) -> Option<Event<W>> {
        self.events.pop_front()
    }

    /// A connection that lingers is told to close when it is due, and given up when it does not.
    fn linger(&mut self, dial: DialId, now: Instant) {
        let connection = self.connections.get_mut(&dial);
        let Some(connection) = connection.filter(|c| c.read_end().is_none()) else {
            return;
        };
        if let Sending::Told(at) = connection.sending {
            let released = connection.released;
            let due = self.barriers.resumed().max(at) + CLOSED_AFTER;
            if due > now || self.barriers.awaits() {
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
            Some(_) => self.tell(dial, now),
        }
    }

    /// Tells the agent to close a connection for good.
    fn tell(&mut self, dial: DialId, now: Instant) {
        let connection = self.connections.get_mut(&dial);
        let Some(connection) = connection.filter(|c| c.read_end().is_none()) else {
            return;
        };
        if let Some(connect_id) = connection.connect_id {
            connection.sending = Sending::Told(now);
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

    /// The agent has been told to close `id`.
    fn close(&mut self, id: i64) {
        let after = self.barriers.sent();
        self.ids.insert(id, Holder::Closing(after));
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

    /// Something of `dial` was read or thrown away.
    fn made_room(&mut self, dial: DialId, now: Instant) {
        let Some(held) = self.held.as_mut().filter(|held| held.dial == dial) else {
            return;
        };
        if self.connections.get(&dial).is_some_and(Connection::is_full) {
            held.until = now + STALLED_AFTER;
        } else {
            self.held = None;
            self.barriers.resume(now);
        }
    }
}

#[cfg(test)]
mod tests;
