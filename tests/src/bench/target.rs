//! The target of all measurements: one thread that serves every connection, so that thousands of
//! idle ones cost nothing and busy ones little.
//!
//! A connection begins with an order of [`ORDER`] bytes: what to do, and a number of bytes. Bulk is
//! sent from page cache (sendfile(2)) and thrown away in the kernel (`MSG_TRUNC`, tcp(7)), so that
//! the target is not what is measured.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{Backlog, listen};
use nix::unistd::ftruncate;

/// The port that it listens on.
pub const PORT: u16 = 7100;
/// Bytes of an order.
pub const ORDER: usize = 9;
/// Bytes that one connection moves at most before the others have their turn.
pub const TURN: usize = 1 << 20;
/// The listener's place among the connections.
const LISTENER: u64 = u64::MAX;

/// Work of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Send back received bytes.
    Echo,
    /// Send so many bytes, then end.
    Send(u64),
    /// Receive so many bytes, then answer one byte.
    Receive(u64),
    /// Never read again.
    Stop,
}

impl Order {
    /// Returns the bytes of the order.
    pub fn encode(self) -> [u8; ORDER] {
        let (kind, count) = match self {
            Self::Echo => (b'E', 0),
            Self::Send(count) => (b'S', count),
            Self::Receive(count) => (b'R', count),
            Self::Stop => (b'X', 0),
        };
        let mut order = [kind; ORDER];
        order[1..].copy_from_slice(&count.to_be_bytes());
        order
    }

    fn decode(order: [u8; ORDER]) -> Option<Self> {
        let [kind, count @ ..] = order;
        let count = u64::from_be_bytes(count);
        match kind {
            b'E' => Some(Self::Echo),
            b'S' => Some(Self::Send(count)),
            b'R' => Some(Self::Receive(count)),
            b'X' => Some(Self::Stop),
            _ => None,
        }
    }
}

/// Serves until the process is ended, on every IPv4 address of this network namespace.
///
/// # Errors
///
/// The port can't be listened on, or epoll fails.
pub fn serve() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    listen(&listener, Backlog::MAXALLOWABLE)?;
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut server = Server {
        epoll,
        zeros: zeros()?,
        buffer: vec![0; 256 << 10],
        connections: HashMap::new(),
    };
    let mut events = vec![EpollEvent::empty(); 256];
    loop {
        let count = match server.epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            count => count?,
        };
        for event in &events[..count] {
            match event.data() {
                LISTENER => server.accept(&listener),
                // A descriptor, as `accept` has registered it.
                data => server.turn(data as RawFd),
            }
        }
    }
}

/// Returns a file of zeros in memory, of [`TURN`] bytes.
///
/// # Errors
///
/// The kernel's.
pub fn zeros() -> io::Result<OwnedFd> {
    let file = memfd_create(c"zeros", MFdFlags::MFD_CLOEXEC)?;
    ftruncate(&file, TURN as i64)?;
    Ok(file)
}

struct Server {
    epoll: Epoll,
    zeros: OwnedFd,
    buffer: Vec<u8>,
    connections: HashMap<RawFd, Connection>,
}

struct Connection {
    socket: TcpStream,
    order: Option<Order>,
    /// Received part of an order.
    head: Vec<u8>,
}

impl Server {
    fn accept(&mut self, listener: &TcpListener) {
        // Out of descriptors, or nobody is there any more: both pass.
        while let Ok((socket, _)) = listener.accept() {
            let prepared = socket
                .set_nonblocking(true)
                .and_then(|()| socket.set_nodelay(true));
            let fd = socket.as_raw_fd();
            let event = EpollEvent::new(EpollFlags::EPOLLIN, fd as u64);
            if prepared.is_ok() && self.epoll.add(&socket, event).is_ok() {
                let connection = Connection {
                    socket,
                    order: None,
                    head: Vec::new(),
                };
                self.connections.insert(fd, connection);
            }
        }
    }

