//! A TCP socket on tokio's reactor, whose bytes stay in the kernel until the other end has confirmed them.
//!
//! Once a session is held, the socket is read with `MSG_PEEK`, and what the other end confirms is discarded. So the
//! process can be killed at any time: with a copy of the socket, the next process reads again what was lost with
//! this one (docs/adr/0038).

use std::cell::{Cell, OnceCell, RefCell};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::pin::Pin;
use std::ptr;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use cpc_keeper::{Position, Slot};
use nix::sys::socket::{MsgFlags, recv};
use tokio::net::TcpStream;

use crate::peek::{MOST_AGAIN, Peeking, set};
use crate::socket::{LocalSocket, read_stream};
use crate::stream::Held;

/// Number of bytes in the kernel from which on it is asked for a larger receive buffer. By itself it counts what
/// was discarded, and stays near 1.2 MB.
const RAISE_AT: u64 = 512 << 10;

/// Half of the larger receive buffer, in bytes.
const LOW_WATER: libc::c_int = 4 << 20;

/// Bit of an entry in the table of the keeper: the end of file was passed on to the peer, or is about to be.
pub const FINISHED: u64 = 1 << 63;

/// Returns the entry in the table of the keeper of a socket of which `consumed` bytes were taken.
pub fn entry(consumed: u64, is_finished: bool) -> u64 {
    match is_finished {
        true => consumed | FINISHED,
        false => consumed,
    }
}

/// The means to keep sockets beyond the process.
pub trait Keep {
    /// Whether there is a keeper.
    fn is_there(&self) -> bool;
    /// Gives a copy of the socket of a session to the keeper. The socket is at `position`, and has taken `untold`
    /// bytes of the tunnel more than `session` says.
    fn keep(
        &self,
        socket: BorrowedFd<'_>,
        position: &Position,
        session: &Held,
        untold: u64,
    ) -> Option<Slot>;
}

/// No keeper.
#[derive(Clone, Copy, Debug)]
pub struct KeepNothing;

impl Keep for KeepNothing {
    fn is_there(&self) -> bool {
        false
    }

    fn keep(&self, _: BorrowedFd<'_>, _: &Position, _: &Held, _: u64) -> Option<Slot> {
        None
    }
}

/// A connected TCP socket.
#[derive(Debug)]
pub struct TcpSocket {
    /// `None` inside where the kernel refuses the options for it.
    kept: OnceCell<Option<Box<Kept>>>,
    stream: TcpStream,
}

/// State of a socket that is read with `MSG_PEEK`.
#[derive(Debug)]
pub struct Kept {
    way: Peeking,
    /// Copy in the keeper.
    slot: RefCell<Option<Slot>>,
    /// Number of bytes that were read and are in the kernel.
    peeked: Cell<u64>,
    /// Number of bytes that were taken from the queue in all, as the table of the keeper has it.
    consumed: Cell<u64>,
    /// Whether the end of file was passed on to the peer.
    is_finished: Cell<bool>,
    /// Whether a larger receive buffer was asked for.
    is_raised: Cell<bool>,
}

impl Kept {
    /// Begins with a socket of which nothing is kept.
    fn new(way: Peeking) -> Self {
        Self {
            way,
            slot: RefCell::default(),
            peeked: Cell::default(),
            consumed: Cell::default(),
            is_finished: Cell::default(),
            is_raised: Cell::default(),
        }
    }

    /// Restores the state of a socket that an earlier process has kept: `peeked` bytes were read, and are in the
    /// kernel, which has given `consumed`.
    pub fn restore(
        (slot, way): (Option<Slot>, Peeking),
        peeked: u64,
        (consumed, is_finished): (u64, bool),
    ) -> Self {
        let kept = Self {
            peeked: peeked.into(),
            consumed: consumed.into(),
            is_finished: is_finished.into(),
            ..Self::new(way)
        };
        if let Some(slot) = slot {
            kept.fill(slot);
        }
        kept
    }

