//! The file of a Unix frontend: created, watched, and created again when it is gone.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::time::sleep;

use cpc_config::frontend::UnixFrontend;
use cpc_host::directory::Directory;
use cpc_host::inherited::{Inherited, Noted};

/// First word of the name, for a successor, of a listener whose file this program has made. The identity of the
/// file and its path follow. The socket itself was bound under another path.
const OWN_FILE: &str = "unix";

/// Polling interval of the file.
const LOOK: Duration = Duration::from_secs(1);

/// File of a listener.
#[derive(Debug)]
pub(crate) struct SocketFile {
    config: UnixFrontend,
    /// Identity of our file, which distinguishes it from another one at the same path.
    own: Option<FileId>,
    maker: Maker,
    /// Listeners for a successor, this one among them.
    noted: Noted,
}

/// Process that has made a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Maker {
    /// This process, or a predecessor that has released the file.
    Own,
    /// A predecessor, which may go on with the file.
    Predecessor,
    /// The service manager.
    Manager,
}

/// Device, inode, and the creation time in nanoseconds where that is known, because inode numbers are reused.
type FileId = (u64, u64, Option<u128>);

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
        maker: Maker::Own,
        noted: Noted::default(),
    };
    Ok((listener, file))
}

/// Removes the files of listeners that a predecessor has given under `names`, and that are closed.
pub(crate) fn remove_closed(names: &[String]) {
    for (own, path) in names.iter().filter_map(|name| parse(name)) {
        remove(path, own);
    }
}

/// Removes the file at `path`, unless another one has taken its place.
fn remove(path: &Path, own: FileId) {
    let Ok((directory, name)) = Directory::of(path) else {
        return;
    };
    let found = directory.look(name).and_then(|found| found.metadata());
    if found.is_ok_and(|found| id(&found) == own) {
        // The next start replaces what can't be removed.
        let _ = directory.remove(name);
    }
}

/// Returns the name of the listener behind a file, for a successor.
fn name((device, inode, created): FileId, path: &Path) -> String {
    let created = created.map_or("-".to_owned(), |created| created.to_string());
    format!("{OWN_FILE} {device} {inode} {created} {}", path.display())
}

/// Returns identity and path of the file behind the listener called `name`, if it has one.
fn parse(name: &str) -> Option<(FileId, &Path)> {
    let mut parts = name.splitn(5, ' ');
    let mut next = || parts.next();
    next().filter(|first| *first == OWN_FILE)?;
    let (device, inode) = (next()?.parse().ok()?, next()?.parse().ok()?);
    let created = match next()? {
        "-" => None,
        created => Some(created.parse().ok()?),
    };
    Some(((device, inode, created), Path::new(next()?)))
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
    let created = metadata.created().ok();
    let created = created.and_then(|created| created.duration_since(UNIX_EPOCH).ok());
    let created = created.map(|created| created.as_nanos());
    (metadata.dev(), metadata.ino(), created)
}

impl SocketFile {
    /// Returns the file of a listener that a service manager has created.
    pub(crate) fn inherited(config: &UnixFrontend) -> Self {
        Self {
            config: config.clone(),
            own: id_of(&config.unix).ok(),
            maker: Maker::Manager,
            noted: Noted::default(),
        }
    }

    /// Takes the listener of a predecessor behind the file at the path. Returns `None` if there is none: the
    /// predecessor's file may have been removed or replaced. The file stays the predecessor's until that has
    /// [released](Self::released) it.
    pub(crate) fn taken_over(
        config: &UnixFrontend,
        inherited: &mut Inherited,
    ) -> Option<(UnixListener, Self)> {
        let own = id_of(&config.unix).ok()?;
        let listener = inherited.named(&name(own, &config.unix))?;
        let file = Self {
            config: config.clone(),
            own: Some(own),
            maker: Maker::Predecessor,
            noted: Noted::default(),
        };
        Some((listener.into(), file))
    }

    /// Makes the file of a predecessor this process's own.
    pub(crate) fn released(&mut self) {
        if self.maker == Maker::Predecessor {
            self.maker = Maker::Own;
        }
    }

    /// Notes the listener for a successor, now and when it is made again.
    ///
    /// # Errors
    /// There is no free descriptor.
    pub(crate) fn note(
        &mut self,
        listener: &UnixListener,
        inherited: &mut Inherited,
    ) -> io::Result<()> {
        self.noted = inherited.noted();
        inherited.note(&self.name(), listener)
    }

