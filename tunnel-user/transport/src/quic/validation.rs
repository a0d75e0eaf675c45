//! The limit on packets to an unvalidated address: three times the bytes that came from there (RFC 9000
//! sections 8.1 and 9.3.1).
//!
//! quinn-proto answers a peer at a new address and validates that. It lets a whole packet go where one
//! byte is left, and does not count probes of the packet size, nor answers to a challenge from
//! elsewhere. So this module counts once more, exactly. A packet that does not fit waits until more has
//! come.
//!
//! quinn-proto does not tell when an address is validated. But it would have sent nothing beyond its
//! own count before, which is kept here too.

use std::net::SocketAddr;

/// Number of bytes that may be sent for each received one.
const FACTOR: u64 = 3;

/// The peer's addresses, and their state of validation.
#[derive(Debug)]
pub(super) struct Validation {
    /// Last validated address.
    proven: SocketAddr,
    /// Address of the path.
    current: SocketAddr,
    /// Last unvalidated address that sent something, of the path or not.
    other: Option<Other>,
    /// Bytes of the current path as quinn-proto counts them.
    received: u64,
    sent: u64,
}

/// An unvalidated address.
#[derive(Debug)]
struct Other {
    address: SocketAddr,
    received: u64,
    sent: u64,
}

/// Decision about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Send,
    /// The packet waits until more comes from its destination.
    Wait,
    /// The packet can be dropped without loss.
    Drop,
}

impl Validation {
    /// Starts with `address`, which quinn-proto has validated by the handshake.
    pub(super) fn new(address: SocketAddr) -> Self {
        Self {
            proven: address,
            current: address,
            other: None,
            received: 0,
            sent: 0,
        }
    }

    /// Whether the current address is validated.
    pub(super) fn is_proven(&self) -> bool {
        self.current == self.proven
    }

    /// Notes `size` bytes from `from`, after which the path is that of `current`.
    pub(super) fn arrived(&mut self, from: SocketAddr, size: usize, current: SocketAddr) {
        if from == self.proven && current == self.proven {
            self.current = current;
            return;
        }
        if std::mem::replace(&mut self.current, current) != current {
            (self.received, self.sent) = (0, 0);
        }
        self.received += size as u64;
        if from == self.proven {
            return;
        }
        // One is enough: what comes from elsewhere does not take the place of the path's.
        let other = self.other.take();
        let other = other.filter(|it| it.address == from || it.address == current);
        let other = self.other.insert(other.unwrap_or(Other {
            address: from,
            received: 0,
            sent: 0,
        }));
        if other.address == from {
            other.received += size as u64;
        }
    }

    /// Notes that the path is that of `current` once more: the validation of another has failed, and
    /// quinn-proto returns to the last validated one.
    pub(super) fn restored(&mut self, current: SocketAddr) {
        if std::mem::replace(&mut self.current, current) != current {
            self.proven = current;
        }
    }

    /// Decides whether `size` bytes that quinn-proto sends to `to` may go there. `is_probe` marks a
    /// probe of the packet size.
    pub(super) fn judge(&mut self, to: SocketAddr, size: usize, is_probe: bool) -> Verdict {
        if to == self.proven {
            return Verdict::Send;
        }
        let is_path = to == self.current;
        if is_path && !is_probe && self.is_used_up() {
            // It would be held back, had the peer not answered the challenge.
            self.proven = to;
            self.other = None;
            return Verdict::Send;
        }
        if is_path {
            self.sent += size as u64;
        }
        match self.fits(to, size) {
            true => Verdict::Send,
            false if is_path && !is_probe => Verdict::Wait,
            false => Verdict::Drop,
        }
    }

    /// Whether quinn-proto sends nothing more to the path's address before its validation.
    pub(super) fn is_used_up(&self) -> bool {
        self.sent >= self.received * FACTOR
    }

    /// Decides once more about a packet that waits.
    pub(super) fn judge_again(&mut self, to: SocketAddr, size: usize) -> Verdict {
        match to {
            to if to == self.proven => Verdict::Send,
            to if to != self.current => Verdict::Drop,
            to if self.fits(to, size) => Verdict::Send,
            _ => Verdict::Wait,
        }
    }

