//! A TCP socket on a ring: a receive stays in flight, and fills a bounded queue.
//!
//! When the queue is full the receive is cancelled, so that the peer's window closes; a new one starts
//! once the queue is empty. Writes go to the kernel at once: a request on the ring would need memory of
//! its own, and a wake-up when it is done. epoll reports whether the socket takes bytes again, and
//! whether it is broken: neither happens often.
//!
//! An operation in flight keeps the file open. So closing cancels the receive first, and lets the
//! kernel do that before close(2), which then resets or not as with epoll.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use io_uring::{opcode, types};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tunnel_proto::handover;

use super::ring::{Completion, Group, Operation, Ring, Sink};
use crate::LocalSocket;
use crate::kept::{Kept, release};
use crate::socket::{SocketParts, error_ready, unless_ended, unsent_bytes, would_block};

/// Approximate number of bytes received ahead of the reader. Data that the kernel has put into buffers
/// before it sees the cancellation comes on top.
const RECEIVE_AHEAD: usize = 64 << 10;

/// A connected TCP socket on the current thread's ring.
#[derive(Debug)]
pub struct RingSocket {
    // Dropped, and so closed, after the receive was cancelled.
    fd: AsyncFd<TcpStream>,
    received: Rc<Received>,
    ring: Rc<Ring>,
}

/// A socket on its way to another shard, with what was received ahead.
#[derive(Debug)]
pub struct Packed {
    pub(super) socket: TcpStream,
    ahead: VecDeque<Bytes>,
    end: Option<End>,
    /// State of a socket that is kept. One on a ring is not.
    pub(super) kept: Option<Box<Kept>>,
}

impl From<TcpStream> for Packed {
    fn from(socket: TcpStream) -> Self {
        Self {
            socket,
            ahead: VecDeque::new(),
            end: None,
            kept: None,
        }
    }
}

impl Packed {
    /// Packs a socket with its bytes in the kernel.
    pub fn kept(socket: TcpStream, kept: Option<Box<Kept>>) -> Self {
        Self {
            kept,
            ..Self::from(socket)
        }
    }

    /// Takes the socket apart for another process. Returns `None`, which closes the socket, if its receive has
    /// failed: the kernel reports an error once.
    pub(super) fn into_parts(self) -> Option<SocketParts> {
        if let Some(End::Error(_)) = self.end {
            return None;
        }
        release(&self.socket, self.kept);
        // The kernel reports an end of file again.
        Some(SocketParts {
            descriptor: self.socket.into(),
            kind: handover::socket::Kind::Tcp,
            ahead: self.ahead.into_iter().flatten().collect(),
        })
    }
}

/// End of the received data.
#[derive(Clone, Copy, Debug)]
enum End {
    Eof,
    /// An error, by its number.
    Error(i32),
}

/// The queue of received bytes, and the receive in flight.
#[derive(Default)]
struct Received {
    queue: RefCell<VecDeque<Bytes>>,
    bytes: Cell<usize>,
    end: Cell<Option<End>>,
    receive: Cell<Option<Operation>>,
    is_given_up: Cell<bool>,
    is_closed: Cell<bool>,
    reader: Cell<Option<Waker>>,
    /// Task that waits for an error.
    watcher: Cell<Option<Waker>>,
}

impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("bytes", &self.bytes.get())
            .field("end", &self.end.get())
            .finish_non_exhaustive()
    }
}

impl Sink for Received {
    fn complete(&self, ring: &Ring, completion: Completion) {
        let bytes = ring.take(Group::Tcp, completion, 0);
        if completion.is_last() {
            self.receive.set(None);
            self.is_given_up.set(false);
        }
        match completion.result() {
            Ok(0) => self.end.set(Some(End::Eof)),
            Ok(_) => {
                let bytes = bytes.filter(|_| !self.is_closed.get());
                self.push(bytes.unwrap_or_default().freeze());
                if self.bytes.get() >= RECEIVE_AHEAD {
                    self.give_up(ring);
                }
            }
            Err(error) => match error.raw_os_error() {
                // Cancelled, or out of buffers, which are back by now: the next read starts another one.
                None | Some(libc::ECANCELED | libc::ENOBUFS | libc::EINTR | libc::EAGAIN) => {}
                Some(code) => {
                    self.end.set(Some(End::Error(code)));
                    wake(&self.watcher);
                }
            },
        }
        wake(&self.reader);
    }
}

impl Received {
    fn push(&self, bytes: Bytes) {
        self.bytes.set(self.bytes.get() + bytes.len());
        self.queue.borrow_mut().push_back(bytes);
    }

    fn pop(&self) -> Option<Bytes> {
        let bytes = self.queue.borrow_mut().pop_front()?;
        self.bytes.set(self.bytes.get() - bytes.len());
        Some(bytes)
    }

    fn give_up(&self, ring: &Ring) {
        if let Some(receive) = self.receive.get()
            && !self.is_given_up.replace(true)
        {
            ring.cancel(receive);
        }
    }

    /// Waits for a received error.
    fn poll_error(&self, cx: &mut Context<'_>) -> Poll<i32> {
        if let Some(End::Error(code)) = self.end.get() {
            return Poll::Ready(code);
        }
        self.watcher.set(Some(cx.waker().clone()));
        Poll::Pending
    }
}

