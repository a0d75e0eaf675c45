//! Where records go: files of a day each, systemd's journal, or both.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tracing_appender::rolling::{RollingFileAppender, Rotation};

use super::{AuditError, Counts};
use crate::config::AuditConfig;

/// The journal's socket (systemd.io, "Native Journal Protocol").
const JOURNAL: &str = "/run/systemd/journal/socket";

/// How often is said that records are lost.
const COMPLAIN_AFTER: Duration = Duration::from_secs(60);

/// Takes lines, counts them, and never fails: it says so instead.
pub(super) struct Sink {
    files: Option<RollingFileAppender>,
    journal: Option<UnixDatagram>,
    counts: Arc<Counts>,
    complained: Option<Instant>,
}

impl Sink {
    /// Opens what is configured.
    pub(super) fn open(config: &AuditConfig, counts: Arc<Counts>) -> Result<Self, AuditError> {
        let files = config.directory.as_deref();
        let files = files.map(|directory| {
            files_in(directory, config.keep).map_err(|why| AuditError {
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
            complained: None,
        })
    }

    fn put(&mut self, lines: &[u8]) -> io::Result<()> {
        if let Some(files) = &mut self.files {
            files.write_all(lines)?;
        }
        if let Some(journal) = &self.journal {
            for line in lines.split(|byte| *byte == b'\n').filter(|l| !l.is_empty()) {
                let head = b"SYSLOG_IDENTIFIER=cpc-audit\nPRIORITY=6\nMESSAGE=";
                journal.send(&[&head[..], line, b"\n"].concat())?;
            }
        }
        Ok(())
    }

    fn complain(&mut self, why: &io::Error) {
        let is_news = |at: Instant| at.elapsed() >= COMPLAIN_AFTER;
        if self.complained.is_none_or(is_news) {
            self.complained = Some(Instant::now());
            tracing::error!(%why, "audit records are lost (cpc_audit_records_lost_total)");
        }
    }
}

impl Write for Sink {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let count = lines.iter().filter(|byte| **byte == b'\n').count() as u64;
        let counter = match self.put(lines) {
            Ok(()) => &self.counts.written,
            Err(error) => {
                self.complain(&error);
                &self.counts.lost
            }
        };
        counter.fetch_add(count, Ordering::Relaxed);
        Ok(lines.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Files for their owner alone, where the directory is ours to make.
fn files_in(directory: &Path, keep: usize) -> io::Result<RollingFileAppender> {
    if !directory.is_dir() {
        if let Some(parent) = directory.parent() {
            fs::create_dir_all(parent)?;
        }
        DirBuilder::new().mode(0o700).create(directory)?;
    }
    RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("audit")
        .filename_suffix("jsonl")
        .max_log_files(keep)
        .build(directory)
        .map_err(io::Error::other)
}

fn journal(socket: &Path) -> io::Result<UnixDatagram> {
    let journal = UnixDatagram::unbound()?;
    journal.connect(socket)?;
    Ok(journal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sink(files: Option<RollingFileAppender>, journal: Option<UnixDatagram>) -> Sink {
        Sink {
            files,
            journal,
            counts: Arc::default(),
            complained: None,
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
            let mut sink = sink(Some(files_in(&directory, 2).unwrap()), None);
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
        assert!(files_in(place.path(), 2).is_err());
        assert!(files_in(&place.path().join("below"), 2).is_err());
    }
}
