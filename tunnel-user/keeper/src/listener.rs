//! The socket at which a keeper listens.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::error::KeeperError;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// Opens the socket at `path`, in place of one that a dead keeper has left.
///
/// # Errors
/// [`KeeperError::Bind`], [`KeeperError::Busy`], [`KeeperError::NotASocket`].
pub(crate) fn open(path: &Path) -> Result<Socket, KeeperError> {
    let fault = |why| KeeperError::Bind {
        path: path.to_owned(),
        why,
    };
    match bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            remove_stale(path)?;
            bind(path).map_err(fault)
        }
        bound => bound.map_err(fault),
    }
}

fn bind(path: &Path) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    // The file gets the mode of the socket: at no time may another user connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Removes the file of a socket without a listener.
fn remove_stale(path: &Path) -> Result<(), KeeperError> {
    let fault = |why| KeeperError::Bind {
        path: path.to_owned(),
        why,
    };
    // A connection to another kind of file is refused as well.
    if !fs::symlink_metadata(path)
        .map_err(fault)?
        .file_type()
        .is_socket()
    {
        return Err(KeeperError::NotASocket(path.to_owned()));
    }
    let probe = Socket::new(Domain::UNIX, Type::SEQPACKET, None).map_err(fault)?;
    // A keeper with a full backlog is one.
    probe.set_nonblocking(true).map_err(fault)?;
    let address = SockAddr::unix(path).map_err(fault)?;
    match probe.connect(&address) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(fault)
        }
        _ => Err(KeeperError::Busy(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_has_one_keeper() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("keeper.sock");
        let first = open(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777 & !0o600, 0, "{mode:o}");
        assert!(matches!(open(&path), Err(KeeperError::Busy(_))));
        drop(first);
        // Its file is left behind, as after a kill.
        open(&path).unwrap();
    }

    #[test]
    fn only_the_socket_of_a_dead_keeper_is_replaced() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("file");
        fs::write(&path, "content").unwrap();
        assert!(matches!(open(&path), Err(KeeperError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"content");
        let path = place.path().join("other.sock");
        let _other = UnixListener::bind(&path).unwrap();
        assert!(matches!(open(&path), Err(KeeperError::Busy(_))));
        let missing = place.path().join("missing/keeper.sock");
        assert!(matches!(open(&missing), Err(KeeperError::Bind { .. })));
        let long = place.path().join("x".repeat(200));
        assert!(matches!(open(&long), Err(KeeperError::Bind { .. })));
    }
}