impl RingSocket {
    /// Brings a socket to `ring`, that of the current thread.
    pub(super) fn new(ring: Rc<Ring>, packed: Packed) -> io::Result<Self> {
        let Packed {
            socket,
            ahead,
            end,
            kept,
        } = packed;
        release(&socket, kept);
        // Else the kernel would not wait for bytes: it takes O_NONBLOCK for RWF_NOWAIT.
        socket.set_nonblocking(false)?;
        let received = Received::default();
        received.end.set(end);
        ahead.into_iter().for_each(|bytes| received.push(bytes));
        // Not for what arrives, which the ring tells. Errors are always told (epoll_ctl(2)).
        // SAFETY: the socket owns its descriptor and is held here.
        let fd = unsafe { AsyncFd::register_with_interest(socket, Interest::WRITABLE)? };
        Ok(Self {
            fd,
            received: Rc::new(received),
            ring,
        })
    }

    /// Returns the number of received bytes that are not read yet.
    #[cfg(test)]
    pub(super) fn ahead(&self) -> usize {
        self.received.bytes.get()
    }

    /// Removes the socket from the ring.
    pub(super) fn pack(self) -> io::Result<Packed> {
        while let Some(receive) = self.received.receive.get() {
            // As often as it takes until its last completion has been told; once, as a rule.
            self.ring.cancel(receive);
            self.ring.turn();
        }
        let socket = self.fd.get_ref().try_clone()?;
        socket.set_nonblocking(true)?;
        Ok(Packed {
            socket,
            ahead: self.received.queue.take(),
            end: self.received.end.get(),
            kept: None,
        })
    }

    /// Keeps a receive in flight.
    fn receive(&self) {
        let received = &self.received;
        if received.receive.get().is_some() || received.end.get().is_some() {
            return;
        }
        let fd = types::Fd(self.fd.as_raw_fd());
        let entry = opcode::RecvMulti::new(fd, Group::Tcp.number()).build();
        // SAFETY: it refers to the descriptor alone, and dropping us submits before it is closed.
        let receive = unsafe { self.ring.start(entry, received.clone()) };
        received.receive.set(Some(receive));
    }

    fn poll_read(&self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        let received = &self.received;
        if let Some(bytes) = received.pop() {
            if received.bytes.get() == 0 {
                // While these are passed on.
                self.receive();
            }
            return Poll::Ready(Ok(bytes));
        }
        match received.end.get() {
            Some(End::Eof) => Poll::Ready(Ok(Bytes::new())),
            Some(End::Error(code)) => Poll::Ready(Err(io::Error::from_raw_os_error(code))),
            None => {
                self.receive();
                received.reader.set(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl LocalSocket for RingSocket {
    fn read(&self) -> impl Future<Output = io::Result<Bytes>> {
        poll_fn(|cx| self.poll_read(cx))
    }

    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let socket = SockRef::from(self.fd.get_ref());
        let written = would_block(socket.send_vectored_with_flags(slices, flags));
        if let Ok(None) = written {
            // The next event of epoll tells that it takes bytes again.
            let _ = self.fd.try_io(Interest::WRITABLE, |_| {
                Err::<(), _>(io::ErrorKind::WouldBlock.into())
            });
        }
        written
    }

    async fn writable(&self) -> io::Result<()> {
        self.fd.writable().await.map(drop)
    }

    async fn finish(&self) -> io::Result<()> {
        self.fd.get_ref().shutdown(Shutdown::Write)
    }

    async fn broken(&self) {
        // The receive may have taken the error off the socket before epoll could tell of it.
        let mut error_event = pin!(error_ready(self.fd.ready(Interest::ERROR)));
        poll_fn(|cx| match self.received.poll_error(cx) {
            Poll::Ready(_) => Poll::Ready(()),
            Poll::Pending => error_event.as_mut().poll(cx),
        })
        .await;
    }

    async fn broken_before_eof(&self) {
        let mut error_event = pin!(async {
            error_ready(self.fd.ready(Interest::ERROR)).await;
            unless_ended(self.fd.get_ref().take_error()).await;
        });
        poll_fn(|cx| match self.received.poll_error(cx) {
            // It was an error in place of an end of file.
            Poll::Ready(_) => Poll::Ready(()),
            Poll::Pending => error_event.as_mut().poll(cx),
        })
        .await;
    }

    fn reset_on_close(&self, reset: bool) {
        let linger = reset.then_some(Duration::ZERO);
        // Fails only on a socket that is broken already.
        let _ = SockRef::from(self.fd.get_ref()).set_linger(linger);
    }

    fn unsent(&self) -> usize {
        unsent_bytes(self.fd.get_ref())
    }
}

impl Drop for RingSocket {
    fn drop(&mut self) {
        let received = &self.received;
        received.is_closed.set(true);
        received.queue.take();
        if received.receive.get().is_some() {
            received.give_up(&self.ring);
            self.ring.submit();
        }
    }
}

fn wake(waiting: &Cell<Option<Waker>>) {
    if let Some(waker) = waiting.take() {
        waker.wake();
    }
}
