//! A directory that a command writes into, which may belong to a user with fewer privileges than the
//! command.
//!
//! The owner of a directory must not be able to lead a command of root elsewhere. So a [`Directory`] is
//! opened once and then used by its descriptor. A symbolic link on the way counts only where root alone
//! can have put it, and one in the directory never. New files belong to the owner of the directory, who
//! has to be able to use them. Replacing a file is one step.

use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use aws_lc_rs::rand;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, getegid, geteuid, setfsgid, setfsuid, unlinkat};

/// Maximum number of symbolic links on the way, as in the kernel.
const MAX_LINKS: usize = 40;

/// An open directory.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    /// Owner of the files that root creates.
    owner: Option<Owner>,
}

type Owner = (Uid, Gid);

impl Directory {
    /// Opens `path`.
    ///
    /// # Errors
    /// The error of the system call, or a symbolic link on the way that root does not follow.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::walk(path, None)
    }

    /// Opens `path`. Missing directories are created with `mode`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn create(path: &Path, mode: u32) -> io::Result<Self> {
        Self::walk(path, Some(mode)).map_err(with_remedy)
    }

    /// Opens the parent directory of `path`, and returns it with the last part of `path`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn of(path: &Path) -> io::Result<(Self, &str)> {
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
        Ok((Self::open(folder.unwrap_or(Path::new(".")))?, name))
    }

    fn walk(path: &Path, make: Option<u32>) -> io::Result<Self> {
        let fd = if geteuid().is_root() {
            walk_as_root(path, make)?
        } else {
            if let Some(mode) = make {
                let mut builder = std::fs::DirBuilder::new();
                builder.recursive(true).mode(mode).create(path)?;
            }
            let mut options = File::options();
            let options = options.read(true).custom_flags(libc::O_DIRECTORY);
            options.open(path)?.into()
        };
        let owner = owner_beside_root(&fstat(&fd)?);
        Ok(Self { fd, owner })
    }

    /// Reads the file `name`.
    ///
    /// # Errors
    /// The error of the system call, or that it is not a regular file.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        let mut file = self.open_file(name, OFlag::O_RDONLY)?;
        file.read_to_end(&mut content)?;
        Ok(content)
    }

    /// Whether the directory has an entry `name`.
    pub fn has(&self, name: &str) -> bool {
        self.look(name).is_ok()
    }

    /// Opens the entry `name` for its metadata alone, without following a symbolic link.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn look(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(openat(&self.fd, name, flags, Mode::empty())?.into())
    }

    /// Returns the names of all entries that are UTF-8, in no order.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            names.extend(entry.file_name().to_str().map(ToOwned::to_owned));
        }
        names.retain(|name| name != "." && name != "..");
        Ok(names)
    }

    /// Returns the length of the file `name`, in bytes.
    ///
    /// # Errors
    /// The error of the system call, or that it is not a regular file.
    pub fn size(&self, name: &str) -> io::Result<u64> {
        let metadata = self.look(name)?.metadata()?;
        match metadata.is_file() {
            true => Ok(metadata.len()),
            false => Err(no_file(name)),
        }
    }

    /// Opens the file `name` for reading.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn open_to_read(&self, name: &str) -> io::Result<File> {
        self.open_file(name, OFlag::O_RDONLY)
    }

    /// Opens the file `name` for reading and writing, and creates it where it is missing.
    ///
    /// # Errors
    /// As [`Self::read`], or that the file has a second name and another owner than the directory.
    pub fn open_to_write(&self, name: &str, mode: u32) -> io::Result<File> {
        self.not_another_ones(name, self.open_or_make(name, OFlag::O_RDWR, mode)?)
    }

    /// Opens the file `name` for reading and appending, and creates it where it is missing.
    ///
    /// # Errors
    /// As [`Self::open_to_write`].
    pub fn open_to_append(&self, name: &str, mode: u32) -> io::Result<File> {
        let access = OFlag::O_RDWR | OFlag::O_APPEND;
        self.not_another_ones(name, self.open_or_make(name, access, mode)?)
    }

    /// Locks the file `name` until the lock is dropped. A missing file is created.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn lock(&self, name: &str) -> io::Result<Flock<File>> {
        let file = self.open_or_make(name, OFlag::O_RDWR, 0o600)?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
    }

    /// Renames `from` to `to`, and replaces an existing `to` in one step.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.fd, from, &self.fd, to)?)
    }

    /// Creates the file `name`, or replaces it in one step. After a crash either the old or the new
    /// content is there, whole.
    ///
    /// # Errors
    /// The error of the system call; the old content stays.
    pub fn replace(&self, name: &str, content: &[u8], mode: u32) -> io::Result<()> {
        self.replaced(name, content, mode).map_err(with_remedy)
    }

    fn replaced(&self, name: &str, content: &[u8], mode: u32) -> io::Result<()> {
        let mut random = [0; 8];
        rand::fill(&mut random).map_err(|_| io::Error::other("no random numbers"))?;
        let aside = format!(".{name}.{:016x}", u64::from_ne_bytes(random));
        let mut file = self.make(&aside, OFlag::O_RDWR, mode)?;
        let written = file
            .write_all(content)
            .and_then(|()| file.sync_all())
            .and_then(|()| self.rename(&aside, name));
        if let Err(error) = written {
            let _ = self.remove(&aside);
            return Err(error);
        }
        Ok(nix::unistd::fsync(&self.fd)?)
    }

    /// Creates the file `name` and syncs it to the disk.
    ///
    /// # Errors
    /// The error of the system call; the file is not there then. [`io::ErrorKind::AlreadyExists`] where
    /// an entry of that name exists, which stays as it is.
    pub fn create_new(&self, name: &str, content: &[u8], mode: u32) -> io::Result<()> {
        let made = self.make(name, OFlag::O_RDWR, mode);
        let mut file = made.map_err(with_remedy)?;
        let written = file
            .write_all(content)
            .and_then(|()| file.sync_all())
            .and_then(|()| Ok(nix::unistd::fsync(&self.fd)?));
        written
            .inspect_err(|_| drop(self.remove(name)))
            .map_err(with_remedy)
    }

    /// Removes the file or symbolic link `name`.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir)?)
    }

    fn open_or_make(&self, name: &str, access: OFlag, mode: u32) -> io::Result<File> {
        match self.make(name, access, mode) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.open_file(name, access)
            }
            made => made.map_err(with_remedy),
        }
    }

    fn make(&self, name: &str, access: OFlag, mode: u32) -> io::Result<File> {
        let flags = access | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let private = Mode::S_IRUSR | Mode::S_IWUSR;
        let made = acting_as(self.owner, || openat(&self.fd, name, flags, private))?;
        let file = File::from(made);
        if let Some((uid, _)) = self.owner
            && file.metadata()?.uid() != uid.as_raw()
        {
            let _ = self.remove(name);
            let why = format!("root can't write as the directory's owner; run this as user {uid}");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        // Past the umask.
        file.set_permissions(Permissions::from_mode(mode))?;
        Ok(file)
    }

    /// Rejects another user's file before root writes to it: the owner of the directory may have
    /// linked it there.
    fn not_another_ones(&self, name: &str, file: File) -> io::Result<File> {
        let metadata = file.metadata()?;
        match self.owner {
            Some((uid, _)) if metadata.uid() != uid.as_raw() && metadata.nlink() > 1 => {
                let why = format!("{name} is another user's, and has another hard link: remove it");
                Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
            }
            _ => Ok(file),
        }
    }

    fn open_file(&self, name: &str, access: OFlag) -> io::Result<File> {
        // Opening a pipe would wait for its other end.
        let flags = access | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) if is(&fstat(&fd)?, SFlag::S_IFREG) => Ok(fd.into()),
            Ok(_) | Err(Errno::ELOOP | Errno::ENXIO | Errno::EISDIR) => Err(no_file(name)),
            Err(error) => Err(error.into()),
        }
    }
}