    /// Notes the copy in the keeper.
    fn fill(&self, slot: Slot) {
        slot.consuming(self.entry(self.consumed.get()));
        // One whose keeper is gone is dropped.
        self.slot.replace(Some(slot));
        self.tell();
    }

    /// Whether a keeper has a copy.
    fn is_safe(&self) -> bool {
        let slot = self.slot.borrow();
        slot.as_ref().is_some_and(|slot| !slot.is_lost())
    }

    /// Takes the first `n` bytes from the queue of the socket.
    fn discard(&self, socket: &impl AsRawFd, n: u64) {
        let n = n.min(self.peeked.get());
        if n == 0 {
            return;
        }
        let after = self.consumed.get() + n;
        if let Some(slot) = &*self.slot.borrow() {
            slot.consuming(self.entry(after));
        }
        let mut left = usize::try_from(n).unwrap_or(usize::MAX);
        while left > 0 {
            let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
            // SAFETY: with MSG_TRUNC a TCP socket writes nothing to the buffer (tcp(7)).
            let done = unsafe { libc::recv(socket.as_raw_fd(), ptr::null_mut(), left, flags) };
            match usize::try_from(done) {
                // They are there: a broken socket is seen by the next read.
                Ok(0) | Err(_) => break,
                Ok(done) => left = left.saturating_sub(done),
            }
        }
        self.peeked.set(self.peeked.get() - n);
        self.consumed.set(after);
        self.tell();
    }

    /// Returns the entry in the table of the keeper.
    fn entry(&self, consumed: u64) -> u64 {
        entry(consumed, self.is_finished.get())
    }

    /// Writes the state to the table of the keeper.
    fn tell(&self) {
        if let Some(slot) = &*self.slot.borrow() {
            slot.consumed(self.entry(self.consumed.get()));
        }
    }

    /// Ends the keeping of a socket whose bytes this process has.
    fn end(&self, socket: BorrowedFd<'_>) {
        self.discard(&socket, u64::MAX);
        self.way.end(socket);
    }

    /// Takes everything that was read: a crash would end the connection, until the other end has confirmed it.
    fn take_all(&self, socket: &impl AsRawFd) {
        self.slot.replace(None);
        self.discard(socket, u64::MAX);
    }

    /// Whether nothing is read before the other end has confirmed some bytes.
    fn is_full(&self) -> bool {
        self.way == Peeking::Again && self.peeked.get() >= MOST_AGAIN
    }
}

impl TcpSocket {
    /// Wraps a socket of which nothing is kept yet.
    pub fn new(stream: TcpStream) -> Self {
        Self {
            kept: OnceCell::new(),
            stream,
        }
    }

    /// Takes the socket apart.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn into_std(self) -> io::Result<(std::net::TcpStream, Option<Box<Kept>>)> {
        Ok((self.stream.into_std()?, self.kept.into_inner().flatten()))
    }

    /// Joins the current runtime.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn from_std(stream: std::net::TcpStream, kept: Option<Box<Kept>>) -> io::Result<Self> {
        let socket = Self::new(TcpStream::from_std(stream)?);
        if kept.is_some() {
            // It is empty.
            let _ = socket.kept.set(kept);
        }
        Ok(socket)
    }

    fn kept(&self) -> Option<&Kept> {
        self.kept.get()?.as_deref()
    }

    /// Reads, and leaves the bytes in the kernel where they are kept.
    fn receive(&self, room: &mut [u8]) -> io::Result<usize> {
        let Some(kept) = self.kept() else {
            return Ok(recv(self.stream.as_raw_fd(), room, MsgFlags::empty())?);
        };
        let n = { kept.way }.read(self.stream.as_fd(), kept.peeked.get(), room)?;
        let n = match n {
            Some(n) => n,
            None => {
                kept.take_all(&self.stream);
                recv(self.stream.as_raw_fd(), room, MsgFlags::MSG_PEEK)?
            }
        };
        kept.peeked.set(kept.peeked.get() + n as u64);
        Ok(n)
    }

    /// Begins to leave in the kernel what is read.
    fn begin(&self) -> Option<Box<Kept>> {
        let way = Peeking::begin(self.stream.as_fd(), 0).ok()?;
        Some(Box::new(Kept::new(way)))
    }

    /// Asks for a larger receive buffer, which the kernel grants to a reader that wants so many bytes at once.
    fn raise(&self) {
        for bytes in [LOW_WATER, 1] {
            // Without it the connection is slower.
            let _ = set(self.stream.as_fd(), libc::SO_RCVLOWAT, bytes);
        }
    }
}

