//! The file of tokens and issued certificates. A server and `cpc token` take turns: each change happens
//! under a lock and replaces the file in one step.
//!
//! A second file beside a CA lists the certificates of `cpc pki`: a server only reads it.

use std::io;
use std::path::{Path, PathBuf};

use super::issue_records::IssueRecords;
use cpc_host::directory::Directory;

/// Failure to use the file.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct IssueLogError {
    path: PathBuf,
    why: String,
}

/// The file in its directory.
#[derive(Clone, Debug)]
pub struct IssueLog {
    directory: PathBuf,
    names: &'static Names,
}

/// Names of the files.
#[derive(Debug)]
struct Names {
    file: &'static str,
    /// File of the lock: the data file itself is replaced.
    lock: &'static str,
    mode: u32,
}

const JOIN: Names = Names {
    file: "join.json",
    lock: "join.lock",
    mode: 0o600,
};

/// The list beside a CA. It is no secret: every handshake shows a certificate.
const ISSUED: Names = Names {
    file: "issued.json",
    lock: "issued.lock",
    mode: 0o644,
};

impl IssueLog {
    /// Opens the file in `directory`, which is created for its owner alone where it is missing.
    ///
    /// # Errors
    /// [`IssueLogError`], also when the content is unreadable.
    pub fn open(directory: &Path) -> Result<Self, IssueLogError> {
        let log = Self {
            directory: directory.into(),
            names: &JOIN,
        };
        Directory::create(directory, 0o700).map_err(|error| log.error("", &error))?;
        log.read()?;
        Ok(log)
    }

    /// Returns the list of certificates that `cpc pki` issued from the CA in `directory`, without
    /// reading it yet.
    pub fn of_ca(directory: &Path) -> Self {
        Self {
            directory: directory.into(),
            names: &ISSUED,
        }
    }

    /// Reads the content.
    ///
    /// # Errors
    /// [`IssueLogError`].
    pub fn read(&self) -> Result<IssueRecords, IssueLogError> {
        self.parse(self.text_in(&self.directory()?)?.as_deref())
    }

    /// Changes the content, unless `change` fails. Writes nothing if nothing has changed.
    ///
    /// # Errors
    /// The error of `change`, or [`IssueLogError`]; the content stays then.
    pub fn change<T, E: From<IssueLogError>>(
        &self,
        change: impl FnOnce(&mut IssueRecords) -> Result<T, E>,
    ) -> Result<T, E> {
        let Names { file, lock, mode } = self.names;
        let directory = self.directory()?;
        let locked = directory.lock(lock);
        let _lock = locked.map_err(|error| self.error(lock, &error))?;
        let before = self.text_in(&directory)?;
        let mut records = self.parse(before.as_deref())?;
        let done = change(&mut records)?;
        let written = serde_json::to_vec_pretty(&records)
            .map_err(io::Error::from)
            .and_then(|text| match before.as_ref() == Some(&text) {
                true => Ok(()),
                false => directory.replace(file, &text, *mode),
            });
        written.map_err(|error| self.error(file, &error))?;
        Ok(done)
    }

    fn directory(&self) -> Result<Directory, IssueLogError> {
        Directory::open(&self.directory).map_err(|error| self.error("", &error))
    }

    fn text_in(&self, directory: &Directory) -> Result<Option<Vec<u8>>, IssueLogError> {
        let file = self.names.file;
        match directory.read(file) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.error(file, &error)),
        }
    }

    fn parse(&self, text: Option<&[u8]>) -> Result<IssueRecords, IssueLogError> {
        let records = text.map(serde_json::from_slice).transpose();
        let records = records.map_err(|error| self.error(self.names.file, &error))?;
        Ok(records.unwrap_or_default())
    }

    fn error(&self, file: &str, why: &dyn std::fmt::Display) -> IssueLogError {
        IssueLogError {
            path: self.directory.join(file),
            why: why.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::time::{Duration, SystemTime};

    use super::super::issue_records::Ticket;
    use super::*;

    const FILE: &str = JOIN.file;

    fn ticket(n: u32) -> Ticket {
        Ticket {
            digest: super::super::token::Digest::default(),
            nodes: "w*".into(),
            addresses: vec!["10.99.0.0/16".parse().unwrap()],
            uses: n,
            created: None,
            expires: SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000),
            used: Vec::new(),
        }
    }

    #[test]
    fn changes_by_many_are_all_kept() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("below/join");
        std::thread::scope(|scope| {
            for n in 0..8 {
                let directory = &directory;
                scope.spawn(move || {
                    let log = IssueLog::open(directory).unwrap();
                    for m in 0..5 {
                        let changed = log.change(|records| {
                            records.tokens.insert(format!("{n}-{m}"), ticket(n));
                            Ok::<_, IssueLogError>(())
                        });
                        changed.unwrap();
                    }
                });
            }
        });
        let records = IssueLog::open(&directory).unwrap().read().unwrap();
        assert_eq!(records.tokens.len(), 40);
        assert_eq!(records.tokens["3-4"], ticket(3));
        let left: Vec<_> = fs::read_dir(&directory).unwrap().collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn what_has_not_changed_is_not_written() {
        let place = tempfile::tempdir().unwrap();
        let log = IssueLog::open(place.path()).unwrap();
        // A file that is replaced is another one.
        let file = || fs::metadata(place.path().join(FILE)).unwrap().ino();
        let put = |uses| {
            let changed = log.change(|records| {
                records.tokens.insert("x".into(), ticket(uses));
                Ok::<_, IssueLogError>(())
            });
            changed.unwrap();
        };
        put(1);
        let first = file();
        put(1);
        assert_eq!(file(), first);
        put(2);
        assert_ne!(file(), first);
        assert_eq!(log.read().unwrap().tokens["x"].uses, 2);
    }

    #[test]
    fn a_change_that_fails_leaves_no_trace_and_a_broken_book_is_not_written_over() {
        let place = tempfile::tempdir().unwrap();
        let log = IssueLog::open(place.path()).unwrap();
        let failed = log.change(|records| {
            records.tokens.insert("x".into(), ticket(1));
            Err::<(), _>(log.error("", &"no"))
        });
        assert!(failed.is_err());
        assert!(log.read().unwrap().tokens.is_empty());
        fs::write(place.path().join(FILE), "{").unwrap();
        let changed = log.change(|_| Ok::<_, IssueLogError>(()));
        assert!(changed.unwrap_err().to_string().contains(FILE));
        assert!(IssueLog::open(place.path()).is_err());
        assert_eq!(fs::read(place.path().join(FILE)).unwrap(), b"{");
    }
}
