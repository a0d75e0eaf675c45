//! The listener of redirected connections.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::Path,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use super::within;

/// Maximum number of connections that wait for accept; the kernel reduces it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Opens a non-blocking listener inside a network namespace (see [`within`]).
///
/// Accepted sockets inherit SO_LINGER 0, so that their peers see a reset, not the end of the data, if
/// this process dies; clear it before closing one in good order. An IPv6 listener takes IPv6 alone:
/// v4-mapped connections arrive at the IPv4 one.
///
/// A connection from 127.0.0.1 to one listener needs a local port of its own, so that some 28,000 are
/// possible at a time (`net.ipv4.ip_local_port_range`).
pub fn listen(netns: Option<&Path>, address: SocketAddr) -> io::Result<TcpListener> {
    within(netns, || {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_linger(Some(Duration::ZERO))?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read},
        net::TcpStream,
    };

    use super::*;

    #[test]
    fn accepted_sockets_reset_when_dropped() {
        let listener = listen(None, "127.0.0.1:0".parse().unwrap()).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        listener.set_nonblocking(false).unwrap();
        drop(listener.accept().unwrap());
        let error = client.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}