/// Adds the remedy to the error of a full file system.
pub fn with_remedy(error: io::Error) -> io::Error {
    let remedy = match error.kind() {
        io::ErrorKind::StorageFull => "make room on its file system (`df`, `df -i`)",
        io::ErrorKind::QuotaExceeded => "make room within the user's quota, or raise it",
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{error}: {remedy}"))
}

fn no_file(name: &str) -> io::Error {
    let why = format!("{name} is a link, or not a file: remove it");
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// Opens a directory part by part, each by the descriptor of the one before.
fn walk_as_root(path: &Path, make: Option<u32>) -> io::Result<OwnedFd> {
    let open = |at: &OwnedFd, part: &OsString| {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(at, part.as_os_str(), flags, Mode::empty())
    };
    let root = || Ok::<_, io::Error>(OwnedFd::from(File::open("/")?));
    let (mut at, mut links) = (root()?, 0);
    let mut ahead = parts(&std::path::absolute(path)?);
    while let Some(part) = ahead.pop() {
        let found = match (open(&at, &part), make) {
            (Err(Errno::ENOENT), Some(mode)) => {
                let mode = Mode::from_bits_truncate(mode);
                let owner = owner_beside_root(&fstat(&at)?);
                match acting_as(owner, || mkdirat(&at, part.as_os_str(), mode)) {
                    Ok(()) | Err(Errno::EEXIST) => open(&at, &part)?,
                    Err(error) => return Err(error.into()),
                }
            }
            (found, _) => found?,
        };
        let stat = fstat(&found)?;
        if is(&stat, SFlag::S_IFLNK) {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::ELOOP.into());
            }
            if !is_roots_own(&fstat(&at)?, &stat) {
                let part = part.display();
                let why =
                    format!("{part} is a link that is not root's, which root does not follow");
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
            }
            let target = PathBuf::from(readlinkat(&found, "")?);
            if target.is_absolute() {
                at = root()?;
            }
            ahead.extend(parts(&target));
        } else {
            at = found;
        }
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(openat(&at, ".", flags, Mode::empty())?)
}

/// Returns the parts of a path, the last one first.
fn parts(path: &Path) -> Vec<OsString> {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        _ => None,
    });
    let mut parts: Vec<_> = parts.collect();
    parts.reverse();
    parts
}

/// Whether root alone can have put this link into the directory.
fn is_roots_own(directory: &FileStat, link: &FileStat) -> bool {
    let mode = Mode::from_bits_truncate(directory.st_mode);
    let others_write =
        mode.contains(Mode::S_IWOTH) || mode.contains(Mode::S_IWGRP) && directory.st_gid != 0;
    let keeps_each_their_own = mode.contains(Mode::S_ISVTX);
    directory.st_uid == 0 && link.st_uid == 0 && (!others_write || keeps_each_their_own)
}

fn is(stat: &FileStat, kind: SFlag) -> bool {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == kind
}

fn owner_beside_root(directory: &FileStat) -> Option<Owner> {
    let owner = (directory.st_uid.into(), directory.st_gid.into());
    (geteuid().is_root() && directory.st_uid != 0).then_some(owner)
}

/// Runs `work` with the file access rights of `owner`, on this thread alone (setfsuid(2)).
fn acting_as<T>(owner: Option<Owner>, work: impl FnOnce() -> T) -> T {
    let Some((uid, gid)) = owner else {
        return work();
    };
    setfsgid(gid);
    setfsuid(uid);
    let done = work();
    setfsuid(geteuid());
    setfsgid(getegid());
    done
}

#[cfg(test)]
mod tests;
