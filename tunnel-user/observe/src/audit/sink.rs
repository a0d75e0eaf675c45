//! Sinks of records: daily files, systemd's journal, or both.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use super::files::{Bounds, Files};
use super::{AuditError, Counts, SERIES};
use crate::line_writer::line_count;
use cpc_config::AuditConfig;
use cpc_host::directory::with_remedy;
use cpc_host::report::report;

/// Socket of the journal (systemd.io, "Native Journal Protocol").
const JOURNAL: &str = "/run/systemd/journal/socket";

/// Minimum interval between log lines about lost records.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// A sink that counts lines and never fails: it logs its errors instead.
pub(super) struct Sink {
    files: Option<Files>,
    journal: Option<UnixDatagram>,
    counts: Arc<Counts>,
    reported: Option<Instant>,
}

impl Sink {
    /// Opens the configured sinks.
    pub(super) fn open(
        config: &AuditConfig,
        series: &'static str,
        counts: Arc<Counts>,
    ) -> Result<Self, AuditError> {
        let files = config.directory.as_deref();
        let files = files.map(|directory| {
            let bounds = Bounds {
                days: config.keep,
                bytes: config.max_bytes / SERIES,
            };
            let opened = Files::open(directory, series, bounds, counts.clone(), SystemTime::now());
            opened.map_err(|why| AuditError {
                place: directory.display().to_string(),
                why,
            })
        });
        let journal = config.journal.then(|| {
            journal(Path::new(JOURNAL)).map_err(|why| AuditError {
                place: JOURNAL.into(),
                why,
            })
        });
        Ok(Self {
            files: files.transpose()?,
            journal: journal.transpose()?,
            counts,
            reported: None,
        })
    }

    /// Writes to each sink. Returns the number of records missing in one of them, and the error.
    fn put(&mut self, lines: &[u8]) -> (u64, Option<io::Error>) {
        let (mut missing, mut error) = (0, None);
        if let Some(files) = &mut self.files
            && let Err(unwritten) = files.append(lines, SystemTime::now())
        {
            missing = line_count(&lines[unwritten.whole..]);
            error = Some(with_remedy(unwritten.why));
        }
        if let Some(journal) = &self.journal {
            let mut unsent = 0;
            for line in lines.split(|byte| *byte == b'\n').filter(|l| !l.is_empty()) {
                let head = b"SYSLOG_IDENTIFIER=cpc-audit\nPRIORITY=6\nMESSAGE=";
                if let Err(why) = journal.send(&[&head[..], line, b"\n"].concat()) {
                    (unsent, error) = (unsent + 1, Some(why));
                }
            }
            missing = missing.max(unsent);
        }
        (missing, error)
    }

    fn report_loss(&mut self, why: &io::Error) {
        let is_due = |at: Instant| at.elapsed() >= REPORT_INTERVAL;
        if self.reported.is_none_or(is_due) {
            self.reported = Some(Instant::now());
            tracing::error!(
                why = report(why),
                "audit records are lost (cpc_audit_records_lost_total)"
            );
        }
    }
}

impl Write for Sink {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let (missing, error) = self.put(lines);
        if let Some(error) = error {
            self.report_loss(&error);
        }
        let written = line_count(lines).saturating_sub(missing);
        self.counts.written.fetch_add(written, Ordering::Relaxed);
        self.counts.lost.fetch_add(missing, Ordering::Relaxed);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn journal(socket: &Path) -> io::Result<UnixDatagram> {
    let journal = UnixDatagram::unbound()?;
    journal.connect(socket)?;
    Ok(journal)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        days: 2,
        bytes: 1 << 20,
    };

    fn files_in(directory: &Path) -> io::Result<Files> {
        Files::open(
            directory,
            "audit",
            BOUNDS,
            Arc::default(),
            SystemTime::now(),
        )
    }

    fn sink(files: Option<Files>, journal: Option<UnixDatagram>) -> Sink {
        Sink {
            files,
            journal,
            counts: Arc::default(),
            reported: None,
        }
    }

    fn counted(sink: &Sink) -> (u64, u64) {
        let counts = &sink.counts;
        let load = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
        (load(&counts.written), load(&counts.lost))
    }

    #[test]
    fn records_are_appended_to_what_is_there() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("below/audit");
        for _ in 0..2 {
            let mut sink = sink(Some(files_in(&directory).unwrap()), None);
            sink.write_all(b"{}\n{}\n").unwrap();
            assert_eq!(counted(&sink), (2, 0));
        }
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs::metadata(&directory).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o700);
        let mut files = fs::read_dir(&directory).unwrap();
        let file = files.next().unwrap().unwrap().path();
        assert!(files.next().is_none());
        assert_eq!(fs::read_to_string(file).unwrap(), "{}\n{}\n{}\n{}\n");
    }

    #[test]
    fn the_journal_gets_a_message_for_each_record() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("socket");
        let listener = UnixDatagram::bind(&path).unwrap();
        let mut sink = sink(None, Some(journal(&path).unwrap()));
        sink.write_all(b"{\"a\":1}\n{\"b\":2}\n").unwrap();
        let mut room = [0; 256];
        for record in ["{\"a\":1}", "{\"b\":2}"] {
            let n = listener.recv(&mut room).unwrap();
            let text = str::from_utf8(&room[..n]).unwrap();
            let message = format!("\nMESSAGE={record}\n");
            assert!(text.starts_with("SYSLOG_IDENTIFIER=cpc-audit\n"), "{text}");
            assert!(text.ends_with(&message), "{text}");
        }
        drop(listener);
        sink.write_all(b"{\"c\":3}\n").unwrap();
        assert_eq!(counted(&sink), (2, 1));
    }

    #[test]
    fn a_directory_that_is_none_is_refused() {
        let place = tempfile::NamedTempFile::new().unwrap();
        assert!(files_in(place.path()).is_err());
        assert!(files_in(&place.path().join("below")).is_err());
    }
}
