//! The socket at which a running process waits for its successor.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{self, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::unistd::geteuid;
use tokio::net::UnixListener;

use super::error::HandoverError;
use super::successor::Successor;
use cpc_host::directory::Directory;
use cpc_host::report::report;

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
    let listener = net::UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
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
