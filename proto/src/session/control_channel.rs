//! The common part of the two ends of a session: framing both ways, life signs, Ping, Drain.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::SessionError;
use super::liveness::{Liveness, Timers};
use super::message::milliseconds;
use super::outbox::Outbox;
use crate::close::CloseReason;
use crate::control::envelope::Message;
use crate::control::{Drain, FrameDecoder, Ping, Pong};

#[derive(Debug)]
pub(super) struct ControlChannel {
    frames: FrameDecoder,
    outbox: Outbox,
    liveness: Liveness,
}

impl ControlChannel {
    pub(super) fn new(timers: Timers, now: Instant) -> Self {
        Self {
            frames: FrameDecoder::default(),
            outbox: Outbox::default(),
            liveness: Liveness::new(timers, now),
        }
    }

    /// Sends the first message.
    pub(super) fn introduce(&mut self, message: Message) -> Result<(), SessionError> {
        self.outbox.introduce(message)
    }

    /// Establishes the session: messages that were queued early may leave, and life signs count
    /// from now.
    pub(super) fn establish(&mut self, heartbeat_wish: Duration, now: Instant) {
        self.outbox.establish();
        self.liveness.heard(now);
        self.liveness.apply_peer_interval(heartbeat_wish);
    }

    /// Bytes arrived. Whether the peer was silent until now.
    pub(super) fn heard(&mut self, now: Instant) -> bool {
        self.liveness.heard(now)
    }

    /// Returns the next message that this release knows.
    pub(super) fn receive(&mut self, input: &mut &[u8]) -> Result<Option<Message>, SessionError> {
        while let Some(envelope) = self.frames.decode(input)? {
            if envelope.message.is_some() {
                return Ok(envelope.message);
            }
        }
        Ok(None)
    }

    pub(super) fn send(&mut self, message: Message) -> Result<(), SessionError> {
        self.outbox.push(message)
    }

    pub(super) fn drain(
        &mut self,
        deadline: Duration,
        reason: CloseReason,
    ) -> Result<(), SessionError> {
        let deadline_ms = milliseconds(deadline);
        self.send(Message::Drain(Drain {
            deadline_ms,
            reason: reason.code(),
        }))
    }

    pub(super) fn handle_ping(&mut self, ping: Ping) -> Result<(), SessionError> {
        self.send(Message::Pong(Pong { seq: ping.seq }))
    }

    pub(super) fn handle_pong(&mut self, pong: Pong, now: Instant) {
        self.liveness.answered(pong.seq, now);
    }

    /// Sends the Ping that is due. Whether the peer has just become silent.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Result<bool, SessionError> {
        let due = self.liveness.handle_timeout(now);
        if let Some(seq) = due.ping {
            self.send(Message::Ping(Ping { seq }))?;
        }
        Ok(due.silent)
    }

    /// See [`Liveness::challenge`].
    pub(super) fn challenge(&mut self, limit: Duration, now: Instant) {
        self.liveness.challenge(limit, now);
    }

    pub(super) fn poll_transmit(&mut self) -> Option<Bytes> {
        self.outbox.pop()
    }

    pub(super) fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    pub(super) fn note_traffic(&mut self, now: Instant) {
        self.liveness.note_traffic(now);
    }
}

/// Returns the end of a drain, and its reason. A reason that this release does not know is
/// `Drained`.
pub(super) fn from_drain(drain: Drain, now: Instant) -> (Instant, CloseReason) {
    let deadline = now + Duration::from_millis(drain.deadline_ms.into());
    (
        deadline,
        CloseReason::from_code(drain.reason).unwrap_or(CloseReason::Drained),
    )
}
