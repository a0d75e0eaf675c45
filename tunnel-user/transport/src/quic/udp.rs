//! UDP sockets for QUIC: opening, buffer sizes, diagnosis of slowness, and driving.

mod control;
mod epoll;
mod ring;

use std::cell::Cell;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use quinn_udp::{RecvMeta, UdpSocketState};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use self::epoll::EpollUdp;
use self::ring::RingUdp;
use super::metrics::UdpMetrics;
use cpc_datapath::engine;

/// Wanted size of a UDP socket's send and receive buffers, in bytes. At 1 Gbit/s it holds 30 ms, about
/// the delay of a busy shard.
pub const BUFFER_SIZE: usize = 4 << 20;

/// Maximum size of one send, in bytes: the length field of an IPv4 packet without the headers of IP and
/// UDP.
const MAX_SEND: usize = 65_535 - 20 - 8;

/// Opens a UDP socket. `[::]` listens on both families.
///
/// # Errors
/// The error of the system call.
pub fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    open(addr, false)
}

/// Opens a UDP socket whose port [others](widen) may then share. A port of another process is not
/// shared with it.
///
/// # Errors
/// The error of the system call.
pub fn bind_to_share(addr: SocketAddr) -> io::Result<UdpSocket> {
    // Alone at first: the same call would let us in beside another process of the same user.
    let socket = bind(addr)?;
    SockRef::from(&socket).set_reuse_port(true)?;
    Ok(socket)
}

/// Opens further sockets beside the first ones in `group`, which share their port, until there is one for each of
/// `shards`. The kernel gives packets to them once it [steers](super::steering::steer). An empty group stays so.
///
/// # Errors
/// The error of the system call: another user's socket can't be shared, nor one that was opened without
/// sharing. The group has the sockets that could be opened.
pub fn widen(group: &mut Vec<UdpSocket>, shards: usize) -> io::Result<()> {
    let Some(first) = group.first() else {
        return Ok(());
    };
    let addr = first.local_addr()?;
    while group.len() < shards {
        group.push(open(addr, true)?);
    }
    Ok(())
}

fn open(addr: SocketAddr, shared: bool) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&addr.into())?;
    let socket = socket.into();
    enlarge(&socket);
    Ok(socket)
}

/// Enlarges the buffers of a socket, if they are smaller than needed. The kernel reduces them to
/// net.core.{r,w}mem_max; the endpoint reports that.
pub fn enlarge(socket: &UdpSocket) {
    let socket = SockRef::from(socket);
    // Reported are twice the bytes that were asked for (socket(7)).
    let small = |size: io::Result<usize>| size.is_ok_and(|size| size < 2 * BUFFER_SIZE);
    if small(socket.recv_buffer_size()) {
        let _ = socket.set_recv_buffer_size(BUFFER_SIZE);
    }
    if small(socket.send_buffer_size()) {
        let _ = socket.set_send_buffer_size(BUFFER_SIZE);
    }
}

/// A UDP socket on the current shard, with segmentation offloads on where they work.
#[derive(Debug)]
pub(super) struct Udp {
    socket: DrivenSocket,
    state: UdpSocketState,
    metrics: UdpMetrics,
    /// Whether one call may send many packets, as far as known.
    is_segmented: Cell<bool>,
}

/// A socket over the shard's engine.
#[derive(Debug)]
enum DrivenSocket {
    Epoll(EpollUdp),
    Ring(RingUdp),
}