    /// Whether so many bytes may go to an unvalidated address; they then count as sent.
    fn fits(&mut self, to: SocketAddr, size: usize) -> bool {
        let other = self.other.as_mut().filter(|other| other.address == to);
        other.is_some_and(|other| {
            let sent = other.sent + size as u64;
            let fits = sent <= other.received * FACTOR;
            if fits {
                other.sent = sent;
            }
            fits
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: usize = 1200;

    fn address(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], port))
    }

    /// Moved from port 1 to port 2 by a packet of `size` bytes.
    fn moved(size: usize) -> Validation {
        let mut validation = Validation::new(address(1));
        validation.arrived(address(1), FULL, address(1));
        assert!(validation.is_proven());
        validation.arrived(address(2), size, address(2));
        assert!(!validation.is_proven());
        validation
    }

    #[test]
    fn a_challenge_waits_until_a_third_of_it_has_come() {
        let mut validation = moved(47);
        // The challenge of the former path goes there.
        assert_eq!(validation.judge(address(1), FULL, false), Verdict::Send);
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Wait);
        assert!(validation.is_used_up());
        validation.arrived(address(2), 352, address(2));
        assert_eq!(validation.judge_again(address(2), FULL), Verdict::Wait);
        validation.arrived(address(2), 1, address(2));
        assert_eq!(validation.judge_again(address(2), FULL), Verdict::Send);
        assert_eq!(validation.judge(address(2), FULL, true), Verdict::Drop);
    }

    #[test]
    fn what_would_be_held_back_shows_that_the_address_is_validated() {
        let mut validation = moved(400);
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Send);
        // The answer to the challenge.
        validation.arrived(address(2), FULL, address(2));
        for _ in 0..3 {
            assert_eq!(validation.judge(address(2), FULL, false), Verdict::Send);
        }
        assert!(!validation.is_proven());
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Send);
        assert!(validation.is_proven());
        // Now the former address has to prove itself.
        assert_eq!(validation.judge(address(1), 100, false), Verdict::Drop);
    }

    #[test]
    fn probes_prove_nothing() {
        let mut validation = moved(400);
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Send);
        for _ in 0..3 {
            assert_eq!(validation.judge(address(2), FULL, true), Verdict::Drop);
        }
        assert!(!validation.is_proven());
    }

    /// The former path's bytes count for quinn-proto, and not for the new address.
    #[test]
    fn bytes_from_elsewhere_give_no_credit() {
        let mut validation = moved(47);
        validation.arrived(address(1), 10 * FULL, address(2));
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Wait);
        assert_eq!(validation.judge_again(address(2), FULL), Verdict::Wait);
    }

    #[test]
    fn credit_adds_up_while_an_address_is_tried_again() {
        let mut validation = moved(200);
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Wait);
        // The validation has failed.
        validation.restored(address(1));
        assert!(validation.is_proven());
        assert_eq!(validation.judge_again(address(2), FULL), Verdict::Drop);
        validation.arrived(address(2), 200, address(2));
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Send);
    }

    #[test]
    fn a_stranger_takes_no_credit_away() {
        let mut validation = moved(400);
        validation.arrived(address(3), FULL, address(2));
        assert_eq!(validation.judge(address(3), 100, false), Verdict::Drop);
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Send);
    }

    #[test]
    fn a_path_that_is_restored_was_validated() {
        let mut validation = moved(400);
        // Validated without a word that shows it; then another address fails.
        validation.arrived(address(3), 47, address(3));
        validation.restored(address(2));
        assert!(validation.is_proven());
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Send);
    }

    #[test]
    fn a_challenge_from_elsewhere_is_answered_by_its_size() {
        let mut validation = Validation::new(address(1));
        validation.arrived(address(2), 47, address(1));
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Drop);
        validation.arrived(address(2), FULL, address(1));
        assert_eq!(validation.judge(address(2), FULL, false), Verdict::Send);
        assert!(validation.is_proven());
    }
}
