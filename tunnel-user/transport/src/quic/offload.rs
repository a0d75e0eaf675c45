//! Probe of segmentation offloads: whether the kernel really splits sent batches and joins received
//! datagrams.
//!
//! A settable option is no proof. So the probe sends a batch over loopback once at start, and compares
//! what arrives. A device may still refuse: quinn-udp then sends one by one, which [`super::udp`]
//! notices.

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};

use cpc_host::kernel;

/// Number of datagrams in the batch, and the size of all but the last.
const COUNT: usize = 8;
const SIZE: usize = 1000;

/// Size of the batch. Its last datagram is shorter, as in most batches.
const TOTAL: usize = SIZE * COUNT - SIZE / 2;

/// Timeout of the batch.
const PATIENCE: Duration = Duration::from_millis(500);

/// Working offloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offload {
    /// One call sends many datagrams (GSO).
    pub(super) send: bool,
    /// One call receives many datagrams (GRO).
    pub(super) receive: bool,
}

impl Offload {
    /// Returns the failed offloads, each with its remedy. Empty when all is well.
    pub(super) fn complaints(self) -> Vec<&'static str> {
        let mut found = Vec::new();
        if !self.send {
            found.push(
                "UDP segmentation offload (GSO) does not work here: each byte costs about three \
                 times the CPU; it needs Linux 4.18 and a device that takes checksum offload",
            );
        }
        if !self.receive {
            found.push(
                "UDP receive offload (GRO) does not work here: each byte costs more CPU; \
                 it needs Linux 5.0",
            );
        }
        found
    }
}

/// Sends a batch to ourselves and compares what arrives. Takes about a millisecond.
///
/// # Errors
/// Loopback does not work, so the result is unknown.
pub(super) fn check() -> io::Result<Offload> {
    let [from, to] = [ProbeSocket::open()?, ProbeSocket::open()?];
    let sent: Vec<u8> = (0..TOTAL).map(|i| (i / 7) as u8).collect();
    let mut transmit = Transmit {
        destination: to.socket.local_addr()?,
        ecn: None,
        contents: &sent,
        segment_size: Some(SIZE),
        src_ip: None,
    };
    let mut send = from.state.max_gso_segments() >= COUNT
        && from
            .state
            .try_send((&from.socket).into(), &transmit)
            .is_ok();
    let mut received = Received::default();
    if send {
        received = to.receive()?;
        send = received.bytes == sent && received.datagrams == COUNT;
    }
    if !send {
        // One by one: GRO has nothing to join on loopback then.
        transmit.segment_size = None;
        transmit.contents = &sent[..SIZE];
        from.state.try_send((&from.socket).into(), &transmit)?;
    }
    // Before Linux 5.11 loopback cuts batches apart, whatever the socket takes.
    let is_told = send && (received.calls < COUNT || kernel::is_since((5, 11)));
    Ok(Offload {
        send,
        receive: match is_told {
            true => received.calls < COUNT,
            false => to.state.gro_segments() > 1,
        },
    })
}

struct ProbeSocket {
    socket: UdpSocket,
    state: UdpSocketState,
}

#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    datagrams: usize,
    calls: usize,
}

impl ProbeSocket {
    fn open() -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { socket, state })
    }

    /// Receives until the batch is complete, or no more comes.
    fn receive(&self) -> io::Result<Received> {
        let deadline = Instant::now() + PATIENCE;
        let mut received = Received::default();
        let mut buffer = vec![0; 1 << 16];
        while received.bytes.len() < TOTAL {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let mut watched = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut watched, left)? == 0 {
                break;
            }
            let mut meta = [RecvMeta::default()];
            let mut slices = [IoSliceMut::new(&mut buffer)];
            self.state
                .recv((&self.socket).into(), &mut slices, &mut meta)?;
            let [RecvMeta { len, stride, .. }] = meta;
            received.bytes.extend_from_slice(&buffer[..len]);
            received.datagrams += len.div_ceil(stride.max(1));
            received.calls += 1;
        }
        Ok(received)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_what_every_supported_one_has() {
        let offload = check().unwrap();
        assert!(offload.send && offload.receive, "{offload:?}");
        assert!(offload.complaints().is_empty());
    }

    #[test]
    fn what_is_missing_is_told() {
        let none = Offload {
            send: false,
            receive: false,
        };
        assert_eq!(none.complaints().len(), 2);
    }
}
