//! One direction of a session at its receiver.

use tunnel_proto::handover;
use tunnel_proto::resumption::Accepted;

use super::saved::{InvalidState, is_offset};
use super::violation::Violation;

/// Bytes on their way from the other end to the local socket.
///
/// Invariant: `written <= received`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inbound {
    /// Number of bytes received in order.
    received: u64,
    /// Number of bytes that the local kernel has accepted.
    written: u64,
    /// Whether the end of file has arrived behind the received bytes.
    is_ended: bool,
    /// Whether the end of file has been passed on to the local socket.
    is_finished: bool,
    /// Whether the local socket takes no more bytes.
    is_refused: bool,
}

impl Inbound {
    /// Notes `n` bytes from the present stream.
    ///
    /// # Errors
    /// [`Violation::BehindEnd`]: the end of file has arrived before.
    pub fn receive(&mut self, n: u64) -> Result<(), Violation> {
        if n > 0 && self.is_ended {
            return Err(Violation::BehindEnd);
        }
        self.received += n;
        Ok(())
    }

    /// Notes the end of file on the present stream.
    pub fn end(&mut self) {
        self.is_ended = true;
    }

    /// Notes `n` bytes that the local kernel has accepted.
    pub fn write(&mut self, n: u64) {
        self.written = (self.written + n).min(self.received);
    }

    /// Notes that the end of file was passed on. Without effect while bytes are unwritten.
    pub fn finish(&mut self) {
        self.is_finished |= self.is_ended && self.written == self.received;
    }

    /// Notes that the local socket takes no more.
    pub fn refuse(&mut self) {
        self.is_refused = true;
    }

    /// Returns the number of received bytes.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Returns the number of received bytes that are not written.
    pub fn unwritten(&self) -> u64 {
        self.received - self.written
    }

    /// Whether the end of file is to be passed on now.
    pub fn is_at_end(&self) -> bool {
        self.is_ended && !self.is_done() && self.unwritten() == 0
    }

    /// Whether nothing more is expected of this direction.
    pub fn is_done(&self) -> bool {
        self.is_finished || self.is_refused
    }

    /// Returns the progress, for the other end.
    pub fn accepted(&self) -> Accepted {
        Accepted {
            written: self.written,
            is_finished: self.is_finished,
            is_refused: self.is_refused,
        }
    }

    /// Continues on another stream, which begins at the next unwritten byte. Returns the number of
    /// received bytes to drop: they come again.
    pub fn resume(&mut self) -> u64 {
        let unwritten = self.unwritten();
        self.received = self.written;
        // The end of file comes again as well.
        self.is_ended &= self.is_finished;
        unwritten
    }

    /// Returns the direction, without a stream, for another process.
    pub(super) fn save(&self) -> handover::Inbound {
        handover::Inbound {
            written: self.written,
            is_finished: self.is_finished,
            is_refused: self.is_refused,
        }
    }

    /// Restores a direction that another process has [saved](Self::save).
    ///
    /// # Errors
    /// The number of bytes is too high.
    pub(super) fn restore(saved: &handover::Inbound) -> Result<Self, InvalidState> {
        if !is_offset(saved.written) {
            return Err(InvalidState("number of bytes from the other end"));
        }
        Ok(Self {
            received: saved.written,
            written: saved.written,
            is_ended: saved.is_finished,
            is_finished: saved.is_finished,
            is_refused: saved.is_refused,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_written_comes_again() {
        let mut inn = Inbound::default();
        inn.receive(10).unwrap();
        inn.end();
        inn.write(4);
        assert!(!inn.is_at_end());
        assert_eq!(inn.resume(), 6);
        assert_eq!((inn.accepted().written, inn.unwritten()), (4, 0));
        assert!(!inn.is_at_end(), "the end of file is behind lost bytes");
    }

    #[test]
    fn an_end_is_finished_behind_the_last_byte() {
        let mut inn = Inbound::default();
        inn.receive(2).unwrap();
        inn.end();
        inn.finish();
        assert!(!inn.accepted().is_finished);
        inn.write(2);
        assert!(inn.is_at_end());
        inn.finish();
        assert!(inn.accepted().is_finished);
        assert_eq!(inn.resume(), 0);
        assert!(inn.is_done());
    }

    #[test]
    fn bytes_behind_an_end_take_nothing_back() {
        let mut inn = Inbound::default();
        inn.receive(2).unwrap();
        inn.end();
        assert_eq!(inn.receive(1), Err(Violation::BehindEnd));
        inn.write(2);
        inn.finish();
        inn.resume();
        assert_eq!(inn.receive(1), Err(Violation::BehindEnd));
        inn.finish();
        assert!(inn.accepted().is_finished);
    }
}
