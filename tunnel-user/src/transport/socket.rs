//! UDP sockets for QUIC: opened, sized, and checked for what makes them slow.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use quinn::{AsyncUdpSocket, Runtime, TokioRuntime};
use socket2::{Domain, Protocol, Socket, Type};

/// Wanted size of a UDP socket's send and receive buffers, in bytes. At 1 Gbit/s it holds 30 ms,
/// about what a busy shard may be late.
pub const BUFFER_SIZE: usize = 4 << 20;

/// Opens a UDP socket. `[::]` listens on both families.
///
/// # Errors
/// What the system says of the address.
pub fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    let socket = socket.into();
    enlarge(&socket);
    Ok(socket)
}

/// Gives a socket the buffers that the job takes, if it has less. The kernel cuts them to
/// net.core.{r,w}mem_max; [`complaints`] says so.
pub fn enlarge(socket: &UdpSocket) {
    let socket = socket2::SockRef::from(socket);
    // Reported are twice the bytes that were asked for (socket(7)).
    let small = |size: io::Result<usize>| size.is_ok_and(|size| size < 2 * BUFFER_SIZE);
    if small(socket.recv_buffer_size()) {
        let _ = socket.set_recv_buffer_size(BUFFER_SIZE);
    }
    if small(socket.send_buffer_size()) {
        let _ = socket.set_send_buffer_size(BUFFER_SIZE);
    }
}

/// Hands a socket to the running tokio runtime, with segmentation offloads on where they work.
///
/// # Errors
/// What the runtime says of the socket.
pub fn wrap(socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    TokioRuntime.wrap_udp_socket(socket)
}

/// What is wrong with a socket for the job, each with its remedy. Empty when all is well.
pub fn complaints(socket: &UdpSocket, wrapped: &dyn AsyncUdpSocket) -> Vec<String> {
    let mut found = Vec::new();
    let socket = socket2::SockRef::from(socket);
    // The kernel reports twice of what it grants, for its own bookkeeping (socket(7)).
    let sizes = [
        ("rmem_max", socket.recv_buffer_size()),
        ("wmem_max", socket.send_buffer_size()),
    ];
    for (limit, size) in sizes {
        if let Ok(size) = size
            && size / 2 < BUFFER_SIZE
        {
            found.push(format!(
                "a UDP buffer has {} KiB of {} KiB: bursts are lost and throughput suffers; \
                 run `sysctl -w net.core.{limit}={BUFFER_SIZE}`",
                size / 2048,
                BUFFER_SIZE / 1024,
            ));
        }
    }
    if wrapped.max_transmit_segments() == 1 {
        found.push(
            "UDP segmentation offload (GSO) does not work here: each byte costs about three times \
             the CPU; it needs Linux 4.18 and a device that takes checksum offload"
                .into(),
        );
    }
    if wrapped.max_receive_segments() == 1 {
        found.push(
            "UDP receive offload (GRO) does not work here: each byte costs more CPU; \
             it needs Linux 5.0"
                .into(),
        );
    }
    found
}