impl Udp {
    /// Wraps a bound socket.
    pub(super) fn new(socket: UdpSocket, metrics: UdpMetrics) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let state = UdpSocketState::new((&socket).into())?;
        let socket = match engine::current() {
            Some(ring) => DrivenSocket::Ring(RingUdp::new(socket, ring)),
            None => DrivenSocket::Epoll(EpollUdp::new(socket)?),
        };
        Ok(Self {
            is_segmented: Cell::new(state.max_gso_segments() > 1),
            socket,
            state,
            metrics,
        })
    }

    fn as_socket(&self) -> SockRef<'_> {
        match &self.socket {
            DrivenSocket::Epoll(udp) => udp.socket().into(),
            DrivenSocket::Ring(udp) => udp.socket().into(),
        }
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.socket {
            DrivenSocket::Epoll(udp) => udp.socket().local_addr(),
            DrivenSocket::Ring(udp) => udp.socket().local_addr(),
        }
    }

    /// Whether packets may be fragmented on their way: then they can't probe the size of a path.
    pub(super) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    /// Takes the next batch, of datagrams of one size, the last of which may be shorter.
    pub(super) fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<io::Result<(RecvMeta, BytesMut)>> {
        let (meta, bytes) = ready!(match &self.socket {
            DrivenSocket::Epoll(udp) => udp.poll_recv(cx, &self.state, &self.metrics.receive),
            DrivenSocket::Ring(udp) => udp.poll_recv(cx, &self.metrics.receive),
        })?;
        Poll::Ready(Ok((meta, bytes)))
    }

    /// Returns the maximum number of packets of `size` bytes in one send.
    pub(super) fn batch(&self, size: usize) -> usize {
        let fit = MAX_SEND / size.max(1);
        self.state.max_gso_segments().min(fit).max(1)
    }

    /// Sends packets. Returns `false` if the socket takes no more for now.
    pub(super) fn try_send(&self, transmit: &quinn_proto::Transmit, contents: &[u8]) -> bool {
        let transmit = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn.map(to_udp),
            contents: &contents[..transmit.size],
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        let sent = match &self.socket {
            DrivenSocket::Epoll(udp) => udp.try_send(&self.state, &transmit),
            DrivenSocket::Ring(udp) => udp.try_send(&self.state, &transmit),
        };
        // Other errors are the network's, which may lose packets as it likes.
        if sent.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
            return false;
        }
        let size = transmit.contents.len();
        let one = transmit.segment_size.unwrap_or(size).max(1);
        self.metrics.send.add(size.div_ceil(one), size);
        if self.is_segmented.get() && self.state.max_gso_segments() == 1 {
            self.lost_segmentation();
        }
        true
    }

    /// Notes that a device has refused to split a batch: from now on each packet is a call of its own.
    #[cold]
    fn lost_segmentation(&self) {
        self.is_segmented.set(false);
        self.metrics.send.offload.set(0);
        tracing::warn!(
            "the network device refused UDP segmentation offload (GSO): each packet is sent by \
             itself from now on, which costs about three times the CPU. It takes checksum offload: \
             see `ethtool -k DEVICE`, tx-checksumming"
        );
    }

    /// Waits until the socket takes packets again.
    pub(super) fn poll_send_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.socket {
            DrivenSocket::Epoll(udp) => udp.socket().poll_send_ready(cx),
            DrivenSocket::Ring(udp) => udp.poll_send_ready(cx).map(Ok),
        }
    }

    /// Returns the faults of the socket, each with its remedy. Empty when all is well.
    pub(super) fn complaints(&self) -> Vec<String> {
        let mut found = Vec::new();
        let socket = self.as_socket();
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
        found
    }
}

fn to_udp(ecn: quinn_proto::EcnCodepoint) -> quinn_udp::EcnCodepoint {
    match ecn {
        quinn_proto::EcnCodepoint::Ect0 => quinn_udp::EcnCodepoint::Ect0,
        quinn_proto::EcnCodepoint::Ect1 => quinn_udp::EcnCodepoint::Ect1,
        quinn_proto::EcnCodepoint::Ce => quinn_udp::EcnCodepoint::Ce,
    }
}

/// Returns the ECN mark of a received packet.
pub(super) fn ecn(meta: &RecvMeta) -> Option<quinn_proto::EcnCodepoint> {
    meta.ecn.map(|ecn| match ecn {
        quinn_udp::EcnCodepoint::Ect0 => quinn_proto::EcnCodepoint::Ect0,
        quinn_udp::EcnCodepoint::Ect1 => quinn_proto::EcnCodepoint::Ect1,
        quinn_udp::EcnCodepoint::Ce => quinn_proto::EcnCodepoint::Ce,
    })
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        encode(&mut text, registry).unwrap();
        text
    }

    #[tokio::test]
    async fn what_is_sent_is_counted_and_a_device_that_cuts_no_more_is_noticed() {
        let mut registry = Registry::default();
        let metrics = UdpMetrics::register(&mut registry);
        metrics.send.offload.set(1);
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let udp = Udp::new(bind(any).unwrap(), metrics).unwrap();
        let to_itself = |size, segment_size| quinn_proto::Transmit {
            destination: udp.local_addr().unwrap(),
            ecn: None,
            size,
            segment_size,
            src_ip: None,
        };
        let ready = std::future::poll_fn(|cx| udp.poll_send_ready(cx));
        ready.await.unwrap();
        assert!(udp.batch(1000) > 40);
        assert!(udp.try_send(&to_itself(2500, Some(1000)), &[0; 2500]));
        assert!(udp.try_send(&to_itself(200, None), &[0; 200]));
        let counted = text(&registry);
        for line in [
            "udp_calls_total{direction=\"send\"} 2\n",
            "udp_datagrams_total{direction=\"send\"} 4\n",
            "udp_bytes_total{direction=\"send\"} 2700\n",
            "udp_offload{direction=\"send\"} 1\n",
        ] {
            assert!(counted.contains(line), "no {line}in {counted}");
        }
        // More packets than any kernel cuts: refused as by a device that cuts none.
        assert!(udp.try_send(&to_itself(5000, Some(5)), &[0; 5000]));
        assert_eq!(udp.batch(1000), 1);
        assert!(text(&registry).contains("udp_offload{direction=\"send\"} 0\n"));
    }
}