    /// Returns the name of the listener for a successor. One of the service manager is known by its path.
    fn name(&self) -> String {
        match (self.maker, self.own) {
            (Maker::Manager, _) | (_, None) => String::new(),
            (_, Some(own)) => name(own, self.path()),
        }
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
        if self.maker == Maker::Manager {
            return Err(io::Error::other(
                "its service manager made it; restart the .socket unit",
            ));
        }
        let (listener, mut file) = bind(&self.config)?;
        file.noted = self.noted.clone();
        self.noted.replace(&self.name(), &file.name(), &listener)?;
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
        if let (Maker::Own, Some(own)) = (self.maker, self.own) {
            remove(self.path(), own);
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

    /// Returns what a successor of the process with `inherited` gets.
    fn offered(inherited: &Inherited) -> Inherited {
        let mut offered = Inherited::default();
        offered.add(inherited.listeners().unwrap());
        offered
    }

    #[test]
    fn a_successor_that_fails_leaves_the_file_to_its_predecessor() {
        let place = tempfile::tempdir().unwrap();
        let config = config(place.path().join("socket"));
        let mut inherited = Inherited::default();
        let (listener, mut file) = bind(&config).unwrap();
        file.note(&listener, &mut inherited).unwrap();
        let taken = SocketFile::taken_over(&config, &mut offered(&inherited));
        drop(taken.unwrap());
        assert_eq!(file.fate(), SocketFileState::There);
        UnixStream::connect(&config.unix).unwrap();

        let taken = SocketFile::taken_over(&config, &mut offered(&inherited));
        let (successor, mut theirs) = taken.unwrap();
        theirs.note(&successor, &mut Inherited::default()).unwrap();
        theirs.released();
        file.leave();
        drop((file, listener, inherited));
        assert_eq!(theirs.fate(), SocketFileState::There);
        UnixStream::connect(&config.unix).unwrap();
        drop(theirs);
        assert!(!config.unix.exists());
    }

    #[test]
    fn a_successor_gets_the_listener_that_was_made_again() {
        let place = tempfile::tempdir().unwrap();
        let config = config(place.path().join("socket"));
        let mut inherited = Inherited::default();
        let (listener, mut file) = bind(&config).unwrap();
        file.note(&listener, &mut inherited).unwrap();
        for _ in 0..2 {
            fs::remove_file(&config.unix).unwrap();
            // Clients would not reach the noted listener.
            let nothing = SocketFile::taken_over(&config, &mut offered(&inherited));
            assert!(nothing.is_none());
            let again = file.make_again().unwrap();
            let mut offered = offered(&inherited);
            let (successor, theirs) = SocketFile::taken_over(&config, &mut offered).unwrap();
            assert_eq!(theirs.fate(), SocketFileState::There);
            drop(again);
            let _client = UnixStream::connect(&config.unix).unwrap();
            successor.accept().unwrap();
        }
        assert_eq!(inherited.listeners().unwrap().len(), 1);
        // Another process's file has another listener.
        fs::remove_file(&config.unix).unwrap();
        let _other = bind(&config).unwrap();
        let nothing = SocketFile::taken_over(&config, &mut offered(&inherited));
        assert!(nothing.is_none());
    }

    #[test]
    fn the_file_of_a_closed_listener_is_removed_and_no_other_one() {
        let place = tempfile::tempdir().unwrap();
        let [unused, replaced] =
            ["un used", "replaced"].map(|file| config(place.path().join(file)));
        let mut inherited = Inherited::default();
        let mut files = Vec::new();
        for config in [&unused, &replaced] {
            let (listener, mut file) = bind(config).unwrap();
            file.note(&listener, &mut inherited).unwrap();
            file.leave();
            files.push(file);
        }
        let mut offered = offered(&inherited);
        drop(inherited);
        fs::remove_file(&replaced.unix).unwrap();
        let _other = bind(&replaced).unwrap();
        remove_closed(&offered.close_unused());
        assert!(!unused.unix.exists());
        UnixStream::connect(&replaced.unix).unwrap();
    }

    #[test]
    fn names_of_listeners_are_read_as_they_are_written() {
        let path = Path::new("/run/a b");
        for own in [(1, 2, None), (u64::MAX, 3, Some(4))] {
            assert_eq!(parse(&name(own, path)), Some((own, path)));
        }
        for other in [
            "",
            "unix",
            "unix /run/a",
            "tunnel",
            "unix 1 2 3",
            "tcp 1 2 - /a",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
