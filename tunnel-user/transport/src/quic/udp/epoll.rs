//! A UDP socket on tokio's reactor: one call receives several batches (recvmmsg(2)), into one buffer.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::UdpSocket;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;

use crate::quic::metrics::Moved;
use cpc_datapath::buffers::Buffers;

/// Maximum size of one receive, in bytes: a full GRO batch.
const SEGMENT: usize = 64 << 10;

/// Number of receives per call.
const BATCH: usize = 4;

/// Maximum number of buffers in use: the memory that a few bytes of stopped streams may keep.
const BUFFERS: usize = 32;

/// A UDP socket on tokio's reactor.
#[derive(Debug)]
pub(super) struct EpollUdp {
    socket: tokio::net::UdpSocket,
    received: RefCell<Received>,
}

#[derive(Debug)]
struct Received {
    buffers: Buffers,
    /// Batches of the last call.
    batches: VecDeque<(RecvMeta, BytesMut)>,
}

impl EpollUdp {
    /// Brings a non-blocking socket to the current runtime.
    pub(super) fn new(socket: UdpSocket) -> io::Result<Self> {
        let received = Received {
            buffers: Buffers::new(SEGMENT * BATCH, BUFFERS),
            batches: VecDeque::with_capacity(BATCH),
        };
        Ok(Self {
            socket: tokio::net::UdpSocket::from_std(socket)?,
            received: received.into(),
        })
    }

    /// Returns the socket.
    pub(super) fn socket(&self) -> &tokio::net::UdpSocket {
        &self.socket
    }

    /// Takes the next batch.
    pub(super) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        state: &UdpSocketState,
        moved: &Moved,
    ) -> Poll<io::Result<(RecvMeta, BytesMut)>> {
        let mut received = self.received.borrow_mut();
        loop {
            if let Some(batch) = received.batches.pop_front() {
                return Poll::Ready(Ok(batch));
            }
            ready!(self.receive(cx, state, &mut received, moved))?;
        }
    }

    /// Receives in one call.
    fn receive(
        &self,
        cx: &mut Context<'_>,
        state: &UdpSocketState,
        received: &mut Received,
        moved: &Moved,
    ) -> Poll<io::Result<()>> {
        ready!(self.socket.poll_recv_ready(cx))?;
        let mut meta = [RecvMeta::default(); BATCH];
        let mut room = received.buffers.take();
        let mut rest = &mut room.bytes[..];
        let mut slices: [IoSliceMut<'_>; BATCH] = std::array::from_fn(|_| {
            let (segment, others) = std::mem::take(&mut rest).split_at_mut(SEGMENT);
            rest = others;
            IoSliceMut::new(segment)
        });
        let mut last = None;
        let done = self.socket.try_io(Interest::READABLE, || {
            let count = state.recv((&self.socket).into(), &mut slices, &mut meta)?;
            if count < BATCH {
                // There was no more: the next packet is news (epoll(7), edge-triggered), and nobody
                // has to ask in vain.
                last = Some(count);
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(count)
        });
        let count = match last.map_or(done, Ok) {
            Ok(count) => count,
            Err(error) => {
                received.buffers.give_back(room);
                return match error.kind() {
                    // Registers again, so that the task is woken.
                    io::ErrorKind::WouldBlock => Poll::Ready(Ok(())),
                    _ => Poll::Ready(Err(error)),
                };
            }
        };
        moved.count(meta[..count].iter());
        let is_pooled = room.is_pooled();
        for meta in &meta[..count] {
            if is_pooled {
                let bytes = room.part(SEGMENT, meta.len);
                received.batches.push_back((*meta, bytes));
                continue;
            }
            // Each packet by itself: one that stays must not keep the others of its batch.
            let batch = room.bytes.split_to(SEGMENT);
            for packet in batch[..meta.len].chunks(meta.stride.max(1)) {
                let mut meta = *meta;
                (meta.len, meta.stride) = (packet.len(), packet.len());
                received.batches.push_back((meta, packet.into()));
            }
        }
        received.buffers.give_back(room);
        Poll::Ready(Ok(()))
    }

    pub(super) fn try_send(
        &self,
        state: &UdpSocketState,
        transmit: &Transmit<'_>,
    ) -> io::Result<()> {
        self.socket.try_io(Interest::WRITABLE, || {
            state.send((&self.socket).into(), transmit)
        })
    }
}
