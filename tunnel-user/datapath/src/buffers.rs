//! A pool of buffers that return by themselves.
//!
//! Received bytes stay where the kernel wrote them until the last part has been passed on, as `Bytes`
//! that refer to the buffer. The rest of a buffer, though empty, belongs to the same memory and tells
//! when no other reference is left. So a receive needs no allocation, and the most recently used
//! memory, which is the warmest, is used next.
//!
//! A few bytes can keep a whole buffer. So the number of buffers is bounded, and above it received
//! bytes are copied out to their size.

use bytes::BytesMut;

/// Buffers of one size on one thread.
#[derive(Debug)]
pub struct Buffers {
    size: usize,
    most: usize,
    /// Rest of each buffer.
    lent: Vec<BytesMut>,
    /// Buffer to copy out of, when all others are in use.
    spare: BytesMut,
}

/// Room to receive into.
#[derive(Debug)]
pub struct Room {
    /// The whole room, initialised.
    pub bytes: BytesMut,
    /// Slot of the buffer; `None` for the one to copy out of.
    slot: Option<usize>,
}

impl Buffers {
    /// Creates a pool of at most `most` buffers of `size` bytes; none is allocated yet.
    pub fn new(size: usize, most: usize) -> Self {
        Self {
            size,
            most,
            lent: Vec::new(),
            spare: BytesMut::new(),
        }
    }

    /// Takes room, to be [given back](Self::give_back).
    pub fn take(&mut self) -> Room {
        for (slot, left) in self.lent.iter_mut().enumerate() {
            if let Some(bytes) = reclaim(left, self.size) {
                let slot = Some(slot);
                return Room { bytes, slot };
            }
        }
        let slot = (self.lent.len() < self.most).then(|| {
            self.lent.push(BytesMut::new());
            self.lent.len() - 1
        });
        let spare = slot.is_none();
        let spare = spare.then(|| reclaim(&mut self.spare, self.size));
        Room {
            bytes: spare
                .flatten()
                .unwrap_or_else(|| BytesMut::zeroed(self.size)),
            slot,
        }
    }

    /// Takes room back and replaces it by whole room: the same memory if no other reference is left.
    pub fn exchange(&mut self, room: &mut Room) {
        let bytes = std::mem::take(&mut room.bytes);
        let slot = room.slot.take();
        self.give_back(Room { bytes, slot });
        *room = self.take();
    }

    /// Takes room back, with or without references to parts of it.
    pub fn give_back(&mut self, mut room: Room) {
        // What is left must be the end of it, with nothing in it.
        drop(room.bytes.split());
        match room.slot {
            Some(slot) => self.lent[slot] = room.bytes,
            None => self.spare = room.bytes,
        }
    }
}

impl Room {
    /// Whether parts of the room may be kept; otherwise they are copied out.
    pub fn is_lent(&self) -> bool {
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

/// Returns the memory behind the rest of a buffer, if no other reference is left.
fn reclaim(left: &mut BytesMut, size: usize) -> Option<BytesMut> {
    if !left.try_reclaim(size) {
        return None;
    }
    let mut bytes = std::mem::take(left);
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
        let mut room = buffers.take();
        room.bytes[1000] = 7;
        let (first, second) = (room.part(1000, 10), room.part(1000, 1));
        assert_eq!((first.len(), &second[..]), (10, &[7][..]));
        buffers.give_back(room);
        let at = first.as_ptr();
        drop(first);

        let mut room = buffers.take();
        let other = room.part(10, 1);
        assert_ne!(other.as_ptr(), at, "the second part is still there");
        buffers.give_back(room);
        drop((second, other));
        let mut room = buffers.take();
        assert_eq!(room.bytes.len(), SIZE);
        assert_eq!(room.part(1, 1).as_ptr(), at);
    }

    #[test]
    fn room_without_use_is_given_back_as_it_was() {
        let mut buffers = Buffers::new(SIZE, 8);
        let room = buffers.take();
        let at = room.bytes.as_ptr();
        buffers.give_back(room);
        assert_eq!(buffers.take().bytes.as_ptr(), at);
    }

    #[test]
    fn little_that_is_kept_does_not_keep_much() {
        let mut buffers = Buffers::new(SIZE, 8);
        let mut kept = Vec::new();
        for _ in 0..20 {
            let mut room = buffers.take();
            kept.push(room.part(SIZE, 100));
            buffers.give_back(room);
        }
        assert_eq!(buffers.lent.len(), 8);
        assert!(kept[8..].iter().all(|bytes| bytes.capacity() < 200));
        drop(kept);
        assert!(buffers.take().slot.is_some());
    }
}
