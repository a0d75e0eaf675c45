//! A pool of buffers that return by themselves.
//!
//! Received bytes stay where the kernel wrote them until the last part has been passed on, as
//! `Bytes` that refer to the buffer. The remainder of a buffer, though empty, belongs to the same
//! memory and shows whether another reference is left. So a receive needs no allocation, and the
//! most recently used memory, which is the warmest, is used next.
//!
//! A few bytes can hold a whole buffer. So the number of buffers is bounded, and above it received
//! bytes are copied out to their size.

use bytes::BytesMut;

/// Buffers of one size on one thread.
#[derive(Debug)]
pub struct Buffers {
    size: usize,
    max: usize,
    /// Remainder of each buffer.
    remainders: Vec<BytesMut>,
    /// Buffer to copy out of, when all others are in use.
    spare: BytesMut,
}

/// Buffer to receive into.
#[derive(Debug)]
pub struct ReceiveBuffer {
    /// The free part, initialised.
    pub bytes: BytesMut,
    /// Slot of the buffer; `None` for the one to copy out of.
    slot: Option<usize>,
}

impl Buffers {
    /// Creates a pool of at most `max` buffers of `size` bytes; none is allocated yet.
    pub fn new(size: usize, max: usize) -> Self {
        Self {
            size,
            max,
            remainders: Vec::new(),
            spare: BytesMut::new(),
        }
    }

    /// Takes a buffer; [`Self::give_back`] returns it.
    pub fn take(&mut self) -> ReceiveBuffer {
        for (slot, remainder) in self.remainders.iter_mut().enumerate() {
            if let Some(bytes) = reclaim(remainder, self.size) {
                let slot = Some(slot);
                return ReceiveBuffer { bytes, slot };
            }
        }
        let slot = (self.remainders.len() < self.max).then(|| {
            self.remainders.push(BytesMut::new());
            self.remainders.len() - 1
        });
        let spare = slot.is_none();
        let spare = spare.then(|| reclaim(&mut self.spare, self.size));
        ReceiveBuffer {
            bytes: spare
                .flatten()
                .unwrap_or_else(|| BytesMut::zeroed(self.size)),
            slot,
        }
    }

    /// Returns a buffer and takes another one: the same memory if no other reference is left.
    pub fn exchange(&mut self, buffer: &mut ReceiveBuffer) {
        let bytes = std::mem::take(&mut buffer.bytes);
        let slot = buffer.slot.take();
        self.give_back(ReceiveBuffer { bytes, slot });
        *buffer = self.take();
    }

    /// Takes a buffer back, with or without references to parts of it.
    pub fn give_back(&mut self, mut buffer: ReceiveBuffer) {
        // What is left must be the end of it, with nothing in it.
        drop(buffer.bytes.split());
        match buffer.slot {
            Some(slot) => self.remainders[slot] = buffer.bytes,
            None => self.spare = buffer.bytes,
        }
    }
}

impl ReceiveBuffer {
    /// Whether received parts may stay in the buffer; otherwise they are copied out.
    pub fn is_pooled(&self) -> bool {
        self.slot.is_some()
    }

    /// Splits off the first `stride` bytes, and returns `length` of them.
    pub fn part(&mut self, stride: usize, length: usize) -> BytesMut {
        let mut part = self.bytes.split_to(stride);
        if self.slot.is_none() {
            return BytesMut::from(&part[..length]);
        }
        part.truncate(length);
        part
    }
}

/// Returns the memory behind the remainder of a buffer, if no other reference is left.
fn reclaim(remainder: &mut BytesMut, size: usize) -> Option<BytesMut> {
    if !remainder.try_reclaim(size) {
        return None;
    }
    let mut bytes = std::mem::take(remainder);
    // SAFETY: the allocation was made zeroed and has `size` bytes, as `try_reclaim` has found; so
    // all of them are initialised.
    unsafe { bytes.set_len(size) };
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 4096;

    #[test]
    fn memory_is_used_again_when_nobody_refers_to_it() {
        let mut buffers = Buffers::new(SIZE, 8);
        let mut buffer = buffers.take();
        buffer.bytes[1000] = 7;
        let (first, second) = (buffer.part(1000, 10), buffer.part(1000, 1));
        assert_eq!((first.len(), &second[..]), (10, &[7][..]));
        buffers.give_back(buffer);
        let at = first.as_ptr();
        drop(first);

        let mut buffer = buffers.take();
        let other = buffer.part(10, 1);
        assert_ne!(other.as_ptr(), at, "the second part is still there");
        buffers.give_back(buffer);
        drop((second, other));
        let mut buffer = buffers.take();
        assert_eq!(buffer.bytes.len(), SIZE);
        assert_eq!(buffer.part(1, 1).as_ptr(), at);
    }

    #[test]
    fn room_without_use_is_given_back_as_it_was() {
        let mut buffers = Buffers::new(SIZE, 8);
        let buffer = buffers.take();
        let at = buffer.bytes.as_ptr();
        buffers.give_back(buffer);
        assert_eq!(buffers.take().bytes.as_ptr(), at);
    }

    #[test]
    fn little_that_is_kept_does_not_keep_much() {
        let mut buffers = Buffers::new(SIZE, 8);
        let mut kept = Vec::new();
        for _ in 0..20 {
            let mut buffer = buffers.take();
            kept.push(buffer.part(SIZE, 100));
            buffers.give_back(buffer);
        }
        assert_eq!(buffers.remainders.len(), 8);
        assert!(kept[8..].iter().all(|bytes| bytes.capacity() < 200));
        drop(kept);
        assert!(buffers.take().slot.is_some());
    }
}
