//! Listeners on hosts that may lack an address family: kernels without IPv6, hosts without IPv4.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use nix::ifaddrs::getifaddrs;
use socket2::{Domain, Protocol, Socket, Type};

use crate::report::report;

/// Maximum number of connections that wait for accept; the kernel reduces it to `net.core.somaxconn`.
const BACKLOG: i32 = 1024;

/// Returns the unspecified address: IPv4's, or that of both families where the host has no IPv4.
pub fn everywhere(port: u16) -> SocketAddr {
    // Where a sandbox keeps them secret, IPv4 is what most hosts have.
    let has_ipv4 = getifaddrs().map_or(true, |interfaces| {
        let addresses = interfaces.filter_map(|interface| interface.address);
        addresses
            .filter_map(|address| address.as_sockaddr_in().map(|v4| v4.ip()))
            .any(|v4| !v4.is_loopback())
    });
    let has_ipv6 = || TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok();
    if has_ipv4 || !has_ipv6() {
        (Ipv4Addr::UNSPECIFIED, port).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, port).into()
    }
}

/// Whether an address was refused because the host lacks its family.
pub fn is_family_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT | libc::EPFNOSUPPORT)
    )
}

/// Whether a socket that is bound to `bound` may be that of [`with_fallback`] for `addr`.
pub fn is_at(bound: SocketAddr, addr: SocketAddr) -> bool {
    let is_everywhere = addr.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    bound == addr || is_everywhere && bound == (Ipv4Addr::UNSPECIFIED, addr.port()).into()
}

/// Opens a socket on `addr`. `[::]` stands for both families; without IPv6 it becomes IPv4 alone, with
/// a log line.
///
/// # Errors
/// The error of `open`.
pub fn with_fallback<T>(
    addr: SocketAddr,
    open: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    match open(addr) {
        Err(error)
            if addr.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && is_family_missing(&error) =>
        {
            tracing::warn!(%addr, error = report(&error), "this host has no IPv6: listening on IPv4 alone");
            open((Ipv4Addr::UNSPECIFIED, addr.port()).into())
        }
        opened => opened,
    }
}

/// Opens a non-blocking TCP listener.
///
/// # Errors
/// The error of the system call.
pub fn tcp(addr: SocketAddr) -> io::Result<TcpListener> {
    with_fallback(addr, |addr| {
        let domain = Domain::for_address(addr);
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        if addr.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&addr.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Binds as on a host with IPv4 alone, or without any address.
    fn open(addr: SocketAddr) -> io::Result<SocketAddr> {
        match (addr.is_ipv4(), addr.port()) {
            (_, 0) => Err(io::ErrorKind::AddrInUse.into()),
            (true, _) => Ok(addr),
            (false, _) => Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
        }
    }

    #[test]
    fn both_families_are_one_where_the_other_is_missing() {
        let at = |text: &str| with_fallback(text.parse().unwrap(), open);
        assert_eq!(at("[::]:7").unwrap(), "0.0.0.0:7".parse().unwrap());
        assert_eq!(at("192.0.2.1:7").unwrap(), "192.0.2.1:7".parse().unwrap());
        // An explicit address gets no fallback.
        assert!(is_family_missing(&at("[::1]:7").unwrap_err()));
        assert_eq!(at("[::]:0").unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_listener_of_both_families_takes_ipv4() {
        let listener = tcp("[::]:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    }

    #[test]
    fn a_host_without_ipv6_has_another_socket() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        for (bound, addr, fits) in [
            ("[::]:1", "[::]:1", true),
            ("0.0.0.0:1", "[::]:1", true),
            ("0.0.0.0:2", "[::]:1", false),
            ("[::]:1", "0.0.0.0:1", false),
            ("0.0.0.0:1", "[::1]:1", false),
        ] {
            assert_eq!(is_at(at(bound), at(addr)), fits, "{bound} for {addr}");
        }
    }
}
