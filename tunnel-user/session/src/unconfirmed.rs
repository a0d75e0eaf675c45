//! The kept bytes of one direction, for a socket whose kernel can't keep them.

use std::collections::VecDeque;

use bytes::Bytes;

/// Bytes that may have to be sent again. They share the memory of what was sent: keeping copies nothing.
#[derive(Debug, Default)]
pub struct Unconfirmed {
    chunks: VecDeque<Bytes>,
    /// Offset of the first kept byte.
    start: u64,
    length: u64,
}

impl Unconfirmed {
    /// Starts at `offset`, the first byte that will be kept.
    pub fn new(offset: u64) -> Self {
        Self {
            start: offset,
            ..Self::default()
        }
    }

    /// Keeps a chunk behind the others.
    pub fn push(&mut self, chunk: Bytes) {
        self.length += chunk.len() as u64;
        self.chunks.push_back(chunk);
    }

    /// Releases `n` bytes from the front.
    pub fn release(&mut self, n: u64) {
        let mut left = n.min(self.length);
        self.start += left;
        self.length -= left;
        while left > 0
            && let Some(first) = self.chunks.front_mut()
        {
            // A chunk of which only a part is left still holds all its memory.
            match usize::try_from(left) {
                Ok(part) if part < first.len() => {
                    *first = first.slice(part..);
                    left = 0;
                }
                _ => {
                    left -= first.len() as u64;
                    self.chunks.pop_front();
                }
            }
        }
    }

    /// Iterates over the kept bytes from `offset` on.
    pub fn from(&self, offset: u64) -> impl Iterator<Item = Bytes> + '_ {
        let mut skip = offset.saturating_sub(self.start);
        self.chunks.iter().filter_map(move |chunk| {
            let length = chunk.len() as u64;
            let skipped = skip.min(length);
            skip -= skipped;
            // Within the chunk.
            (skipped < length).then(|| chunk.slice(skipped as usize..))
        })
    }

    /// Returns the number of chunks.
    pub fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// Returns the number of kept bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether no byte is kept.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{any, proptest};
    use proptest::prop_assert_eq;

    use super::*;

    fn all(kept: &Unconfirmed, offset: u64) -> Vec<u8> {
        kept.from(offset).flatten().collect()
    }

    proptest! {
        #[test]
        fn what_is_kept_is_the_end_of_what_was_pushed(
            chunks in vec(vec(any::<u8>(), 0..9), 0..12),
            releases in vec(0..20_u64, 0..6),
            offset in 0..99_u64,
        ) {
            let stream: Vec<u8> = chunks.concat();
            let mut kept = Unconfirmed::new(0);
            for chunk in chunks {
                kept.push(chunk.into());
            }
            let mut released = 0;
            for n in releases {
                kept.release(n);
                released = (released + n).min(stream.len() as u64);
                prop_assert_eq!(all(&kept, 0), &stream[released as usize..]);
                prop_assert_eq!(kept.len(), stream.len() as u64 - released);
            }
            let from = offset.max(released).min(stream.len() as u64);
            prop_assert_eq!(all(&kept, offset), &stream[from as usize..]);
        }
    }

    #[test]
    fn offsets_begin_where_keeping_began() {
        let mut kept = Unconfirmed::new(100);
        kept.push(Bytes::from_static(b"abcdef"));
        assert_eq!(all(&kept, 102), b"cdef");
        kept.release(3);
        assert_eq!(all(&kept, 100), b"def");
        assert_eq!(all(&kept, 105), b"f");
    }
}
