//! The window of a sender: the number of bytes that may be on their way to the socket of the other end.
//!
//! The credit of the transport is as large as a long path needs. A sender uses only the part that the other end's
//! socket empties in a few round trips, so that a stopped reader holds little.

use std::time::{Duration, Instant};

/// Initial size, in bytes.
pub const LEAST: u64 = 192 << 10;

/// Minimum size once many bytes were confirmed: the other end then confirms in larger steps.
const USUAL: u64 = 1 << 20;

/// Part of the confirmed bytes that the minimum is.
const PART: u64 = 8;

/// Number of round trips for which a window lasts: one for the bytes, and one for the growth of the transport's own
/// window, whose measure is a round trip late.
const ROUNDS: u64 = 3;

/// Minimum duration of a measurement.
const SHORTEST: Duration = Duration::from_millis(1);

/// Returns the credit of the transport for one stream, where connections wait for another tunnel for `resume`. Those
/// that do not are no sessions, and their senders know of nothing but the credit.
pub fn credit(most: u32, resume: Duration) -> u32 {
    match resume.is_zero() {
        true => most.min(1 << 20),
        false => most,
    }
}

/// The window of a sender.
#[derive(Debug)]
pub struct Window {
    size: u64,
    most: u64,
    /// Start of the present measurement, and the number of bytes that were confirmed before.
    since: Option<(Instant, u64)>,
    /// Hold-up of the sender by the window since then.
    was_full: bool,
}

impl Window {
    /// Creates a window that grows up to `most` bytes.
    pub fn new(most: u64) -> Self {
        Self {
            size: LEAST.min(most),
            most,
            since: None,
            was_full: false,
        }
    }

    /// Returns the number of bytes that may follow, while `outstanding` ones are unconfirmed.
    pub fn room(&mut self, outstanding: u64) -> u64 {
        let room = self.size.saturating_sub(outstanding);
        self.was_full |= room == 0;
        room
    }

    /// Returns the size.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Gives up the window: there are no confirmations any more.
    pub fn open(&mut self) {
        (self.size, self.most) = (u64::MAX, u64::MAX);
    }

    /// Notes that `confirmed` bytes in all are confirmed, over a path with this round-trip time. The window becomes a
    /// multiple of what the other end takes in a round trip. It shrinks only where it was full: otherwise it says
    /// nothing of the reader.
    pub fn confirmed(&mut self, confirmed: u64, now: Instant, rtt: Duration) {
        if self.most == u64::MAX {
            return;
        }
        let round = rtt.max(SHORTEST);
        let (began, before) = *self.since.get_or_insert((now, confirmed));
        let elapsed = now.saturating_duration_since(began);
        if elapsed < round {
            return;
        }
        let delivered = u128::from(confirmed.saturating_sub(before));
        let in_a_round = delivered * round.as_nanos() / elapsed.as_nanos().max(1);
        let wanted = u64::try_from(in_a_round).unwrap_or(u64::MAX) * ROUNDS;
        if wanted > self.size {
            self.size = wanted;
        } else if self.was_full {
            self.size = wanted.max(self.size / 2);
        }
        let least = (confirmed / PART).clamp(LEAST, USUAL);
        self.size = self.size.max(least).min(self.most);
        (self.since, self.was_full) = (Some((now, confirmed)), false);
    }
}

/// Returns the number of bytes after which a reader confirms at once, when it has accepted `written` ones: a part of
/// the smallest window that their sender may have.
pub fn confirm_after(written: u64) -> u64 {
    (written / PART).clamp(LEAST, USUAL) / 4
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(50);
    const MOST: u64 = 16 << 20;

    /// A reader that takes `rate` bytes in a round trip, for so many round trips, and a sender that always has more.
    fn read(
        window: &mut Window,
        (now, confirmed): (&mut Instant, &mut u64),
        rate: u64,
        rounds: u32,
    ) {
        for _ in 0..rounds {
            let outstanding = window.size();
            assert_eq!(window.room(outstanding), 0);
            *now += RTT;
            *confirmed += rate.min(outstanding);
            window.confirmed(*confirmed, *now, RTT);
        }
    }

    #[test]
    fn a_window_grows_with_the_reader_and_shrinks_with_it() {
        let (mut window, mut now, mut confirmed) = (Window::new(MOST), Instant::now(), 0);
        assert_eq!((window.room(0), window.room(LEAST - 1)), (LEAST, 1));
        read(&mut window, (&mut now, &mut confirmed), u64::MAX, 8);
        assert_eq!(window.size(), MOST);
        read(&mut window, (&mut now, &mut confirmed), 500_000, 8);
        assert_eq!(window.size(), 1_500_000);
        read(&mut window, (&mut now, &mut confirmed), 1000, 8);
        assert_eq!(window.size(), USUAL);
    }

    #[test]
    fn a_reader_that_takes_little_gets_no_more() {
        let (mut window, mut now, mut confirmed) = (Window::new(MOST), Instant::now(), 0);
        read(&mut window, (&mut now, &mut confirmed), LEAST / 4, 8);
        assert_eq!(window.size(), LEAST);
    }

    #[test]
    fn a_sender_that_has_little_to_send_keeps_its_window() {
        let (mut window, mut now, mut confirmed) = (Window::new(MOST), Instant::now(), 0);
        read(&mut window, (&mut now, &mut confirmed), u64::MAX, 8);
        for _ in 0..8 {
            now += RTT;
            confirmed += 100;
            assert!(window.room(100) > 0);
            window.confirmed(confirmed, now, RTT);
        }
        assert_eq!(window.size(), MOST);
    }

    #[test]
    fn a_configured_maximum_counts_from_the_start() {
        assert_eq!(Window::new(1000).size(), 1000);
        let (mut window, mut now, mut confirmed) = (Window::new(300_000), Instant::now(), 0);
        read(&mut window, (&mut now, &mut confirmed), u64::MAX, 8);
        assert_eq!(window.size(), 300_000);
        window.open();
        window.confirmed(confirmed, now + RTT, RTT);
        assert_eq!(window.room(1 << 40), u64::MAX - (1 << 40));
    }

    /// A sender whose window is full waits for a confirmation: one must be due.
    #[test]
    fn every_window_has_room_for_what_is_confirmed_late() {
        for written in (0..100 << 20).step_by(4096) {
            let least = (written / PART).clamp(LEAST, USUAL);
            assert!(confirm_after(written) <= least / 4);
        }
    }
}
