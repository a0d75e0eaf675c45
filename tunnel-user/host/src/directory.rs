//! A directory that a command writes into, which may belong to somebody less privileged than the command.
//!
//! Run by root, a command must not be led elsewhere by who owns the directory. So a [`Directory`] is opened
//! once and then used by its descriptor; a symbolic link on the way counts only where root alone can have
//! put it, and one in the directory never. What is made there is made as the directory's owner, who has to
//! be able to use it. Files are replaced in one step.

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

/// Links on the way, as many as the kernel follows.
const MAX_LINKS: usize = 40;

/// An open directory.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    /// As whom root makes files.
    owner: Option<Owner>,
}

type Owner = (Uid, Gid);

impl Directory {
    /// Opens `path`.
    ///
    /// # Errors
    /// What the system says, or that there is a link on the way which root does not follow.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::walk(path, None)
    }

    /// Opens `path`. What is missing of it is made with `mode`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn create(path: &Path, mode: u32) -> io::Result<Self> {
        Self::walk(path, Some(mode)).map_err(with_remedy)
    }

    /// The directory that `path` lies in, and the last part of `path`.
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

    /// What stands in the file `name`.
    ///
    /// # Errors
    /// What the system says, or that it is no regular file.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        let mut file = self.open_file(name, OFlag::O_RDONLY)?;
        file.read_to_end(&mut content)?;
        Ok(content)
    }

    /// Whether there is anything called `name`.
    pub fn has(&self, name: &str) -> bool {
        self.look(name).is_ok()
    }

    /// What is called `name`, itself where it is a link: to be looked at, not to be read.
    ///
    /// # Errors
    /// What the system says.
    pub fn look(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(openat(&self.fd, name, flags, Mode::empty())?.into())
    }

    /// The names in it that are UTF-8, in no order.
    ///
    /// # Errors
    /// What the system says.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            names.extend(entry.file_name().to_str().map(ToOwned::to_owned));
        }
        names.retain(|name| name != "." && name != "..");
        Ok(names)
    }

    /// The length of the file `name`, in bytes.
    ///
    /// # Errors
    /// What the system says, or that it is no regular file.
    pub fn size(&self, name: &str) -> io::Result<u64> {
        let metadata = self.look(name)?.metadata()?;
        match metadata.is_file() {
            true => Ok(metadata.len()),
            false => Err(no_file(name)),
        }
    }

    /// Opens the file `name` to be read.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn open_to_read(&self, name: &str) -> io::Result<File> {
        self.open_file(name, OFlag::O_RDONLY)
    }

    /// Opens the file `name` to be read and written, and makes it where it is missing.
    ///
    /// # Errors
    /// As [`Self::read`], or that the file is another user's than the directory and has a second name.
    pub fn open_to_write(&self, name: &str, mode: u32) -> io::Result<File> {
        self.not_another_ones(name, self.open_or_make(name, OFlag::O_RDWR, mode)?)
    }

    /// Opens the file `name` to be read and appended to, and makes it where it is missing.
    ///
    /// # Errors
    /// As [`Self::open_to_write`].
    pub fn open_to_append(&self, name: &str, mode: u32) -> io::Result<File> {
        let access = OFlag::O_RDWR | OFlag::O_APPEND;
        self.not_another_ones(name, self.open_or_make(name, access, mode)?)
    }

    /// Locks the file `name`, which is made where it is missing, until the lock is dropped.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn lock(&self, name: &str) -> io::Result<Flock<File>> {
        let file = self.open_or_make(name, OFlag::O_RDWR, 0o600)?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
    }

    /// Gives `from` the name `to`, and replaces what is called so in one step.
    ///
    /// # Errors
    /// What the system says.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.fd, from, &self.fd, to)?)
    }

    /// Makes the file `name`, or replaces it in one step, so that after a crash the old one or the new one
    /// is there, whole.
    ///
    /// # Errors
    /// What the system says; what was there is there still.
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

    /// Makes the file `name`, which is on the disk then.
    ///
    /// # Errors
    /// What the system says, and there is no such file; [`io::ErrorKind::AlreadyExists`] where there is
    /// anything of that name, which stays as it is.
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

    /// Removes the file `name`, or a link of that name.
    ///
    /// # Errors
    /// What the system says.
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

    /// A file that root writes in place: who owns the directory may have linked another user's there.
    fn not_another_ones(&self, name: &str, file: File) -> io::Result<File> {
        let metadata = file.metadata()?;
        match self.owner {
            Some((uid, _)) if metadata.uid() != uid.as_raw() && metadata.nlink() > 1 => {
                let why = format!("{name} is another user's, and has a second name: remove it");
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

/// Adds to an error what its reader can do about it, where the file system is full.
pub fn with_remedy(error: io::Error) -> io::Error {
    let remedy = match error.kind() {
        io::ErrorKind::StorageFull => "make room on its file system (`df`, `df -i`)",
        io::ErrorKind::QuotaExceeded => "make room within the user's quota, or raise it",
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{error}: {remedy}"))
}

fn no_file(name: &str) -> io::Error {
    let why = format!("{name} is a link, or no file: remove it");
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

/// What a path goes through, the last part first.
fn parts(path: &Path) -> Vec<OsString> {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(_) | Component::ParentDir => Some(part.as_os_str().to_owned()),
        _ => None,
    });
    let mut parts: Vec<_> = parts.collect();
    parts.reverse();
    parts
}

/// Whether a link in a directory is one that root alone can have put there.
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

/// Runs `work` with the rights of `owner` on files; this thread alone (setfsuid(2)).
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
