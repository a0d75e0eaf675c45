//! One direction of a session at its sender.

use bytes::Bytes;
use tunnel_proto::handover;
use tunnel_proto::resumption::Accepted;

use super::saved::{InvalidState, is_offset};
use super::violation::Violation;

/// Bytes on their way from the local socket to the other end.
///
/// Invariant: `confirmed <= sent <= ever_sent <= taken`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outbound {
    /// Number of bytes taken from the local socket.
    taken: u64,
    /// Offset of the next byte to send on the present stream.
    sent: u64,
    /// Highest offset that any stream has carried.
    ever_sent: u64,
    /// Number of bytes that the kernel of the other end has accepted.
    confirmed: u64,
    /// Offset from which on every byte is kept; `None` while none is.
    kept_from: Option<u64>,
    /// Whether the local socket has reached its end of file, behind the taken bytes.
    is_ended: bool,
    /// Whether the transport of the other end has received everything, on the present stream.
    is_acknowledged: bool,
    /// Whether the other end has passed the end of file on.
    is_finished: bool,
    /// Whether the other end has passed the end of file on, or takes no more.
    is_done: bool,
}

impl Outbound {
    /// Notes `n` bytes taken from the local socket.
    pub fn take(&mut self, n: u64) {
        self.taken += n;
    }

    /// Notes the end of file of the local socket.
    pub fn end(&mut self) {
        self.is_ended = true;
    }

    /// Notes `n` bytes given to the present stream.
    pub fn send(&mut self, n: u64) {
        self.sent = (self.sent + n).min(self.taken);
        self.ever_sent = self.ever_sent.max(self.sent);
    }

    /// Returns the number of bytes that wait to be sent on the present stream.
    pub fn unsent(&self) -> u64 {
        if self.is_done {
            return 0;
        }
        self.taken - self.sent
    }

    /// Returns the offset of the next byte to send.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Returns the number of bytes that the other end has confirmed.
    pub fn confirmed(&self) -> u64 {
        self.confirmed
    }

    /// Returns the number of bytes taken from the local socket.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Notes that the transport of the other end has received all bytes and the end of file.
    pub fn acknowledge(&mut self) {
        self.is_acknowledged = true;
    }

    /// Whether the transport of the other end has received everything. That says nothing of its socket.
    pub fn is_acknowledged(&self) -> bool {
        self.is_acknowledged
    }

    /// Whether the end of file is to be sent now.
    pub fn is_at_end(&self) -> bool {
        self.is_ended && !self.is_done && self.sent == self.taken
    }

    /// Whether the other end needs nothing more of this direction.
    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// Whether the other end has accepted all bytes in front of the end of file.
    pub fn is_confirmed_to_its_end(&self) -> bool {
        self.is_ended && self.confirmed == self.taken
    }

    /// Whether the other end has passed the end of file on.
    pub fn is_finished(&self) -> bool {
        self.is_finished
    }

    /// Returns the number of kept bytes.
    pub fn kept(&self) -> u64 {
        match self.kept_from {
            Some(from) if !self.is_done => self.taken - self.confirmed.max(from),
            _ => 0,
        }
    }

    /// Keeps every byte that is taken from now on.
    pub fn keep(&mut self) {
        self.kept_from.get_or_insert(self.taken);
    }

    /// Keeps nothing any more. Returns the number of kept bytes to release.
    pub fn keep_nothing(&mut self) -> u64 {
        let kept = self.kept();
        self.kept_from = None;
        kept
    }

    /// Whether the direction survives the loss of the tunnel: every byte that may be lost with it is
    /// kept.
    pub fn is_safe(&self) -> bool {
        self.is_done || self.kept_from.is_some_and(|from| self.confirmed >= from)
    }

    /// Takes in the progress of the other end. Returns the number of kept bytes to release.
    ///
    /// # Errors
    /// [`Violation`]: the other end confirms bytes that no stream carried, takes back a confirmation, or
    /// confirms an end of file that there is not.
    pub fn confirm(&mut self, accepted: &Accepted) -> Result<u64, Violation> {
        if self.is_done {
            return Ok(0);
        }
        if accepted.written > self.sent {
            return Err(Violation::TooMuch);
        }
        // Of a direction that takes no more, a process that was killed may have forgotten how far it came.
        if accepted.written < self.confirmed && !accepted.is_refused {
            return Err(Violation::Backwards);
        }
        if accepted.is_finished && (!self.is_ended || accepted.written != self.taken) {
            return Err(Violation::NoEnd);
        }
        let before = self.kept();
        self.confirmed = self.confirmed.max(accepted.written);
        self.is_finished = accepted.is_finished;
        self.is_done = accepted.is_finished || accepted.is_refused;
        Ok(before - self.kept())
    }

    /// Gives the direction up. Returns the number of kept bytes to release.
    pub fn abandon(&mut self) -> u64 {
        let kept = self.kept();
        self.is_done = true;
        kept
    }

    /// Notes the end of the present stream: what any stream has carried may be confirmed.
    pub fn detach(&mut self) {
        self.sent = self.ever_sent;
    }

