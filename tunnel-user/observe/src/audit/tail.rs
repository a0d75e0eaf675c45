//! The end of a file of records: each record is there whole, or not at all.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use crate::line_end::LineEnd;

/// The operations of an appended file that this module needs.
pub(super) trait Medium: Write {
    /// Returns the length in bytes.
    fn size(&self) -> io::Result<u64>;

    /// Truncates the file.
    fn cut_to(&mut self, size: u64) -> io::Result<()>;
}

impl Medium for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn cut_to(&mut self, size: u64) -> io::Result<()> {
        self.set_len(size)
    }
}

/// The end of a file.
#[derive(Debug)]
pub(super) struct Tail<F> {
    file: F,
    size: u64,
    end: LineEnd,
}

/// Failure to write some records whole.
#[derive(Debug)]
pub(super) struct Unwritten {
    /// Bytes of the records before them, which were written.
    pub whole: usize,
    /// Error of the system call.
    pub why: io::Error,
}

impl Tail<File> {
    /// Finds the end of `file`, which must be readable and may have been cut by the end of a process.
    pub(super) fn of(file: File) -> io::Result<Self> {
        let (size, mut last) = (file.size()?, [b'\n']);
        if let Some(at) = size.checked_sub(1) {
            file.read_exact_at(&mut last, at)?;
        }
        let end = LineEnd::new(last != [b'\n']);
        Ok(Self { file, size, end })
    }
}

impl<F: Medium> Tail<F> {
    /// Returns the length in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Appends records. A partly written record is truncated; where that fails the next one begins on a
    /// line of its own.
    ///
    /// # Errors
    /// [`Unwritten`].
    pub(super) fn append(&mut self, records: &[u8]) -> Result<(), Unwritten> {
        let written = self.end.write(&mut self.file, records);
        self.size += written.bytes as u64;
        let Err(why) = written.outcome else {
            return Ok(());
        };
        if written.cut > 0 && self.take_back(written.cut as u64).is_ok() {
            self.end.note_truncated();
        }
        let whole = written.whole;
        Err(Unwritten { whole, why })
    }

    fn take_back(&mut self, bytes: u64) -> io::Result<()> {
        let size = self.file.size()?.saturating_sub(bytes);
        self.file.cut_to(size)?;
        self.size = size;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with room for some bytes.
    #[derive(Debug)]
    struct Disk {
        written: Vec<u8>,
        room: usize,
        may_cut: bool,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = bytes.len().min(self.room);
            if n == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= n;
            self.written.extend_from_slice(&bytes[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Medium for Disk {
        fn size(&self) -> io::Result<u64> {
            Ok(self.written.len() as u64)
        }

        fn cut_to(&mut self, size: u64) -> io::Result<()> {
            if !self.may_cut {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            self.written.truncate(usize::try_from(size).unwrap());
            Ok(())
        }
    }

    fn tail(room: usize, may_cut: bool) -> Tail<Disk> {
        Tail {
            file: Disk {
                written: Vec::new(),
                room,
                may_cut,
            },
            size: 0,
            end: LineEnd::default(),
        }
    }

    #[test]
    fn a_record_without_room_is_taken_back_and_the_next_is_whole() {
        for (may_cut, expected) in [(true, "{1}\n{4}\n"), (false, "{1}\n{2\n{4}\n")] {
            let mut tail = tail(6, may_cut);
            let unwritten = tail.append(b"{1}\n{2}\n{3}\n").unwrap_err();
            assert_eq!(unwritten.whole, 4);
            assert_eq!(unwritten.why.kind(), io::ErrorKind::StorageFull);
            tail.file.room = 100;
            tail.append(b"{4}\n").unwrap();
            assert_eq!(str::from_utf8(&tail.file.written).unwrap(), expected);
            assert_eq!(tail.size(), expected.len() as u64);
        }
    }

    #[test]
    fn without_any_room_nothing_is_there() {
        let mut tail = tail(0, true);
        assert_eq!(tail.append(b"{1}\n").unwrap_err().whole, 0);
        tail.file.room = 4;
        tail.append(b"{2}\n").unwrap();
        assert_eq!(tail.file.written, b"{2}\n");
    }

    #[test]
    fn what_a_process_left_cut_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        for (left, expected) in [
            ("{1}\n{2", "{1}\n{2\n{3}\n"),
            ("{1}\n", "{1}\n{3}\n"),
            ("", "{3}\n"),
        ] {
            std::fs::write(&path, left).unwrap();
            let mut options = File::options();
            let file = options.append(true).read(true).open(&path).unwrap();
            Tail::of(file).unwrap().append(b"{3}\n").unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        }
    }
}
