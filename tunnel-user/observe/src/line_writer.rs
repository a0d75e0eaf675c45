//! A writer of events as lines, many of them per system call.

use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::line_end::LineEnd;

/// Pause of the writing thread after each write. Lines logged meanwhile wake no thread and go out in
/// one call. With one line per connection, a wake-up for each costs more than the line.
const PAUSE: Duration = Duration::from_millis(5);

/// Maximum size of one write, in bytes.
const BATCH: usize = 32 << 10;

/// A log in which each write is an event, with its control characters escaped: tracing-subscriber
/// escapes messages but not the values of fields. JSON needs no escape.
///
/// Lines go out when the writing thread finds no further one, which is when it flushes. Lines that
/// can't be written are counted. A partly written line does not swallow the following ones.
pub(super) struct LineWriter<W> {
    batch: Vec<u8>,
    to: W,
    end: LineEnd,
    lost: Arc<AtomicU64>,
}

impl<W: Write> LineWriter<W> {
    /// Creates a log that writes to `to`.
    pub(super) fn new(to: W) -> Self {
        Self {
            batch: Vec::new(),
            to,
            end: LineEnd::default(),
            lost: Arc::default(),
        }
    }

    /// Returns the counter of lines that could not be written.
    pub(super) fn lost(&self) -> Arc<AtomicU64> {
        self.lost.clone()
    }

    fn write_out(&mut self) -> io::Result<()> {
        let written = self.end.write(&mut self.to, &self.batch);
        count(&self.lost, &self.batch[written.whole..]);
        self.batch.clear();
        written.outcome
    }
}

fn count(lost: &AtomicU64, lines: &[u8]) {
    lost.fetch_add(line_count(lines), Ordering::Relaxed);
}

/// Returns the number of line ends in `bytes`.
pub(super) fn line_count(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

impl<W: Write> Write for LineWriter<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = String::from_utf8_lossy(event);
        self.batch.extend_from_slice(one_line(&line).as_bytes());
        if self.batch.len() >= BATCH {
            self.write_out()?;
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_out()?;
        self.to.flush()?;
        thread::sleep(PAUSE);
        Ok(())
    }
}

fn one_line(event: &str) -> Cow<'_, str> {
    let text = event.strip_suffix('\n').unwrap_or(event);
    if !text.contains(char::is_control) {
        return Cow::Borrowed(event);
    }
    let mut line = String::with_capacity(event.len() + 16);
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line.push_str(&event[text.len()..]);
    Cow::Owned(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        for (event, line) in [
            ("a \u{e4}\n", "a \u{e4}\n"),
            ("a\r\nb\n", "a\\r\\nb\n"),
            ("a\nb", "a\\nb"),
            ("\u{1b}[2J\u{9b}\n", "\\u{1b}[2J\\u{9b}\n"),
            ("", ""),
        ] {
            assert_eq!(one_line(event), line);
        }
    }

    /// Has room for some bytes.
    struct Disk {
        written: Vec<u8>,
        room: usize,
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

    #[test]
    fn a_line_that_was_cut_swallows_no_other() {
        let mut lines = LineWriter::new(Disk {
            written: Vec::new(),
            room: 6,
        });
        let log = |lines: &mut LineWriter<Disk>, text: &str, room| {
            lines.to.room += room;
            for event in text.split_inclusive('\n') {
                lines.write_all(event.as_bytes()).unwrap();
            }
            lines.write_out().is_ok()
        };
        assert!(!log(&mut lines, "one\ntwo\nthree\n", 0));
        assert!(!log(&mut lines, "four\n", 0));
        assert!(log(&mut lines, "", 0), "nothing to write mends nothing");
        assert!(log(&mut lines, "five\n", 100));
        assert!(log(&mut lines, "six\n", 0));
        let written = String::from_utf8(lines.to.written).unwrap();
        assert_eq!(written, "one\ntw\nfive\nsix\n");
        assert_eq!(lines.lost.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn lines_go_out_together() {
        let mut lines = LineWriter::new(Vec::new());
        lines.write_all(b"a\n").unwrap();
        lines.write_all(b"b\x07\n").unwrap();
        assert!(lines.to.is_empty());
        lines.flush().unwrap();
        assert_eq!(lines.to, b"a\nb\\u{7}\n");
        let long = [b'x'; BATCH];
        lines.write_all(&long).unwrap();
        assert!(lines.to.ends_with(&long) && lines.batch.is_empty());
    }
}