    fn turn(&mut self, fd: RawFd) {
        let Some(connection) = self.connections.get_mut(&fd) else {
            return;
        };
        match connection.turn(&self.epoll, &self.zeros, &mut self.buffer) {
            Ok(()) => (),
            Err(error) if error.kind() == ErrorKind::WouldBlock => (),
            // The descriptor leaves epoll when it is closed.
            Err(_) => drop(self.connections.remove(&fd)),
        }
    }
}

impl Connection {
    /// Does all work that is possible now. An end is an error like any other: the connection is
    /// over.
    fn turn(&mut self, epoll: &Epoll, zeros: &OwnedFd, buffer: &mut [u8]) -> io::Result<()> {
        let order = match self.order {
            Some(order) => order,
            None => {
                let order = self.read_order()?;
                self.order = Some(order);
                let wanted = match order {
                    Order::Send(_) => EpollFlags::EPOLLOUT,
                    Order::Stop => EpollFlags::empty(),
                    Order::Echo | Order::Receive(_) => EpollFlags::EPOLLIN,
                };
                let data = self.socket.as_raw_fd() as u64;
                epoll.modify(&self.socket, &mut EpollEvent::new(wanted, data))?;
                order
            }
        };
        match order {
            Order::Echo => self.echo(buffer),
            Order::Send(left) => self.send(left, zeros),
            Order::Receive(left) => self.receive(left),
            // Wanted is nothing, so what is reported is the connection's end.
            Order::Stop => Err(ErrorKind::WouldBlock.into()),
        }
    }

    fn read_order(&mut self) -> io::Result<Order> {
        let mut order = [0; ORDER];
        let missing = ORDER - self.head.len();
        match self.socket.read(&mut order[..missing])? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => self.head.extend_from_slice(&order[..count]),
        }
        match <[u8; ORDER]>::try_from(self.head.as_slice()) {
            Ok(order) => Order::decode(order).ok_or_else(|| ErrorKind::InvalidData.into()),
            Err(_) => Err(ErrorKind::WouldBlock.into()),
        }
    }

    /// Echoes. The client waits for each answer, so its bytes fit into the socket's buffer.
    fn echo(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        match self.socket.read(buffer)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            count => self.socket.write_all(&buffer[..count]),
        }
    }

    fn send(&mut self, left: u64, zeros: &OwnedFd) -> io::Result<()> {
        let count = TURN.min(usize::try_from(left).unwrap_or(TURN));
        let sent = send_zeros(&self.socket, zeros, count)?;
        let left = left - sent as u64;
        self.order = Some(Order::Send(left));
        if left == 0 {
            // The client reads to the end.
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn receive(&mut self, left: u64) -> io::Result<()> {
        let count = TURN.min(usize::try_from(left).unwrap_or(TURN));
        let left = match throw_away(&self.socket, count)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => left - count as u64,
        };
        self.order = Some(Order::Receive(left));
        if left == 0 {
            self.socket.write_all(b"!")?;
        }
        Ok(())
    }
}

/// Sends `count` bytes of `zeros` at most.
///
/// # Errors
///
/// The socket's.
pub fn send_zeros(socket: &impl AsRawFd, zeros: &impl AsRawFd, count: usize) -> io::Result<usize> {
    let mut offset = 0;
    // SAFETY: both descriptors are open as long as their owners are borrowed; the offset is ours.
    let sent = unsafe {
        libc::sendfile(
            socket.as_raw_fd(),
            zeros.as_raw_fd(),
            &raw mut offset,
            count,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives `count` bytes of a TCP connection at most, into nowhere.
///
/// # Errors
///
/// The socket's.
pub fn throw_away(socket: &impl AsRawFd, count: usize) -> io::Result<usize> {
    // SAFETY: with MSG_TRUNC, TCP writes nothing to the buffer, which may then be absent (tcp(7)).
    let received = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            std::ptr::null_mut(),
            count,
            libc::MSG_TRUNC,
        )
    };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_survive_the_wire() {
        for order in [
            Order::Echo,
            Order::Send(1 << 40),
            Order::Receive(7),
            Order::Stop,
        ] {
            assert_eq!(Order::decode(order.encode()), Some(order));
        }
        assert_eq!(Order::decode([b'?'; ORDER]), None);
    }
}