/// Takes what a process has read of a socket, and not discarded, for a planned handover: it goes along with the
/// message.
pub(crate) fn release(socket: &impl AsFd, kept: Option<Box<Kept>>) {
    if let Some(kept) = kept {
        kept.end(socket.as_fd());
    }
}

impl LocalSocket for TcpSocket {
    fn read(&self) -> impl Future<Output = io::Result<Bytes>> {
        let mut read = read_stream!(self.stream, |room: &mut [u8]| self.receive(room));
        poll_fn(move |cx| match self.kept() {
            // A confirmation wakes the relay.
            Some(kept) if kept.is_full() => Poll::Pending,
            _ => Pin::new(&mut read).poll(cx),
        })
    }

    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        LocalSocket::try_write(&self.stream, slices)
    }

    async fn writable(&self) -> io::Result<()> {
        LocalSocket::writable(&self.stream).await
    }

    async fn finish(&self) -> io::Result<()> {
        let Some(kept) = self.kept() else {
            return self.stream.finish().await;
        };
        // Before, and taken back where it fails: the table must not lack an end that the kernel counts.
        let before = kept.is_finished.replace(true);
        kept.tell();
        let finished = self.stream.finish().await;
        if finished.is_err() {
            kept.is_finished.set(before);
            kept.tell();
        }
        finished
    }

    async fn broken(&self) {
        self.stream.broken().await;
    }

    async fn broken_before_eof(&self) {
        self.stream.broken_before_eof().await;
    }

    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.stream.poll_readable(cx)
    }

    fn idle_time(&self) -> Option<Duration> {
        self.stream.idle_time()
    }

    fn reset_on_close(&self, reset: bool) {
        if !reset {
            self.discard_input();
        }
        self.stream.reset_on_close(reset);
    }

    /// Discards what was read: a socket that is closed with bytes in its queue resets.
    fn discard_input(&self) {
        self.discard_read();
    }

    fn discard_read(&self) {
        if let Some(kept) = self.kept() {
            kept.discard(&self.stream, u64::MAX);
        }
    }

    fn unsent(&self) -> usize {
        self.stream.unsent()
    }

    fn is_kept(&self) -> bool {
        self.kept().is_some()
    }

    fn keep(&self, session: &Held, untold: u64, keeper: &impl Keep) {
        let Some(kept) = self.kept.get_or_init(|| self.begin()).as_deref() else {
            return;
        };
        let unconfirmed = session.taken - session.confirmed;
        let surplus = kept.peeked.get().saturating_sub(unconfirmed);
        kept.discard(&self.stream, surplus);
        if kept.peeked.get() >= RAISE_AT && !kept.is_raised.replace(true) {
            self.raise();
        }
        // From then on nothing is lost that is not in the kernel.
        if unconfirmed > kept.peeked.get() || kept.is_safe() || !keeper.is_there() {
            return;
        }
        let socket = self.stream.as_fd();
        let Ok(position) = Position::of(socket) else {
            return;
        };
        kept.consumed.set(position.consumed());
        kept.is_finished.set(position.is_finished());
        if let Some(slot) = keeper.keep(socket, &position, session, untold) {
            kept.fill(slot);
        }
    }
}
