//! The file in which tokens stand, and what was issued. A server and `cpc token` change it in turn: each
//! change is made under a lock and put in place in one step.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use super::admit::Pages;

/// Its name.
const FILE: &str = "join.json";

/// What is locked, since the file itself is replaced.
const LOCK: &str = "join.lock";

/// Why the book can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub struct BookError {
    path: PathBuf,
    why: String,
}

/// The book in a directory.
#[derive(Clone, Debug)]
pub struct Book {
    directory: PathBuf,
}

impl Book {
    /// In `directory`, which is made for its owner alone if it is not there.
    ///
    /// # Errors
    /// [`BookError`], also when what is there can't be read.
    pub fn open(directory: &Path) -> Result<Self, BookError> {
        let book = Self {
            directory: directory.into(),
        };
        if !directory.is_dir() {
            let mut builder = fs::DirBuilder::new();
            let made = builder.recursive(true).mode(0o700).create(directory);
            let made = made.and_then(|()| match directory.parent() {
                Some(parent) => leave_to_owner(parent, directory),
                None => Ok(()),
            });
            made.map_err(|error| book.error("", &error))?;
        }
        book.read()?;
        Ok(book)
    }

    /// What stands in it.
    ///
    /// # Errors
    /// [`BookError`].
    pub fn read(&self) -> Result<Pages, BookError> {
        match fs::read(self.directory.join(FILE)) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| self.error(FILE, &error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Pages::default()),
            Err(error) => Err(self.error(FILE, &error)),
        }
    }

    /// Changes it, unless `change` fails.
    ///
    /// # Errors
    /// What `change` says, or [`BookError`]; then it is as it was.
    pub fn change<T, E: From<BookError>>(
        &self,
        change: impl FnOnce(&mut Pages) -> Result<T, E>,
    ) -> Result<T, E> {
        let _lock = self.lock()?;
        let mut pages = self.read()?;
        let done = change(&mut pages)?;
        self.write(&pages)
            .map_err(|error| self.error(FILE, &error))?;
        Ok(done)
    }

    fn lock(&self) -> Result<Flock<File>, BookError> {
        let path = self.directory.join(LOCK);
        let open = File::options().create(true).append(true).open(&path);
        let open = open.and_then(|file| leave_to_owner(&self.directory, &path).map(|()| file));
        let file = open.map_err(|error| self.error(LOCK, &error))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| self.error(LOCK, &error))
    }

    fn write(&self, pages: &Pages) -> io::Result<()> {
        // Its owner's alone, by default.
        let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
        serde_json::to_writer_pretty(&mut file, pages)?;
        file.flush()?;
        file.as_file().sync_all()?;
        leave_to_owner(&self.directory, file.path())?;
        file.persist(self.directory.join(FILE))?;
        File::open(&self.directory)?.sync_all()
    }

    fn error(&self, file: &str, why: &dyn std::fmt::Display) -> BookError {
        BookError {
            path: self.directory.join(file),
            why: why.to_string(),
        }
    }
}

/// What root makes, by `cpc token`, a server that is not root has to read and replace.
fn leave_to_owner(of: &Path, path: &Path) -> io::Result<()> {
    let (owner, now) = (fs::metadata(of)?, fs::metadata(path)?);
    if (owner.uid(), owner.gid()) == (now.uid(), now.gid()) || !geteuid().is_root() {
        return Ok(());
    }
    chown(path, Some(owner.uid()), Some(owner.gid()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::{Duration, SystemTime};

    use super::super::admit::Ticket;
    use super::*;

    fn ticket(n: u32) -> Ticket {
        Ticket {
            digest: super::super::token::Digest::default(),
            nodes: "w*".into(),
            addresses: vec!["10.99.0.0/16".parse().unwrap()],
            uses: n,
            expires: SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000),
            used: BTreeMap::new(),
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
                    let book = Book::open(directory).unwrap();
                    for m in 0..5 {
                        let changed = book.change(|pages| {
                            pages.tokens.insert(format!("{n}-{m}"), ticket(n));
                            Ok::<_, BookError>(())
                        });
                        changed.unwrap();
                    }
                });
            }
        });
        let pages = Book::open(&directory).unwrap().read().unwrap();
        assert_eq!(pages.tokens.len(), 40);
        assert_eq!(pages.tokens["3-4"], ticket(3));
        let left: Vec<_> = fs::read_dir(&directory).unwrap().collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn a_change_that_fails_leaves_no_trace_and_a_broken_book_is_not_written_over() {
        let place = tempfile::tempdir().unwrap();
        let book = Book::open(place.path()).unwrap();
        let failed = book.change(|pages| {
            pages.tokens.insert("x".into(), ticket(1));
            Err::<(), _>(book.error("", &"no"))
        });
        assert!(failed.is_err());
        assert!(book.read().unwrap().tokens.is_empty());
        fs::write(place.path().join(FILE), "{").unwrap();
        let changed = book.change(|_| Ok::<_, BookError>(()));
        assert!(changed.unwrap_err().to_string().contains(FILE));
        assert!(Book::open(place.path()).is_err());
        assert_eq!(fs::read(place.path().join(FILE)).unwrap(), b"{");
    }
}
