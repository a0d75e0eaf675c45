//! The socket at which a running process waits for its successor.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::geteuid;
use rustix::fs::{Mode, fchmod};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

use super::error::HandoverError;
use super::successor::Successor;
use cpc_host::directory::Directory;
use cpc_host::report::report;

/// Maximum number of successors that wait.
const BACKLOG: i32 = 4;

/// Pause after an attempt that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// Returns the path of the socket of a process of `role` with this `state_dir`.
pub fn path(state_dir: &Path, role: &str) -> PathBuf {
    state_dir.join(format!("{role}-handover.sock"))
}

/// The socket of a running process. Its file stays at the end: the next process replaces it.
#[derive(Debug)]
pub struct Endpoint {
    listener: UnixListener,
    role: &'static str,
}

impl Endpoint {
    /// Opens the socket of a process of `role`. Returns `None`, and logs why, if successors can't find this
    /// process: it serves all the same.
    pub fn open(state_dir: &Path, role: &'static str, is_successor: bool) -> Option<Self> {
        let path = path(state_dir, role);
        // A predecessor that is about to exit still listens.
        if !is_successor && UnixStream::connect(&path).is_ok() {
            tracing::warn!(
                path = %path.display(),
                "another process uses this state_dir: it, and not this one, is replaced by --replace"
            );
            return None;
        }
        let created = Directory::create(state_dir, 0o700);
        match created.and_then(|_| bind(&path)) {
            Ok(listener) => Some(Self { listener, role }),
            Err(error) => {
                tracing::warn!(
                    path = %path.display(), error = report(&error),
                    "a successor will not find this process: a restart ends its connections"
                );
                None
            }
        }
    }

    /// Waits for a successor. Strangers are refused and logged.
    pub async fn next(&self) -> Successor {
        loop {
            let asked = async {
                let (stream, _) = self.listener.accept().await?;
                let stream = stream.into_std()?;
                check(&stream)?;
                Successor::greet(stream, self.role).await
            };
            match asked.await {
                Ok(successor) => return successor,
                Err(error) => {
                    tracing::warn!(error = report(&error), "no successor: this process goes on");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    // The file gets the mode of the socket: at no time may another user connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    UnixListener::from_std(socket.into())
}

/// Checks that the process at the other end runs as the same user, or as root.
///
/// # Errors
/// [`HandoverError::Stranger`].
pub(super) fn check(stream: &UnixStream) -> Result<(), HandoverError> {
    let peer = getsockopt(stream, PeerCredentials).map_err(io::Error::from)?;
    match peer.uid() == 0 || peer.uid() == geteuid().as_raw() {
        true => Ok(()),
        false => Err(HandoverError::Stranger(peer.uid())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::thread;

    use tokio::time::timeout;

    use super::*;
    use crate::Predecessor;
    use crate::predecessor::find;
    use cpc_host::inherited::Inherited;

    /// User without privileges.
    const STRANGER: libc::uid_t = 65_534;

    fn look(state_dir: &Path, role: &str) -> Result<Option<Predecessor>, HandoverError> {
        find(Some(state_dir), role, true, &mut Inherited::default())
    }

    #[tokio::test]
    async fn a_process_of_another_role_is_refused() {
        let place = tempfile::tempdir().unwrap();
        assert!(
            look(place.path(), "server").unwrap().is_none(),
            "there is none"
        );
        let endpoint = Endpoint::open(place.path(), "server", false).unwrap();
        // A second one with the same directory serves, and is not found.
        assert!(Endpoint::open(place.path(), "server", false).is_none());
        let state_dir = place.path().to_owned();
        fs::hard_link(path(&state_dir, "server"), path(&state_dir, "agent")).unwrap();
        let asks = thread::spawn(move || look(&state_dir, "agent"));
        let patience = Duration::from_secs(2);
        assert!(timeout(patience, endpoint.next()).await.is_err());
        let error = asks.join().unwrap().unwrap_err();
        assert!(matches!(error, HandoverError::Refused(_)), "{error}");
    }

    /// Checks the user of the process, and not the mode of the socket alone.
    #[tokio::test]
    async fn a_stranger_is_refused() {
        if !geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI runs tests as root");
            println!("skipped: only root can be another user");
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::open(place.path(), "server", false).unwrap();
        let path = path(place.path(), "server");
        for path in [place.path(), &path] {
            fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
        }
        let asks = thread::spawn(move || {
            // SAFETY: a bare system call, which changes this thread alone.
            let done = unsafe { libc::syscall(libc::SYS_setresuid, -1, STRANGER, -1) };
            assert_eq!(done, 0);
            UnixStream::connect(path).unwrap()
        });
        let patience = Duration::from_secs(2);
        assert!(timeout(patience, endpoint.next()).await.is_err());
        let stream = asks.join().unwrap();
        let error = crate::parcel::receive::<tunnel_proto::handover::Offer>(&stream);
        assert!(error.is_err(), "it gets no answer");
    }
}
