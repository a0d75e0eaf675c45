//! The process at the other end of a connection: its user, and whether it lives.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use nix::unistd::geteuid;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::error::KeeperError;

/// The process that has connected.
#[derive(Debug)]
pub(crate) struct Owner {
    life: Life,
}

#[derive(Debug)]
enum Life {
    /// Readable once the process is dead (pidfd_open(2)).
    Known(OwnedFd),
    /// The process had ended before the connection was accepted.
    Over,
}

/// Checks that the peer runs as the user of this process, or as root.
///
/// # Errors
/// [`KeeperError::Stranger`], and [`KeeperError::Io`] without credentials.
pub(crate) fn check(connection: &impl AsFd) -> Result<(), KeeperError> {
    let peer = getsockopt(&connection, PeerCredentials).map_err(io::Error::from)?;
    match peer.uid() == 0 || peer.uid() == geteuid().as_raw() {
        true => Ok(()),
        false => Err(KeeperError::Stranger(peer.uid())),
    }
}

impl Owner {
    /// Returns the process that has connected.
    ///
    /// # Errors
    /// [`KeeperError::Unseen`]: its death would not be noticed.
    pub(crate) fn of(connection: &impl AsFd) -> Result<Self, KeeperError> {
        // Linux 6.5. Unlike a number, it can't be that of another process by now.
        if let Ok(pidfd) = getsockopt(&connection, PeerPidfd) {
            return Ok(Self {
                life: Life::Known(pidfd),
            });
        }
        let peer = getsockopt(&connection, PeerCredentials).map_err(io::Error::from)?;
        Self::by_number(peer.pid())
    }

    /// Returns the process of a number in the PID namespace of the keeper (Linux 5.3).
    fn by_number(pid: i32) -> Result<Self, KeeperError> {
        // 0 stands for a process of another PID namespace.
        let Some(pid) = (pid > 0).then(|| Pid::from_raw(pid)).flatten() else {
            let error = io::Error::other("it is in another PID namespace");
            return Err(KeeperError::Unseen(error));
        };
        let life = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Life::Known(pidfd),
            Err(Errno::SRCH) => Life::Over,
            Err(error) => return Err(KeeperError::Unseen(error.into())),
        };
        Ok(Self { life })
    }

    /// Returns whether the process is dead.
    pub(crate) fn is_dead(&self) -> bool {
        let Life::Known(pidfd) = &self.life else {
            return true;
        };
        let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        // An error leaves it alive: a set is never given away by mistake.
        poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
            && polled[0]
                .revents()
                .is_some_and(|it| it.contains(PollFlags::POLLIN))
    }

    /// Returns the descriptor that is readable once the process is dead.
    pub(crate) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        match &self.life {
            Life::Known(pidfd) => Some(pidfd.as_fd()),
            Life::Over => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_dead_once_it_has_ended() {
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        check(&near).unwrap();
        assert!(!Owner::of(&near).unwrap().is_dead(), "this process lives");
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let owner = Owner::by_number(pid).unwrap();
        assert!(!owner.is_dead());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(owner.is_dead());
        assert!(Owner::by_number(pid).unwrap().is_dead(), "it was dead");
        let unseen = Owner::by_number(0);
        assert!(matches!(unseen, Err(KeeperError::Unseen(_))), "{unseen:?}");
    }
}
