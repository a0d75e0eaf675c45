//! Buffers that the kernel chooses from when data arrives (provided buffer rings), so that an idle
//! connection holds none.
//!
//! Received bytes stay where the kernel put them, unless they are few. A fresh buffer replaces one that
//! is used up. An incremental ring (Linux 6.12) puts one receive behind the other into the same buffer,
//! so that short ones take no more room than they have bytes.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use bytes::{Buf, BytesMut};
use io_uring::types::BufRingEntry;
use io_uring::{IoUring, cqueue};

use crate::buffers::{Buffers, ReceiveBuffer};

/// Size below which a receive is copied out: a short chunk must not hold a whole buffer.
const COPY_BELOW: usize = 8 << 10;

/// `IOU_PBUF_RING_INC` of linux/io_uring.h, which the crate does not export.
const INCREMENTAL: u16 = 2;

/// The shape of a ring of buffers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Number of the group within the io_uring.
    pub group: u16,
    /// Number of buffers that the kernel has, a power of two.
    pub entries: u16,
    /// Size of each buffer, in bytes.
    pub size: usize,
    /// Maximum number of buffers in use, including those of the kernel; further receives are copied
    /// out.
    pub max: usize,
    /// Whether a buffer takes several receives.
    pub incremental: bool,
}

/// The buffers of the kernel, and their pool.
#[derive(Debug)]
pub(super) struct Provided {
    shape: Shape,
    entries: *mut BufRingEntry,
    layout: Layout,
    tail: u16,
    /// Buffers by the number that the kernel knows them by.
    lent: Vec<ReceiveBuffer>,
    buffers: Buffers,
}

// SAFETY: the entries belong to this alone; it moves to its thread before it is used.
unsafe impl Send for Provided {}

impl Provided {
    /// Registers the buffers with `uring`, which must be closed before they are dropped.
    pub(super) fn register(uring: &IoUring, shape: Shape) -> io::Result<Self> {
        let layout = layout(shape.entries)?;
        // SAFETY: the layout has a size over 0.
        let entries = unsafe { alloc_zeroed(layout) }.cast::<BufRingEntry>();
        if entries.is_null() {
            handle_alloc_error(layout);
        }
        let mut provided = Self {
            shape,
            entries,
            layout,
            tail: 0,
            lent: Vec::new(),
            buffers: Buffers::new(shape.size, shape.max),
        };
        let flags = if shape.incremental { INCREMENTAL } else { 0 };
        // SAFETY: the memory has `entries` entries and lives until `uring` is closed.
        unsafe {
            uring.submitter().register_buf_ring_with_flags(
                entries as u64,
                shape.entries,
                shape.group,
                flags,
            )?;
        }
        for number in 0..shape.entries {
            let buffer = provided.buffers.take();
            provided.lent.push(buffer);
            provided.provide(number);
        }
        Ok(provided)
    }

    /// Returns the received bytes of a completion.
    pub(super) fn peek(&self, result: i32, flags: u32) -> Option<&[u8]> {
        let buffer = self.lent.get(usize::from(cqueue::buffer_select(flags)?))?;
        buffer.bytes.get(..usize::try_from(result).ok()?)
    }

    /// Whether the received bytes of a completion stay in their buffer, rather than being copied out.
    pub(super) fn stays(&self, result: i32, flags: u32, skip: usize) -> bool {
        let number = cqueue::buffer_select(flags);
        let buffer = number.and_then(|number| self.lent.get(usize::from(number)));
        let length = usize::try_from(result).unwrap_or(0).saturating_sub(skip);
        length >= COPY_BELOW && buffer.is_some_and(ReceiveBuffer::is_pooled)
    }

    /// Takes `length` received bytes of a completion, behind the first `skip` ones. Returns `None` if
    /// nothing was received.
    pub(super) fn take(&mut self, result: i32, flags: u32, skip: usize) -> Option<BytesMut> {
        let stays = self.stays(result, flags, skip);
        let number = cqueue::buffer_select(flags)?;
        let length = usize::try_from(result).unwrap_or(0);
        if length == 0 && self.shape.incremental {
            // The kernel moves on by what was received: the buffer is still its own.
            return None;
        }
        let buffer = self.lent.get_mut(usize::from(number))?;
        let is_used_up = !cqueue::buffer_more(flags);
        buffer.bytes.advance(skip.min(length));
        let length = length.saturating_sub(skip);
        if !stays {
            let bytes = BytesMut::from(&buffer.bytes[..length]);
            buffer.bytes.advance(length);
            if is_used_up {
                self.replace(number);
            }
            return Some(bytes);
        }
        let bytes = buffer.part(length, length);
        if is_used_up {
            self.replace(number);
        }
        Some(bytes)
    }

    /// Replaces a used-up buffer by a whole one.
    fn replace(&mut self, number: u16) {
        let buffer = &mut self.lent[usize::from(number)];
        self.buffers.exchange(buffer);
        self.provide(number);
    }

    /// Gives buffer `number` to the kernel.
    fn provide(&mut self, number: u16) {
        let bytes = &mut self.lent[usize::from(number)].bytes;
        let at = usize::from(self.tail & (self.shape.entries - 1));
        // SAFETY: `at` is below the number of entries, which are ours to write until the tail is
        // beyond them.
        unsafe {
            let entry = &mut *self.entries.add(at);
            entry.set_addr(bytes.as_mut_ptr() as u64);
            entry.set_len(bytes.len() as u32);
            entry.set_bid(number);
        }
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail lies in the first entry, aligned, and is written by us alone.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(self.entries).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}

/// Returns the layout of a ring, which must start on a page.
fn layout(entries: u16) -> io::Result<Layout> {
    // SAFETY: reads a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let page = usize::try_from(page).map_err(io::Error::other)?;
    let size = usize::from(entries) * size_of::<BufRingEntry>();
    Layout::from_size_align(size, page).map_err(io::Error::other)
}

impl Drop for Provided {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; the io_uring is closed.
        unsafe { dealloc(self.entries.cast(), self.layout) };
    }
}
