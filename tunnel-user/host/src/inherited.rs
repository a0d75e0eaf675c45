//! Sockets that the service manager holds for this process (sd_listen_fds(3)), and those of a predecessor.
//! They outlive the process, and connects wait in their backlog during a restart.
//!
//! The key of a socket is its address, together with its name where namespaces make addresses
//! ambiguous.

use std::collections::HashSet;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sd_notify::NotifyState;
use socket2::{SockAddr, SockRef, Type};

use crate::listen::is_at;
use crate::report::report;

/// Inherited sockets that no listener has taken yet, and listeners that a successor will get.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Sockets in the order of the giver, which for UDP is the order of their binding.
    sockets: Vec<Passed>,
    has_predecessor: bool,
    noted: Noted,
}

/// A socket that was passed to this process.
#[derive(Debug)]
struct Passed {
    name: String,
    fd: OwnedFd,
    giver: Giver,
}

/// Process that has passed a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Giver {
    Manager,
    Predecessor,
}

/// Copies of the listeners in use, by name. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Noted(Arc<Mutex<Vec<(String, OwnedFd)>>>);

impl Noted {
    /// Replaces the copy called `former` by one of `listener`, under another name. Without such a copy
    /// there is no effect: then no successor comes any more.
    ///
    /// # Errors
    /// There is no free descriptor.
    pub fn replace(&self, former: &str, name: &str, listener: &impl AsFd) -> io::Result<()> {
        let mut copies = self.lock();
        if let Some(copy) = copies.iter_mut().find(|(known, _)| known == former) {
            *copy = (name.to_owned(), listener.as_fd().try_clone_to_owned()?);
        }
        Ok(())
    }

