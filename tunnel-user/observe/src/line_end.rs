//! The end of what lines are written to, a file or a pipe: a line that was cut swallows none of those that
//! follow.

use std::io::{self, Write};

/// How the last line that was written ends.
#[derive(Debug, Default)]
pub(super) struct LineEnd {
    /// The last byte ends no line.
    is_cut: bool,
}

/// What became of lines.
#[derive(Debug)]
pub(super) struct Written {
    /// Bytes that were written, with the end of a line that had been cut before.
    pub bytes: usize,
    /// Bytes of the lines that were written to their end.
    pub whole: usize,
    /// Bytes behind them, of a line that is cut now.
    pub cut: usize,
    /// What the system says.
    pub outcome: io::Result<()>,
}

impl LineEnd {
    /// Of what ends with a line that `is_cut`, or with a whole one.
    pub(super) fn new(is_cut: bool) -> Self {
        Self { is_cut }
    }

    /// Writes lines, the first on a line of its own.
    pub(super) fn write(&mut self, to: &mut impl Write, lines: &[u8]) -> Written {
        let mut ended = 0;
        if self.is_cut && !lines.is_empty() {
            let (n, outcome) = write_counted(to, b"\n");
            if outcome.is_err() {
                let (bytes, whole, cut) = (n, 0, 0);
                return Written {
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
        Written {
            bytes: ended + n,
            whole,
            cut: n - whole,
            outcome,
        }
    }

    /// The line that was cut is there no more.
    pub(super) fn taken_back(&mut self) {
        self.is_cut = false;
    }
}

/// Writes all of `bytes`, or says how many were written before what failed.
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

/// The length of the lines that `bytes` holds to their end.
fn whole_lines(bytes: &[u8]) -> usize {
    let newline = bytes.iter().rposition(|byte| *byte == b'\n');
    newline.map_or(0, |at| at + 1)
}
