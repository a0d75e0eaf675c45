//! A UDP socket on the shard's ring: one receive stays in flight and gives batch after batch, each in a
//! buffer of its own that packets then refer to.
//!
//! The buffers bound the data received ahead: when none is left the kernel ends the receive, and the
//! driver starts another one when it has taken everything. Sends go to the kernel at once: one call
//! sends a whole batch, from memory that is used again for the next.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::BytesMut;
use io_uring::types::RecvMsgOut;
use io_uring::{opcode, types};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};

use super::control;
use crate::quic::metrics::Moved;
use cpc_datapath::engine::ring::{Completion, Group, Operation, Ring, Sink};

/// Room for the sender's address, and for control messages: IP_PKTINFO or IPV6_PKTINFO, the ECN mark
/// of either family, UDP_GRO. The kernel's own header of 16 bytes comes on top.
const NAME: usize = size_of::<libc::sockaddr_in6>().next_multiple_of(8);
const CONTROL: usize = 128;
const HEADER: usize = 16 + NAME + CONTROL;

/// A UDP socket on the current thread's ring.
#[derive(Debug)]
pub(super) struct RingUdp {
    socket: UdpSocket,
    ring: Rc<Ring>,
    received: Rc<Received>,
    room: Rc<Room>,
}

/// Received batches, and the receive in flight.
struct Received {
    queue: RefCell<VecDeque<(RecvMeta, BytesMut)>>,
    receive: Cell<Option<Operation>>,
    reader: Cell<Option<Waker>>,
    /// Header from which the kernel takes the sizes of its prefix.
    shape: Box<libc::msghdr>,
    is_closed: Cell<bool>,
}

impl Sink for Received {
    fn complete(&self, ring: &Ring, completion: Completion) {
        if completion.is_last() {
            self.receive.set(None);
        }
        let header = ring.peek(Group::Udp, completion, |bytes| {
            let out = RecvMsgOut::parse(bytes, &self.shape).ok()?;
            let (name, control) = (out.name_data(), out.control_data());
            control::meta(name, control, out.payload_data().len())
        });
        let is_shared = ring.stays(Group::Udp, completion, HEADER);
        let bytes = ring.take(Group::Udp, completion, HEADER);
        // Errors are those of earlier sends, such as a port that is closed: they are off the socket
        // now, and QUIC finds out by itself. The next read starts another one.
        if let (Some(meta), Some(bytes)) = (header.flatten(), bytes)
            && bytes.len() == meta.len
            && !self.is_closed.get()
        {
            let mut queue = self.queue.borrow_mut();
            if is_shared {
                queue.push_back((meta, bytes));
            } else {
                // Each packet by itself: one that stays must not keep the others of its batch.
                for packet in bytes.chunks(meta.stride.max(1)) {
                    let mut meta = meta;
                    (meta.len, meta.stride) = (packet.len(), packet.len());
                    queue.push_back((meta, packet.into()));
                }
            }
        }
        wake(&self.reader);
    }
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("batches", &self.queue.borrow().len())
            .finish_non_exhaustive()
    }
}

/// Readiness of the socket for sends.
#[derive(Default)]
struct Room {
    is_full: Cell<bool>,
    wait: Cell<Option<Operation>>,
    writer: Cell<Option<Waker>>,
}

impl Sink for Room {
    fn complete(&self, _ring: &Ring, _completion: Completion) {
        self.wait.set(None);
        self.is_full.set(false);
        wake(&self.writer);
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room")
            .field("is_full", &self.is_full.get())
            .finish_non_exhaustive()
    }
}

impl RingUdp {
    /// Brings a non-blocking socket to `ring`.
    pub(super) fn new(socket: UdpSocket, ring: Rc<Ring>) -> Self {
        // SAFETY: all zeros is a msghdr without anything.
        let mut shape: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        shape.msg_namelen = NAME as libc::socklen_t;
        shape.msg_controllen = CONTROL as _;
        let received = Received {
            queue: RefCell::default(),
            receive: Cell::default(),
            reader: Cell::default(),
            shape,
            is_closed: Cell::default(),
        };
        Self {
            socket,
            ring,
            received: Rc::new(received),
            room: Rc::default(),
        }
    }

    /// Returns the socket for sends.
    pub(super) fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    /// Takes the next batch.
    pub(super) fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        moved: &Moved,
    ) -> Poll<io::Result<(RecvMeta, BytesMut)>> {
        let received = &self.received;
        if let Some(batch) = received.queue.borrow_mut().pop_front() {
            moved.count(std::iter::once(&batch.0));
            return Poll::Ready(Ok(batch));
        }
        if received.receive.get().is_none() {
            self.receive()?;
        }
        received.reader.set(Some(cx.waker().clone()));
        Poll::Pending
    }

    /// Starts a receive. A ring can't wait for a non-blocking socket: O_NONBLOCK counts as RWF_NOWAIT.
    /// The kernel checks that when the receive is submitted, and sends need it.
    fn receive(&self) -> io::Result<()> {
        let fd = types::Fd(self.socket.as_raw_fd());
        let shape = &raw const *self.received.shape;
        let entry = opcode::RecvMsgMulti::new(fd, shape, Group::Udp.number()).build();
        self.socket.set_nonblocking(false)?;
        // SAFETY: the shape is the sink's, which stays until the last completion, and the descriptor
        // is open when it is submitted: now.
        let receive = unsafe { self.ring.start(entry, self.received.clone()) };
        self.received.receive.set(Some(receive));
        self.ring.submit();
        self.socket.set_nonblocking(true)
    }

    pub(super) fn try_send(
        &self,
        state: &UdpSocketState,
        transmit: &Transmit<'_>,
    ) -> io::Result<()> {
        let sent = state.send((&self.socket).into(), transmit);
        let is_full = matches!(&sent, Err(e) if e.kind() == io::ErrorKind::WouldBlock);
        self.room.is_full.set(is_full);
        sent
    }

    /// Waits until the socket takes packets again.
    pub(super) fn poll_send_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        let room = &self.room;
        if !room.is_full.get() {
            return Poll::Ready(());
        }
        if room.wait.get().is_none() {
            let fd = types::Fd(self.socket.as_raw_fd());
            let entry = opcode::PollAdd::new(fd, libc::POLLOUT as u32).build();
            // SAFETY: it refers to the descriptor alone, and dropping us submits before it is closed.
            let wait = unsafe { self.ring.start(entry, room.clone()) };
            room.wait.set(Some(wait));
        }
        room.writer.set(Some(cx.waker().clone()));
        Poll::Pending
    }
}

impl Drop for RingUdp {
    fn drop(&mut self) {
        self.received.is_closed.set(true);
        self.received.queue.take();
        let waiting = [self.received.receive.get(), self.room.wait.get()];
        for operation in waiting.into_iter().flatten() {
            self.ring.cancel(operation);
        }
        if waiting != [None, None] {
            self.ring.submit();
        }
    }
}

fn wake(waiting: &Cell<Option<Waker>>) {
    if let Some(waker) = waiting.take() {
        waker.wake();
    }
}