    /// Returns copies of the listeners.
    ///
    /// # Errors
    /// There is no free descriptor.
    pub fn copies(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        let noted = self.lock();
        let copies = noted.iter();
        let copies = copies.map(|(name, fd)| Ok((name.clone(), fd.try_clone()?)));
        copies.collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(String, OwnedFd)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let giver = Giver::Manager;
            Passed { name, fd, giver }
        });
        Ok(Self {
            sockets: own.collect(),
            ..Self::default()
        })
    }

    /// Adds the sockets of a predecessor, each once. The service manager may have passed some of them too.
    pub fn add(&mut self, sockets: impl IntoIterator<Item = (String, OwnedFd)>) {
        self.has_predecessor = true;
        // The same for all descriptors of one socket (SO_COOKIE, Linux 4.12).
        let cookie = |fd: &OwnedFd| SockRef::from(fd).cookie().ok();
        let mut known: HashSet<_> = self.sockets.iter().map(|it| cookie(&it.fd)).collect();
        let is_new = |(_, fd): &(String, OwnedFd)| known.insert(cookie(fd));
        let new = sockets.into_iter().filter(is_new);
        self.sockets.extend(new.map(|(name, fd)| {
            let giver = Giver::Predecessor;
            Passed { name, fd, giver }
        }));
    }

    /// Whether a predecessor has given sockets. A live one uses them until it has released them.
    pub fn has_predecessor(&self) -> bool {
        self.has_predecessor
    }

    /// Closes the sockets of a predecessor that no listener has taken, and returns their names: the
    /// configuration does not have their addresses any more. Called once the predecessor has released
    /// them. Sockets of the service manager stay open.
    pub fn close_unused(&mut self) -> Vec<String> {
        let is_unused = |it: &mut Passed| it.giver == Giver::Predecessor;
        let unused = self.sockets.extract_if(.., is_unused);
        let closed = unused.map(|Passed { name, fd, .. }| {
            let address = SockRef::from(&fd).local_addr();
            tracing::info!(
                name,
                ?address,
                "a socket of the predecessor is closed: its address is not configured"
            );
            name
        });
        closed.collect()
    }

    /// Notes a listener that a successor of this process will get under `name`.
    ///
    /// # Errors
    /// There is no free descriptor.
    pub fn note(&mut self, name: &str, listener: &impl AsFd) -> io::Result<()> {
        let copy = listener.as_fd().try_clone_to_owned()?;
        self.noted.lock().push((name.to_owned(), copy));
        Ok(())
    }

    /// Returns the noted listeners, so that one that is made again can replace the former one.
    pub fn noted(&self) -> Noted {
        self.noted.clone()
    }

    /// Returns copies of the noted listeners.
    ///
    /// # Errors
    /// There is no free descriptor.
    pub fn listeners(&self) -> io::Result<Vec<(String, OwnedFd)>> {
        self.noted.copies()
    }

    /// Closes the copies of the noted listeners: no successor comes any more.
    pub fn forget_listeners(&mut self) {
        self.noted.lock().clear();
    }

    /// Takes the descriptor called `name`, whatever it is.
    pub fn named(&mut self, name: &str) -> Option<OwnedFd> {
        let at = self.sockets.iter().position(|it| it.name == name)?;
        Some(self.sockets.remove(at).fd)
    }

    /// Takes the TCP listener on `addr`, called `name` if one is given.
    pub fn tcp(&mut self, addr: SocketAddr, name: Option<&str>) -> Option<TcpListener> {
        let fd = self.take(|n, socket, bound| {
            socket.r#type().is_ok_and(|t| t == Type::STREAM)
                && bound.as_socket().is_some_and(|bound| is_at(bound, addr))
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

    /// Takes the UDP socket on `addr`. Of several ones it takes the first: the others keep their order.
    pub fn udp(&mut self, addr: SocketAddr) -> Option<UdpSocket> {
        let fd = self.take(|_, socket, bound| {
            socket.r#type().is_ok_and(|t| t == Type::DGRAM)
                && bound.as_socket().is_some_and(|bound| is_at(bound, addr))
        })?;
        Some(fd.into())
    }

    /// Takes the Unix listener at `path`.
    pub fn unix(&mut self, path: &Path) -> Option<UnixListener> {
        let fd = self.take(|_, _, bound| bound.as_pathname() == Some(path))?;
        Some(fd.into())
    }

    /// Logs the sockets of the service manager that no listener has taken: the unit names an address that the
    /// configuration does not have.
    pub fn report_leftovers(&self) {
        let of_manager = |it: &&Passed| it.giver == Giver::Manager;
        for Passed { name, fd, .. } in self.sockets.iter().filter(of_manager) {
            let address = SockRef::from(fd).local_addr();
            tracing::warn!(
                name,
                ?address,
                "an inherited socket is not used: its address is not configured"
            );
        }
    }

    fn take(&mut self, fits: impl Fn(&str, &SockRef<'_>, &SockAddr) -> bool) -> Option<OwnedFd> {
        let at = self.sockets.iter().position(|Passed { name, fd, .. }| {
            let socket = SockRef::from(fd);
            socket
                .local_addr()
                .is_ok_and(|bound| fits(name, &socket, &bound))
        })?;
        let fd = self.sockets.remove(at).fd;
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

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use socket2::{Domain, Socket};

    use super::*;

    const LOCAL: &str = "127.0.0.1:0";

    fn cookie(socket: &impl AsFd) -> u64 {
        SockRef::from(socket).cookie().unwrap()
    }

    /// Sockets that share one port.
    fn group(size: usize) -> Vec<UdpSocket> {
        let mut addr: SocketAddr = LOCAL.parse().unwrap();
        let open = || {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
            socket.set_reuse_port(true).unwrap();
            socket.bind(&addr.into()).unwrap();
            let socket = UdpSocket::from(socket);
            addr = socket.local_addr().unwrap();
            socket
        };
        std::iter::repeat_with(open).take(size).collect()
    }

    /// The kernel numbers the sockets of a port in the order of their binding.
    #[test]
    fn sockets_of_one_port_keep_their_order() {
        let udp = group(8);
        let addr = udp[0].local_addr().unwrap();
        let order: Vec<_> = udp.iter().map(cookie).collect();
        let tcp: Vec<_> = (0..3).map(|_| TcpListener::bind(LOCAL).unwrap()).collect();
        let addresses: Vec<_> = tcp.iter().map(|it| it.local_addr().unwrap()).collect();
        let udp = udp.into_iter().map(OwnedFd::from);
        let offer = udp.chain(tcp.into_iter().map(OwnedFd::from));
        let mut inherited = Inherited::default();
        inherited.add(offer.map(|fd| (String::new(), fd)));
        assert!(inherited.tcp(addresses[1], None).is_some());
        let taken = std::iter::from_fn(|| inherited.udp(addr));
        let taken: Vec<_> = taken.map(|socket| cookie(&socket)).collect();
        assert_eq!(taken, order);
        assert!(inherited.tcp(addresses[2], None).is_some());
        assert!(inherited.tcp(addresses[0], None).is_some());
    }

    #[test]
    fn unused_sockets_of_the_predecessor_are_closed_and_those_of_the_manager_stay() {
        let [managed, shared, used, unused] = [(); 4].map(|()| TcpListener::bind(LOCAL).unwrap());
        let addresses = [&managed, &shared, &used, &unused].map(|it| it.local_addr().unwrap());
        let offered = [&shared, &used].map(|it| it.try_clone().unwrap());
        let [copy, used] = offered.map(OwnedFd::from);
        let sockets = [managed, shared].map(|listener| Passed {
            name: "manager's".into(),
            fd: listener.into(),
            giver: Giver::Manager,
        });
        let mut inherited = Inherited {
            sockets: sockets.into(),
            ..Inherited::default()
        };
        assert!(!inherited.has_predecessor());
        let offer = [("copy", copy), ("used", used), ("unused", unused.into())];
        inherited.add(offer.map(|(name, fd)| (name.to_owned(), fd)));
        assert!(inherited.has_predecessor());
        let _used = inherited.tcp(addresses[2], None).unwrap();
        assert_eq!(inherited.close_unused(), ["unused"]);
        let connects = addresses.map(|addr| TcpStream::connect(addr).is_ok());
        assert_eq!(connects, [true, true, true, false]);
        assert!(inherited.close_unused().is_empty());
    }

    #[test]
    fn a_listener_that_is_made_again_replaces_the_noted_one() {
        let [former, other, next] = [(); 3].map(|()| TcpListener::bind(LOCAL).unwrap());
        let mut inherited = Inherited::default();
        inherited.note("former", &former).unwrap();
        inherited.note("other", &other).unwrap();
        let noted = inherited.noted();
        noted.replace("former", "next", &next).unwrap();
        noted.replace("former", "nothing", &next).unwrap();
        let seen = |inherited: &Inherited| {
            let listeners = inherited.listeners().unwrap();
            let seen = listeners.into_iter();
            let seen = seen.map(|(name, fd)| (name, cookie(&fd)));
            seen.collect::<Vec<_>>()
        };
        let expected = [("next", cookie(&next)), ("other", cookie(&other))];
        assert_eq!(
            seen(&inherited),
            expected.map(|(name, it)| (name.to_owned(), it))
        );
        inherited.forget_listeners();
        noted.replace("next", "late", &former).unwrap();
        assert!(seen(&inherited).is_empty());
    }
}
