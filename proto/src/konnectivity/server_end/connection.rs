//! One dial and the connection that comes of it.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;

use super::RECEIVE_QUEUE;
use super::backlog::Backlog;
use crate::close::CloseReason;

/// The most that is read at once, in chunks: one vectored write's worth.
const CHUNKS: usize = 32;

/// The longest text of an agent that is kept, in bytes.
const MAX_TEXT: usize = 4096;

/// What a chunk counts beside its bytes: an agent may send them one by one.
const CHUNK_COST: usize = 64;

/// What an agent said to a dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The target is connected.
    Connected,
    /// It is not, for the reason that the agent gives.
    Failed(String),
    /// There will be no answer.
    Ended(ReadEnd),
}

/// Why nothing more will come from the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadEnd {
    /// The target closed, or did as it was told.
    Finished,
    /// The connection was given up, by either side.
    Reset(CloseReason),
    /// The stream is gone.
    Link(CloseReason),
}

/// Why nothing more can be sent to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteEnd {
    /// It was told to close, and did.
    Closed,
    /// It has closed by itself.
    Gone,
    /// The connection was given up, by either side.
    Reset(CloseReason),
    /// The stream is gone.
    Link(CloseReason),
}

/// How far the direction towards the target has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sending {
    /// More may follow.
    Open,
    /// Nothing more follows; the agent may not have taken all of it off the stream.
    Barrier,
    /// It has: now the target is to have its time.
    Quiet {
        /// When something last came from it, or will be taken by it.
        heard: Instant,
        /// When its time is over, whatever comes.
        until: Instant,
    },
    /// CLOSE_REQ was sent.
    Told,
}

#[derive(Debug)]
pub(super) struct Connection<W> {
    pub(super) waker: W,
    /// The agent's name for it, once it is connected.
    pub(super) connect_id: Option<i64>,
    pub(super) sending: Sending,
    /// What the target may have yet to take.
    pub(super) backlog: Backlog,
    /// Nobody asks after it any more.
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

    /// The agent could not connect.
    pub(super) fn fail(&mut self, mut text: String) {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        self.failure = Some(text);
        self.end(ReadEnd::Reset(CloseReason::DialFailed));
    }

    /// The id for DATA, for as long as any may be sent.
    pub(super) fn sends_as(&self) -> Option<i64> {
        let open = self.sending == Sending::Open && self.end.is_none();
        self.connect_id.filter(|_| open)
    }

    pub(super) fn receive(&mut self, data: Bytes, now: Instant) {
        if let Sending::Quiet { heard, .. } = &mut self.sending {
            *heard = now.max(*heard);
        }
        if !self.discarding && !data.is_empty() {
            self.unread_cost += data.len() + CHUNK_COST;
            self.unread.push_back(data);
        }
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

    /// Drops what is unread, and what will come.
    pub(super) fn discard(&mut self) {
        self.discarding = true;
        self.unread = VecDeque::new();
        self.unread_cost = 0;
    }

    /// The first end stands.
    pub(super) fn end(&mut self, end: ReadEnd) {
        self.end.get_or_insert(end);
    }

    pub(super) fn read_end(&self) -> Option<ReadEnd> {
        self.end
    }

    pub(super) fn write_end(&self) -> Option<WriteEnd> {
        Some(match self.end? {
            ReadEnd::Finished if self.sending == Sending::Open => WriteEnd::Gone,
            ReadEnd::Finished => WriteEnd::Closed,
            ReadEnd::Reset(reason) => WriteEnd::Reset(reason),
            ReadEnd::Link(reason) => WriteEnd::Link(reason),
        })
    }
}
