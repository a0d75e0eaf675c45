//! The file of a Unix frontend: created, watched, and created again when it is gone.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, SystemTime};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::time::sleep;

use cpc_config::frontend::UnixFrontend;
use cpc_host::directory::Directory;

/// Polling interval of the file.
const LOOK: Duration = Duration::from_secs(1);

/// File of a listener.
#[derive(Debug)]
pub(crate) struct SocketFile {
    config: UnixFrontend,
    /// Identity of our file, which distinguishes it from another one at the same path.
    own: Option<FileId>,
    is_inherited: bool,
}

/// Device, inode, and the creation time where that is known, because inode numbers are reused.
type FileId = (u64, u64, Option<SystemTime>);

/// State of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SocketFileState {
    /// The file exists.
    There,
    /// The file is missing.
    Gone,
    /// Another process has replaced the file.
    Taken,
}

/// Creates the socket of a Unix frontend. Replaces the socket of a process that is gone, and one that
/// answers where `takeover` is set. Waits for no other process.
///
/// # Errors
/// The error of the system call, or that the path belongs to something else.
pub(crate) fn bind(config: &UnixFrontend) -> io::Result<(UnixListener, SocketFile)> {
    let path = &config.unix;
    // Only making it goes by its path; where that leads elsewhere by then, nothing is found here.
    let (directory, name) = Directory::of(path)?;
    let is_there = match directory.look(name) {
        Ok(found) if !is_socket(&found) => {
            let text = format!(
                "{} is no socket: move it away, or choose another path",
                path.display()
            );
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        found => found.is_ok(),
    };
    if is_there && !config.takeover && is_served(path) {
        let text = format!("{} is served by another process", path.display());
        return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
    }
    // Under another name until its mode is right, so that no client connects before.
    let aside = format!("{name}.new");
    let _ = directory.remove(&aside);
    let listener = UnixListener::bind(path.with_file_name(&aside))?;
    let made = directory.look(&aside)?;
    set_mode(&made, path, config.mode)?;
    let own = id(&made.metadata()?);
    directory.rename(&aside, name)?;
    listener.set_nonblocking(true)?;
    let file = SocketFile {
        config: config.clone(),
        own: Some(own),
        is_inherited: false,
    };
    Ok((listener, file))
}

/// Whether a process listens behind a socket. One with a full backlog does; this does not wait for it.
fn is_served(path: &Path) -> bool {
    let connected = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    match connected() {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
}

fn is_socket(found: &fs::File) -> bool {
    let metadata = found.metadata();
    metadata.is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Sets the mode of the socket for `path`, by its descriptor: the owner of its directory may have
/// replaced it by a link.
fn set_mode(made: &fs::File, path: &Path, mode: u32) -> io::Result<()> {
    if !is_socket(made) {
        let text = format!("{} was replaced while it was made", path.display());
        return Err(io::Error::other(text));
    }
    // What was opened by its path alone has no fchmod(2).
    let opened = format!("/proc/self/fd/{}", made.as_raw_fd());
    fs::set_permissions(opened, fs::Permissions::from_mode(mode))
}

fn id_of(path: &Path) -> io::Result<FileId> {
    Ok(id(&fs::symlink_metadata(path)?))
}

fn id(metadata: &fs::Metadata) -> FileId {
    (metadata.dev(), metadata.ino(), metadata.created().ok())
}

impl SocketFile {
    /// Returns the file of a listener that a service manager has created.
    pub(crate) fn inherited(config: &UnixFrontend) -> Self {
        Self {
            config: config.clone(),
            own: id_of(&config.unix).ok(),
            is_inherited: true,
        }
    }

    /// Notes the file of a predecessor, which is this process's now.
    pub(crate) fn taken_over(config: &UnixFrontend) -> Self {
        let mut file = Self::inherited(config);
        file.is_inherited = false;
        file
    }

    /// Whether the file belongs to this process, and not to the service manager.
    pub(crate) fn is_own(&self) -> bool {
        !self.is_inherited
    }

    /// Leaves the file to a successor.
    pub(super) fn leave(&mut self) {
        self.own = None;
    }

    /// Returns the path.
    pub(super) fn path(&self) -> &Path {
        &self.config.unix
    }

    /// Waits until the state of the file is not `before`, or can be repaired.
    pub(super) async fn changed(&self, before: SocketFileState) -> SocketFileState {
        loop {
            sleep(LOOK).await;
            let now = self.fate();
            if now != before || now == SocketFileState::Gone {
                return now;
            }
        }
    }

    /// Checks the file.
    pub(super) fn fate(&self) -> SocketFileState {
        match id_of(self.path()) {
            Ok(id) if self.own.is_none_or(|own| own == id) => SocketFileState::There,
            Ok(_) => SocketFileState::Taken,
            Err(error) if error.kind() == io::ErrorKind::NotFound => SocketFileState::Gone,
            // A directory that may not be read says nothing.
            Err(_) => SocketFileState::There,
        }
    }

    /// Creates the file again, with another listener behind it.
    ///
    /// # Errors
    /// The error of the system call, or that the file is the service manager's.
    pub(super) fn make_again(&mut self) -> io::Result<UnixListener> {
        if self.is_inherited {
            return Err(io::Error::other(
                "its service manager made it; restart the .socket unit",
            ));
        }
        let (listener, file) = bind(&self.config)?;
        // The new one may have the number of the old one.
        self.own = None;
        *self = file;
        Ok(listener)
    }
}

/// Removes the file: one without a listener would look like a server that does not answer. A file of
/// another process or of the service manager stays.
impl Drop for SocketFile {
    fn drop(&mut self) {
        let Some(own) = self.own.filter(|_| !self.is_inherited) else {
            return;
        };
        let Ok((directory, name)) = Directory::of(self.path()) else {
            return;
        };
        let found = directory.look(name).and_then(|found| found.metadata());
        if found.is_ok_and(|found| id(&found) == own) {
            // The next start replaces what can't be removed.
            let _ = directory.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;

    use super::*;
    use cpc_config::frontend::Answers;

    fn config(path: PathBuf) -> UnixFrontend {
        UnixFrontend {
            unix: path,
            mode: 0o600,
            takeover: false,
            tenant: None,
            allow: None,
            answers: Answers::default(),
        }
    }

    #[test]
    fn a_file_that_is_gone_is_made_again_and_another_ones_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let config = config(place.path().join("socket"));
        let (_listener, mut file) = bind(&config).unwrap();
        assert_eq!(file.fate(), SocketFileState::There);
        fs::remove_file(&config.unix).unwrap();
        assert_eq!(file.fate(), SocketFileState::Gone);
        let listener = file.make_again().unwrap();
        assert_eq!(file.fate(), SocketFileState::There);
        UnixStream::connect(&config.unix).unwrap();
        drop(listener);
        let (_successor, theirs) = bind(&config).unwrap();
        assert_eq!(
            (file.fate(), theirs.fate()),
            (SocketFileState::Taken, SocketFileState::There)
        );
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let mut config = config(place.path().join("data"));
        config.takeover = true;
        fs::write(&config.unix, "content").unwrap();
        let refused = bind(&config).unwrap_err();
        assert!(refused.to_string().contains("no socket"), "{refused}");
        assert_eq!(fs::read_to_string(&config.unix).unwrap(), "content");
        // The same holds for a link: the rename would replace the link itself.
        let link = place.path().join("link");
        std::os::unix::fs::symlink(&config.unix, &link).unwrap();
        config.unix = link;
        bind(&config).unwrap_err();
    }

    /// A client that connects to it would wait for a place.
    #[test]
    fn a_socket_whose_backlog_is_full_is_left_alone_at_once() {
        let place = tempfile::tempdir().unwrap();
        let config = config(place.path().join("socket"));
        let stuck = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        stuck.bind(&SockAddr::unix(&config.unix).unwrap()).unwrap();
        stuck.listen(0).unwrap();
        let _waits = UnixStream::connect(&config.unix).unwrap();
        let refused = bind(&config).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        drop(stuck);
        bind(&config).unwrap();
    }

    #[test]
    fn a_file_goes_with_its_listener_unless_it_is_somebody_elses() {
        let place = tempfile::tempdir().unwrap();
        let config = config(place.path().join("socket"));
        drop(bind(&config).unwrap());
        assert!(!config.unix.exists());
        let (_, former) = bind(&config).unwrap();
        let (_successor, theirs) = bind(&config).unwrap();
        drop(former);
        assert!(config.unix.exists());
        drop(theirs);
        assert!(!config.unix.exists());
        let _listener = UnixListener::bind(&config.unix).unwrap();
        drop(SocketFile::inherited(&config));
        assert!(config.unix.exists());
    }

    #[test]
    fn an_inherited_file_is_not_made_again() {
        let place = tempfile::tempdir().unwrap();
        let config = config(place.path().join("socket"));
        let _listener = UnixListener::bind(&config.unix).unwrap();
        let mut file = SocketFile::inherited(&config);
        assert_eq!(file.fate(), SocketFileState::There);
        fs::remove_file(&config.unix).unwrap();
        assert_eq!(file.fate(), SocketFileState::Gone);
        assert!(file.make_again().is_err());
    }
}
