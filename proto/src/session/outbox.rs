//! Messages that wait to be sent.
//!
//! Until the session is established only the introduction leaves. Earlier messages wait behind it,
//! so that a driver may send at any time.

use std::collections::VecDeque;

use bytes::Bytes;

use super::SessionError;
use crate::control::envelope::Message;
use crate::control::{Envelope, encode};

/// The most bytes that may wait to be sent.
pub const MAX_QUEUED: usize = 256 * 1024;

#[derive(Debug, Default)]
pub(super) struct Outbox {
    ready: VecDeque<Bytes>,
    /// Messages queued before the session was established.
    early: VecDeque<Bytes>,
    established: bool,
    queued: usize,
}

impl Outbox {
    /// Queues Hello or Welcome.
    pub(super) fn introduce(&mut self, message: Message) -> Result<(), SessionError> {
        let frame = self.frame(message)?;
        self.ready.push_back(frame);
        Ok(())
    }

    /// Establishes the session: the queued messages may leave.
    pub(super) fn establish(&mut self) {
        self.established = true;
        self.ready.append(&mut self.early);
    }

    /// Queues any other message.
    pub(super) fn push(&mut self, message: Message) -> Result<(), SessionError> {
        let frame = self.frame(message)?;
        if self.established {
            &mut self.ready
        } else {
            &mut self.early
        }
        .push_back(frame);
        Ok(())
    }

    pub(super) fn pop(&mut self) -> Option<Bytes> {
        let frame = self.ready.pop_front()?;
        self.queued -= frame.len();
        Some(frame)
    }

    fn frame(&mut self, message: Message) -> Result<Bytes, SessionError> {
        let envelope = Envelope {
            message: Some(message),
        };
        let frame = encode(&envelope).map_err(SessionError::Unsendable)?;
        if self.queued + frame.len() > MAX_QUEUED {
            return Err(SessionError::Backlog);
        }
        self.queued += frame.len();
        Ok(frame)
    }
}
