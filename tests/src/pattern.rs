//! A stream of bytes in which every position can be told from every other.
//!
//! The eight bytes at each multiple of eight are a hash of their position, so that a byte that is
//! lost, doubled, changed or moved shows at once and says where. Nothing is kept but a position.

use std::fmt;

/// Fills `buffer` with the bytes of the stream from `offset` on.
pub fn fill(offset: u64, buffer: &mut [u8]) {
    let mut position = offset;
    let mut rest = buffer;
    while !rest.is_empty() {
        let word = word(position / 8).to_le_bytes();
        let from = (position % 8) as usize;
        let count = (8 - from).min(rest.len());
        rest[..count].copy_from_slice(&word[from..from + count]);
        rest = &mut rest[count..];
        position += count as u64;
    }
}

/// Compares a stream with the pattern as it arrives.
#[derive(Debug, Default)]
pub struct Checker {
    position: u64,
    expected: Vec<u8>,
}

/// The first byte that was not the pattern's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Position in the stream.
    pub offset: u64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the stream differs from what was sent at byte {}",
            self.offset
        )
    }
}

impl std::error::Error for Mismatch {}

impl Checker {
    /// Returns the number of correct bytes so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Takes the next bytes of the stream.
    ///
    /// # Errors
    ///
    /// The first byte that is not the one that belongs there.
    pub fn update(&mut self, received: &[u8]) -> Result<(), Mismatch> {
        self.expected.resize(received.len(), 0);
        fill(self.position, &mut self.expected);
        if self.expected != received {
            let good = self
                .expected
                .iter()
                .zip(received)
                .take_while(|(a, b)| a == b)
                .count();
            return Err(Mismatch {
                offset: self.position + good as u64,
            });
        }
        self.position += received.len() as u64;
        Ok(())
    }
}

/// Computes the finaliser of SplitMix64: a bijection, so that no two positions look alike.
fn word(index: u64) -> u64 {
    let mut z = index.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_cut_gives_the_same_stream() {
        let mut whole = vec![0; 1000];
        fill(0, &mut whole);
        for cut in [1, 7, 8, 9, 500, 999] {
            let mut parts = vec![0; 1000];
            let (head, tail) = parts.split_at_mut(cut);
            fill(0, head);
            fill(cut as u64, tail);
            assert_eq!(parts, whole, "cut at {cut}");
        }
    }

    #[test]
    fn a_lost_byte_is_found() {
        let mut bytes = vec![0; 100];
        fill(0, &mut bytes);
        bytes.remove(41);
        let mut checker = Checker::default();
        assert_eq!(checker.update(&bytes[..20]), Ok(()));
        assert_eq!(checker.update(&bytes[20..]), Err(Mismatch { offset: 41 }));
        assert_eq!(checker.position(), 20);
    }
}
