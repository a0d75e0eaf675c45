//! One dial and its connection.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;

use super::backlog::Backlog;
use super::{LINGER, QUIET, RECEIVE_QUEUE};
use crate::close::CloseReason;

/// The most that is read at once, in chunks: one vectored write's worth.
const CHUNKS: usize = 32;

/// Maximum length of an agent's text that is stored, in bytes.
const MAX_TEXT: usize = 4096;

/// Cost of a chunk beside its bytes: an agent may send single bytes.
const CHUNK_COST: usize = 64;

/// Answer of an agent to a dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The target is connected.
    Connected,
    /// The dial failed, for this reason of the agent.
    Failed(String),
    /// No answer will follow.
    Ended(ReadEnd),
}

/// Reason why the target sends no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadEnd {
    /// The target closed, by itself or at CLOSE_REQ.
    Finished,
    /// The connection was cancelled, by either side.
    Reset(CloseReason),
    /// The stream was lost.
    Link(CloseReason),
}

/// Reason why the target gets no more data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteEnd {
    /// The target has closed at CLOSE_REQ.
    Closed,
    /// The target has closed by itself.
    ClosedByTarget,
    /// The connection was cancelled, by either side.
    Reset(CloseReason),
    /// The stream was lost.
    Link(CloseReason),
}

/// State of the direction towards the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sending {
    /// More may follow.
    Open,
    /// The client has ended; the agent may not have taken everything off the stream.
    Barrier(ExpectedData),
    /// The agent has taken everything, and the target has time for it.
    Linger {
        /// Further data to wait for.
        expected: ExpectedData,
        /// Latest end of the wait.
        until: Instant,
    },
    /// An agent that supports halves has received the end of file: the target may still send.
    Half,
    /// CLOSE_REQ was sent, at this moment.
    CloseSent(Instant),
}

/// Data that a client without further bytes may still receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExpectedData {
    /// None: only the target's reading of the earlier bytes counts.
    Nothing,
    /// The rest of an answer that has begun.
    Rest,
    /// An answer.
    Answer,
}

#[derive(Debug)]
pub(super) struct Connection<W> {
    pub(super) waker: W,
    /// The agent's name for it, once it is connected.
    pub(super) connect_id: Option<i64>,
    pub(super) sending: Sending,
    /// Bytes that the target may have yet to read.
    pub(super) backlog: Backlog,
    /// Data that a client without further bytes may receive, as far as its bytes tell.
    pub(super) expected: ExpectedData,
    /// Time of the target's last data.
    heard: Option<Instant>,
    /// The connection has no user any more.
    pub(super) released: bool,
    failure: Option<String>,
    unread: VecDeque<Bytes>,
    unread_cost: usize,
    discarding: bool,
    end: Option<ReadEnd>,
}

impl<W> Connection<W> {
    pub(super) fn new(waker: W) -> Self {
        Self {
            waker,
            connect_id: None,
            sending: Sending::Open,
            backlog: Backlog::default(),
            expected: ExpectedData::Rest,
            heard: None,
            released: false,
            failure: None,
            unread: VecDeque::new(),
            unread_cost: 0,
            discarding: false,
            end: None,
        }
    }

    pub(super) fn is_dialling(&self) -> bool {
        self.connect_id.is_none() && self.end.is_none()
    }

    pub(super) fn answer(&self) -> Option<Answer> {
        match (&self.failure, self.connect_id, self.end) {
            (Some(text), _, _) => Some(Answer::Failed(text.clone())),
            // What came before the end is there to be read.
            (None, Some(_), _) => Some(Answer::Connected),
            (None, None, end) => end.map(Answer::Ended),
        }
    }

    /// Notes that the agent could not connect.
    pub(super) fn fail(&mut self, mut text: String) {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        self.failure = Some(text);
        self.end(ReadEnd::Reset(CloseReason::DialFailed));
    }

    /// Returns the id for DATA while data may be sent.
    pub(super) fn sends_as(&self) -> Option<i64> {
        let open = self.sending == Sending::Open && self.end.is_none();
        self.connect_id.filter(|_| open)
    }

    pub(super) fn receive(&mut self, data: Bytes, now: Instant) {
        self.heard = Some(now);
        self.expected = ExpectedData::Rest;
        if !self.discarding && !data.is_empty() {
            self.unread_cost += data.len() + CHUNK_COST;
            self.unread.push_back(data);
        }
    }

    /// Returns the time for CLOSE_REQ of a lingering connection; `resumed` is the time since which
    /// the driver reads the stream.
    pub(super) fn due(&self, now: Instant, resumed: Instant) -> Option<Instant> {
        let Sending::Linger { expected, until } = self.sending else {
            return None;
        };
        let written = self.backlog.written(now);
        Some(match expected {
            _ if self.discarding => written,
            ExpectedData::Nothing => written,
            // What came while the stream was held has yet to be seen.
            ExpectedData::Rest => {
                let heard = self.heard.unwrap_or(until - LINGER).max(resumed);
                (heard + QUIET).min(until.max(resumed + QUIET)).max(written)
            }
            ExpectedData::Answer => until.max(resumed + QUIET).max(written),
        })
    }

    pub(super) fn is_full(&self) -> bool {
        self.unread_cost >= RECEIVE_QUEUE
    }

    /// Whether there was something to read.
    pub(super) fn read(&mut self, into: &mut Vec<Bytes>) -> Result<bool, ReadEnd> {
        if self.unread.is_empty() {
            return self.end.map_or(Ok(false), Err);
        }
        for chunk in self.unread.drain(..CHUNKS.min(self.unread.len())) {
            self.unread_cost -= chunk.len() + CHUNK_COST;
            into.push(chunk);
        }
        Ok(true)
    }

    /// Drops unread and future data.
    pub(super) fn discard(&mut self) {
        self.discarding = true;
        self.unread = VecDeque::new();
        self.unread_cost = 0;
    }

    pub(super) fn is_discarding(&self) -> bool {
        self.discarding
    }

    /// Ends the connection. The first end stays.
    pub(super) fn end(&mut self, end: ReadEnd) {
        self.end.get_or_insert(end);
    }

    pub(super) fn read_end(&self) -> Option<ReadEnd> {
        self.end
    }

    pub(super) fn write_end(&self) -> Option<WriteEnd> {
        Some(match self.end? {
            ReadEnd::Finished if self.sending == Sending::Open => WriteEnd::ClosedByTarget,
            ReadEnd::Finished => WriteEnd::Closed,
            ReadEnd::Reset(reason) => WriteEnd::Reset(reason),
            ReadEnd::Link(reason) => WriteEnd::Link(reason),
        })
    }
}
