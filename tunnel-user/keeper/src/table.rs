//! The table: the progress of each kept socket, in memory that outlives its owner.
//!
//! Each entry has two numbers of 8 bytes: `consumed` and `intended`. The owner writes them without a system call.
//! The memory is a memfd (memfd_create(2)) whose size is sealed: no other holder can take it away from below the
//! mapping of the owner.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};

/// Number of entries, and of sockets in a set.
pub(crate) const SLOTS: u32 = 1 << 16;

/// Size of an entry in bytes.
const ENTRY: usize = 16;

/// Size of the table in bytes.
const SIZE: NonZeroUsize = NonZeroUsize::MIN.saturating_add(SLOTS as usize * ENTRY - 1);

/// Seals of a table: its size never changes.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::SEAL);

/// The progress of a kept socket when its owner died.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The last [`Slot::consumed`](crate::Slot::consumed).
    pub consumed: u64,
    /// The last [`Slot::consuming`](crate::Slot::consuming).
    pub intended: u64,
}

/// The table of a living owner.
#[derive(Debug)]
pub(crate) struct Table {
    memory: OwnedFd,
    /// `SLOTS` pairs of numbers.
    numbers: NonNull<AtomicU64>,
}

// SAFETY: the mapping is shared memory of atomic numbers, which any thread may use, and lives as long as the table.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

impl Table {
    /// Creates a table of zeros.
    ///
    /// # Errors
    /// The error of a system call.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = memfd_create("cpc-keeper", flags)?;
        rustix::fs::ftruncate(&memory, SIZE.get() as u64)?;
        fcntl_add_seals(&memory, SEALS)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, of memory that can't shrink.
        let numbers = unsafe { mmap(None, SIZE, access, MapFlags::MAP_SHARED, &memory, 0)? };
        Ok(Self {
            memory,
            numbers: numbers.cast(),
        })
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    pub(crate) fn set_consumed(&self, slot: u32, total: u64) {
        self.store(slot, 0, total);
    }

    pub(crate) fn set_intended(&self, slot: u32, total: u64) {
        self.store(slot, 1, total);
    }

    fn store(&self, slot: u32, field: usize, total: u64) {
        if slot < SLOTS {
            // SAFETY: the slot is below SLOTS and the field below 2, so the number is inside the mapping, aligned as
            // the mapping is to a page.
            let number = unsafe { self.numbers.add(slot as usize * 2 + field).as_ref() };
            number.store(total, Ordering::Release);
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: the mapping is this table's alone, and no reference into it is left.
        let _ = unsafe { munmap(self.numbers.cast(), SIZE.get()) };
    }
}

/// The table of a dead owner. Reads by system call: another program's memory is never mapped.
#[derive(Debug)]
pub struct TableView {
    /// Absent if the descriptor is not that of a table.
    memory: Option<File>,
}

impl TableView {
    pub(crate) fn of(descriptor: Option<OwnedFd>) -> Self {
        let is_table = |descriptor: &OwnedFd| {
            fcntl_get_seals(descriptor).is_ok_and(|it| it.contains(SEALS))
                && fstat(descriptor).is_ok_and(|it| it.st_size == SIZE.get() as i64)
        };
        Self {
            memory: descriptor.filter(is_table).map(File::from),
        }
    }

    /// Returns the entry of a slot. Returns `None` for a slot that can't be, and if the owner left no valid table.
    pub fn entry(&self, slot: u32) -> Option<Entry> {
        let mut consumed = [0; 8];
        let mut intended = [0; 8];
        let at = u64::from(slot) * ENTRY as u64;
        let memory = self.memory.as_ref().filter(|_| slot < SLOTS)?;
        memory.read_exact_at(&mut consumed, at).ok()?;
        memory.read_exact_at(&mut intended, at + 8).ok()?;
        Some(Entry {
            consumed: u64::from_ne_bytes(consumed),
            intended: u64::from_ne_bytes(intended),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_reads_what_the_owner_wrote() {
        let table = Table::new().unwrap();
        table.set_intended(0, 7);
        table.set_consumed(SLOTS - 1, 8);
        table.set_intended(SLOTS - 1, 9);
        table.set_consumed(SLOTS, 10);
        let view = TableView::of(table.descriptor().try_clone_to_owned().ok());
        drop(table);
        let entry = |consumed, intended| Some(Entry { consumed, intended });
        assert_eq!(view.entry(0), entry(0, 7));
        assert_eq!(view.entry(1), entry(0, 0));
        assert_eq!(view.entry(SLOTS - 1), entry(8, 9));
        assert_eq!(view.entry(SLOTS), None);
    }

    #[test]
    fn no_holder_shrinks_a_table() {
        let table = Table::new().unwrap();
        assert!(rustix::fs::ftruncate(&table.memory, 0).is_err());
    }

    #[test]
    fn a_descriptor_of_another_kind_has_no_entries() {
        let short = memfd_create("short", MemfdFlags::ALLOW_SEALING).unwrap();
        fcntl_add_seals(&short, SEALS).unwrap();
        let unsealed = memfd_create("unsealed", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&unsealed, SIZE.get() as u64).unwrap();
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        for descriptor in [short, unsealed, pipe] {
            assert_eq!(TableView::of(Some(descriptor)).entry(0), None);
        }
    }
}
