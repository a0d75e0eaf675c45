//! One dial and the connection that comes of it.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;

use super::backlog::Backlog;
use super::{LINGER, QUIET, RECEIVE_QUEUE};
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
    Barrier(Await),
    /// It has: now the target is to have its time.
    Linger {
        /// What else is waited for.
        awaits: Await,
        /// When its time is over, whatever comes.
        until: Instant,
    },
    /// The target was told of the end of file by an agent that knows of halves: it may still send.
    Half,
    /// CLOSE_REQ was sent, at this moment.
    Told(Instant),
}

/// What a client may still wait for that sends no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Await {
    /// Nothing: only that the target takes what was sent.
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
    /// What the target may have yet to take.
    pub(super) backlog: Backlog,
    /// What a client that sends no more may wait for, as far as its bytes tell.
    pub(super) awaits: Await,
    /// When the target last sent something.
    heard: Option<Instant>,
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
            awaits: Await::Rest,
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
        self.heard = Some(now);
        self.awaits = Await::Rest;
        if !self.discarding && !data.is_empty() {
            self.unread_cost += data.len() + CHUNK_COST;
            self.unread.push_back(data);
        }
    }

    /// When a connection that lingers is to be told; `resumed` is since when its stream is read.
    pub(super) fn due(&self, now: Instant, resumed: Instant) -> Option<Instant> {
        let Sending::Linger { awaits, until } = self.sending else {
            return None;
        };
        let written = self.backlog.written(now);
        Some(match awaits {
            _ if self.discarding => written,
            Await::Nothing => written,
            // What came while the stream was held has yet to be seen.
            Await::Rest => {
                let heard = self.heard.unwrap_or(until - LINGER).max(resumed);
                (heard + QUIET).min(until.max(resumed + QUIET)).max(written)
            }
            Await::Answer => until.max(resumed + QUIET).max(written),
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

    /// Drops what is unread, and what will come.
    pub(super) fn discard(&mut self) {
        self.discarding = true;
        self.unread = VecDeque::new();
        self.unread_cost = 0;
    }

    pub(super) fn is_discarding(&self) -> bool {
        self.discarding
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
