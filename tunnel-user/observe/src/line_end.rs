//! The end of a file or pipe of lines: a partly written line does not swallow the following ones.

use std::io::{self, Write};

/// State of the last written line.
#[derive(Debug, Default)]
pub(super) struct LineEnd {
    /// Whether the last byte ends no line.
    is_cut: bool,
}

/// Outcome of writing lines.
#[derive(Debug)]
pub(super) struct WriteOutcome {
    /// Number of written bytes, including the end of a line that was cut before.
    pub bytes: usize,
    /// Bytes of the lines that were written whole.
    pub whole: usize,
    /// Bytes behind them, of a line that is cut now.
    pub cut: usize,
    /// Result of the system call.
    pub outcome: io::Result<()>,
}

impl LineEnd {
    /// Creates the state of a file whose last line `is_cut` or whole.
    pub(super) fn new(is_cut: bool) -> Self {
        Self { is_cut }
    }

    /// Writes lines, the first one on a line of its own.
    pub(super) fn write(&mut self, to: &mut impl Write, lines: &[u8]) -> WriteOutcome {
        let mut ended = 0;
        if self.is_cut && !lines.is_empty() {
            let (n, outcome) = write_counted(to, b"\n");
            if outcome.is_err() {
                let (bytes, whole, cut) = (n, 0, 0);
                return WriteOutcome {
                    bytes,
                    whole,
                    cut,
                    outcome,
                };
            }
            (ended, self.is_cut) = (n, false);
        }
        let (n, outcome) = write_counted(to, lines);
        let whole = whole_lines(&lines[..n]);
        self.is_cut |= n > whole;
        WriteOutcome {
            bytes: ended + n,
            whole,
            cut: n - whole,
            outcome,
        }
    }

    /// Notes that the cut line was truncated.
    pub(super) fn note_truncated(&mut self) {
        self.is_cut = false;
    }
}

/// Writes all of `bytes`. Returns the number of bytes written before a failure.
fn write_counted(to: &mut impl Write, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut n = 0;
    while n < bytes.len() {
        match to.write(&bytes[n..]) {
            Ok(0) => return (n, Err(io::ErrorKind::WriteZero.into())),
            Ok(more) => n += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (n, Err(error)),
        }
    }
    (n, Ok(()))
}

/// Returns the length of the whole lines in `bytes`.
fn whole_lines(bytes: &[u8]) -> usize {
    let newline = bytes.iter().rposition(|byte| *byte == b'\n');
    newline.map_or(0, |at| at + 1)
}
