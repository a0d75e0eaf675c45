//! The path to an agent, as the kernel knows it.

use std::mem::{MaybeUninit, size_of};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use cpc_transport::tunnel::{Path, Probe};

/// Creates a probe of a TCP connection's path, which works for as long as the socket is kept elsewhere.
pub(super) fn probe(remote: SocketAddr, socket: &Arc<OwnedFd>) -> Probe {
    let socket: Weak<OwnedFd> = Arc::downgrade(socket);
    Probe::new(move || {
        let info = socket.upgrade().and_then(|socket| info(socket.as_fd()));
        let time = |of: fn(&libc::tcp_info) -> Duration| info.as_ref().map(of).unwrap_or_default();
        let since_data = time(|info| Duration::from_millis(info.tcpi_last_data_recv.into()));
        let since_ack = time(|info| Duration::from_millis(info.tcpi_last_ack_recv.into()));
        Path {
            remote,
            rtt: time(|info| Duration::from_micros(info.tcpi_rtt.into())),
            mtu: None,
            since_packet: since_data.min(since_ack),
            since_data,
        }
    })
}

/// Returns the kernel's information about a connection (`TCP_INFO`, tcp(7)).
fn info(socket: BorrowedFd<'_>) -> Option<libc::tcp_info> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    // An int's worth by far.
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `info`, which has them and outlives the
    // call; any bytes are a tcp_info, and those that an older kernel leaves out are zero.
    unsafe {
        let done = libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        );
        (done == 0).then(|| info.assume_init())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_kernel_knows_the_round_trip_of_a_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, remote) = listener.accept().unwrap();
        client.write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
        let socket = Arc::new(OwnedFd::from(server));
        let probe = probe(remote, &socket);
        let path = probe.path();
        assert!(path.rtt > Duration::ZERO, "{path:?}");
        assert!(path.since_packet <= path.since_data, "{path:?}");
        drop(socket);
        assert_eq!(probe.path().rtt, Duration::ZERO);
    }
}
