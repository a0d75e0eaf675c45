//! Sockets that the service manager holds for this process (sd_listen_fds(3)). They outlive the
//! process, and connects wait in their backlog during a restart.
//!
//! The key of a socket is its address, together with its name where namespaces make addresses
//! ambiguous.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use sd_notify::NotifyState;
use socket2::{SockAddr, SockRef, Type};

use crate::report::report;

/// Inherited sockets that no listener has taken yet, and listeners that a successor will get.
#[derive(Debug, Default)]
pub struct Inherited {
    sockets: Vec<(String, OwnedFd)>,
    /// Copies of the descriptors in use, by name.
    listeners: Vec<(String, OwnedFd)>,
}

impl Inherited {
    /// Takes the sockets that were passed to this process. Called once, before threads or children
    /// exist.
    ///
    /// # Errors
    /// The environment variables of sd_listen_fds(3) are malformed.
    pub fn from_environment() -> io::Result<Self> {
        let passed = sd_notify::listen_fds_with_names()?;
        let own = passed.map(|(fd, name)| {
            // SAFETY: the service manager gave us this descriptor, and no other code takes it: this
            // runs once, before anything else could.
            (name, unsafe { OwnedFd::from_raw_fd(fd) })
        });
        Ok(Self {
            sockets: own.collect(),
            ..Self::default()
        })
    }

    /// Adds the sockets of a predecessor. The service manager may have passed some of them too.
    pub fn add(&mut self, sockets: impl IntoIterator<Item = (String, OwnedFd)>) {
        // The same for all descriptors of one socket (SO_COOKIE, Linux 4.12).
        let cookie = |fd: &OwnedFd| SockRef::from(fd).cookie().ok();
        let known: Vec<_> = self.sockets.iter().map(|(_, fd)| cookie(fd)).collect();
        let is_new = |(_, fd): &(String, OwnedFd)| !known.contains(&cookie(fd));
        self.sockets.extend(sockets.into_iter().filter(is_new));
    }

    /// Notes a listener that a successor of this process will get under `name`.
    ///
    /// # Errors
    /// There is no free descriptor.
    pub fn note(&mut self, name: &str, listener: &impl AsFd) -> io::Result<()> {
        let copy = listener.as_fd().try_clone_to_owned()?;
        self.listeners.push((name.to_owned(), copy));
        Ok(())
    }

    /// Returns copies of the noted listeners.
    ///
    /// # Errors
    /// There is no free descriptor.
    pub fn listeners(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        let copies = self.listeners.iter();
        let copies = copies.map(|(name, fd)| Ok((name.clone(), fd.try_clone()?)));
        copies.collect()
    }

    /// Closes the copies of the noted listeners: no successor comes any more.
    pub fn forget_listeners(&mut self) {
        self.listeners.clear();
    }

    /// Takes the descriptor called `name`, whatever it is.
    pub fn named(&mut self, name: &str) -> Option<OwnedFd> {
        let at = self.sockets.iter().position(|(known, _)| known == name)?;
        Some(self.sockets.swap_remove(at).1)
    }

    /// Takes the TCP listener on `addr`, called `name` if one is given.
    pub fn tcp(&mut self, addr: SocketAddr, name: Option<&str>) -> Option<TcpListener> {
        let fd = self.take(|n, socket, bound| {
            socket.r#type().is_ok_and(|t| t == Type::STREAM)
                && bound.as_socket() == Some(addr)
                && name.is_none_or(|name| name == n)
        })?;
        Some(fd.into())
    }

    /// Takes the TCP listener called `name` on the address of `addr`, with any port.
    pub fn tcp_elsewhere(&mut self, addr: SocketAddr, name: &str) -> Option<TcpListener> {
        let fd = self.take(|n, socket, bound| {
            socket.r#type().is_ok_and(|t| t == Type::STREAM)
                && bound.as_socket().is_some_and(|b| b.ip() == addr.ip())
                && name == n
        })?;
        Some(fd.into())
    }

    /// Takes the UDP socket on `addr`.
    pub fn udp(&mut self, addr: SocketAddr) -> Option<UdpSocket> {
        let fd = self.take(|_, socket, bound| {
            socket.r#type().is_ok_and(|t| t == Type::DGRAM) && bound.as_socket() == Some(addr)
        })?;
        Some(fd.into())
    }

    /// Takes the Unix listener at `path`.
    pub fn unix(&mut self, path: &Path) -> Option<UnixListener> {
        let fd = self.take(|_, _, bound| bound.as_pathname() == Some(path))?;
        Some(fd.into())
    }

    /// Logs the sockets that no listener has taken: the unit names an address that the configuration
    /// does not have.
    pub fn report_leftovers(&self) {
        for (name, fd) in &self.sockets {
            let address = SockRef::from(fd).local_addr();
            tracing::warn!(
                name,
                ?address,
                "an inherited socket is not used: its address is not configured"
            );
        }
    }

    fn take(&mut self, fits: impl Fn(&str, &SockRef<'_>, &SockAddr) -> bool) -> Option<OwnedFd> {
        let at = self.sockets.iter().position(|(name, fd)| {
            let socket = SockRef::from(fd);
            socket
                .local_addr()
                .is_ok_and(|bound| fits(name, &socket, &bound))
        })?;
        let (_, fd) = self.sockets.swap_remove(at);
        // A manager's sockets block unless its unit says otherwise.
        SockRef::from(&fd).set_nonblocking(true).ok()?;
        Some(fd)
    }
}

/// Asks the service manager to keep a socket for the next process (`FileDescriptorStoreMax=`). Returns
/// false where there is no manager; a manager that keeps nothing does not report that.
pub fn keep(socket: &impl AsFd, name: &str) -> bool {
    let states = [NotifyState::FdStore, NotifyState::FdName(name)];
    let sent = sd_notify::notify_with_fds(&states, &[socket.as_fd()]);
    if let Err(error) = &sent {
        tracing::debug!(
            error = report(error),
            name,
            "the service manager does not keep the socket"
        );
    }
    sent.is_ok() && std::env::var_os("NOTIFY_SOCKET").is_some()
}