    /// Continues on another stream, which begins at the first unconfirmed byte.
    pub fn resume(&mut self) {
        self.sent = self.confirmed;
        self.is_acknowledged = false;
    }

    /// Returns the direction, without a stream, for another process; `kept` are the kept bytes.
    pub(super) fn save(&self, kept: Bytes) -> handover::Outbound {
        handover::Outbound {
            taken: self.taken,
            ever_sent: self.ever_sent,
            confirmed: self.confirmed,
            is_ended: self.is_ended,
            is_finished: self.is_finished,
            is_done: self.is_done,
            kept,
        }
    }

    /// Restores a direction that another process has [saved](Self::save).
    ///
    /// # Errors
    /// The numbers contradict each other, or the kept bytes.
    pub(super) fn restore(saved: &handover::Outbound) -> Result<Self, InvalidState> {
        let restored = Self {
            taken: saved.taken,
            sent: saved.ever_sent,
            ever_sent: saved.ever_sent,
            confirmed: saved.confirmed,
            kept_from: Some(saved.confirmed),
            is_ended: saved.is_ended,
            is_acknowledged: false,
            is_finished: saved.is_finished,
            is_done: saved.is_done,
        };
        let is_in_order = saved.confirmed <= saved.ever_sent
            && saved.ever_sent <= saved.taken
            && is_offset(saved.taken);
        match is_in_order && restored.kept() == saved.kept.len() as u64 {
            true => Ok(restored),
            false => Err(InvalidState("bytes to the other end")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted(written: u64) -> Accepted {
        Accepted {
            written,
            ..Accepted::default()
        }
    }

    fn kept(n: u64) -> Outbound {
        let mut out = Outbound::default();
        out.keep();
        out.take(n);
        out.send(n);
        out
    }

    #[test]
    fn bytes_are_kept_until_they_are_confirmed() {
        let mut out = kept(10);
        assert_eq!((out.kept(), out.unsent()), (10, 0));
        assert_eq!(out.confirm(&accepted(4)), Ok(4));
        assert_eq!(out.kept(), 6);
        out.resume();
        assert_eq!((out.sent(), out.unsent()), (4, 6));
    }

    #[test]
    fn a_direction_that_was_plain_is_safe_once_its_plain_bytes_are_confirmed() {
        let mut out = Outbound::default();
        out.take(10);
        out.send(10);
        assert!(!out.is_safe());
        out.keep();
        out.take(5);
        out.send(5);
        assert_eq!((out.kept(), out.is_safe()), (5, false));
        assert_eq!(out.confirm(&accepted(9)), Ok(0));
        assert!(!out.is_safe());
        assert_eq!(out.confirm(&accepted(12)), Ok(2));
        assert!(out.is_safe());
    }

    #[test]
    fn a_peer_can_confirm_only_what_it_was_sent() {
        let mut out = kept(10);
        out.take(1);
        out.confirm(&accepted(5)).unwrap();
        assert_eq!(out.confirm(&accepted(11)), Err(Violation::TooMuch));
        assert_eq!(out.confirm(&accepted(4)), Err(Violation::Backwards));
        let finished = Accepted {
            is_finished: true,
            ..accepted(10)
        };
        assert_eq!(out.confirm(&finished), Err(Violation::NoEnd));
        out.send(1);
        out.end();
        assert_eq!(out.confirm(&finished), Err(Violation::NoEnd));
        let finished = Accepted {
            written: 11,
            ..finished
        };
        assert_eq!(out.confirm(&finished), Ok(6));
        assert!(out.is_done());
    }

    /// A byte may have arrived on any earlier stream. The present one begins where the peer says.
    #[test]
    fn a_peer_may_confirm_more_than_the_last_stream_has_carried() {
        let mut out = kept(10);
        out.detach();
        out.resume();
        assert_eq!(out.unsent(), 10);
        assert_eq!(out.confirm(&accepted(7)), Err(Violation::TooMuch));
        out.detach();
        assert_eq!(out.confirm(&accepted(7)), Ok(7));
        out.resume();
        assert_eq!((out.sent(), out.unsent()), (7, 3));
    }

    /// Follows a kill of a process that has discarded what the other end does not take.
    #[test]
    fn a_direction_that_is_refused_may_be_behind() {
        let mut out = kept(10);
        out.confirm(&accepted(8)).unwrap();
        out.detach();
        let refused = Accepted {
            is_refused: true,
            ..accepted(3)
        };
        assert_eq!(out.confirm(&refused), Ok(2));
        assert!(out.is_done() && out.confirmed() == 8);
    }

    #[test]
    fn a_peer_that_takes_no_more_ends_the_direction() {
        let mut out = kept(10);
        let refused = Accepted {
            is_refused: true,
            ..accepted(3)
        };
        assert_eq!(out.confirm(&refused), Ok(10));
        assert_eq!((out.kept(), out.unsent()), (0, 0));
        assert!(out.is_done());
    }
}
