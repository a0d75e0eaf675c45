//! Numbers of slots: which are free. No I/O.

use crate::table::SLOTS;

/// The numbers of one set.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    /// Numbers that were in use.
    free: Vec<u32>,
    /// The first number that was never in use.
    fresh: u32,
    /// Numbers of slots that live. Numbers on their way back are neither here nor in `free`.
    used: usize,
    /// Whether no slot is to be had any more.
    pub(crate) is_closed: bool,
}

impl Numbers {
    /// Takes a number. Returns `None` if all are in use.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let number = self.free.pop().or_else(|| {
            let number = self.fresh;
            self.fresh += u32::from(number < SLOTS);
            (number < SLOTS).then_some(number)
        })?;
        self.used += 1;
        Some(number)
    }

    /// Notes that a slot has ended. Its number is not free yet.
    pub(crate) fn end(&mut self) {
        self.used = self.used.saturating_sub(1);
    }

    /// Frees the number of a slot that has ended.
    pub(crate) fn free(&mut self, number: u32) {
        self.free.push(number);
    }

    pub(crate) fn used(&self) -> usize {
        self.used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_used_once_at_a_time() {
        let mut numbers = Numbers::default();
        for number in 0..SLOTS {
            assert_eq!(numbers.take(), Some(number));
        }
        assert_eq!(numbers.take(), None);
        assert_eq!(numbers.used(), SLOTS as usize);
        numbers.end();
        assert_eq!(numbers.take(), None, "on its way back");
        assert_eq!(numbers.used(), SLOTS as usize - 1);
        numbers.free(7);
        assert_eq!(numbers.take(), Some(7));
        assert_eq!(numbers.take(), None);
    }
}
