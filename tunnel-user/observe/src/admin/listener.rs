//! An HTTP listener with bounded connections: unauthenticated peers reach the health port.
//!
//! Every new connection is admitted, and evicts another one where there is no free slot ([`ConnectionSlots`] chooses).
//! A connection ends after [`IDLE`] without an answer, and between two requests once it is [`LIFE`] old
//! or had [`MAX_REQUESTS`].

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep};

use cpc_host::connection_slots::{ConnectionSlots, SlotId};
use cpc_host::descriptors;

/// Maximum time without an answer on a connection: it ends peers that send half a request or read none
/// of the answer. All answers take milliseconds.
const IDLE: Duration = Duration::from_secs(10);

/// Age after which a connection takes no further request.
const LIFE: Duration = Duration::from_secs(60);

/// Number of requests after which a connection takes no further one.
const MAX_REQUESTS: u32 = 100;

/// A listener with a bounded number of connections.
pub(super) struct Listener {
    listener: TcpListener,
    connections: Arc<Mutex<Connections>>,
}

/// Open connections.
struct Connections {
    slots: ConnectionSlots,
    /// Senders that notify each connection of its eviction.
    evict: HashMap<SlotId, oneshot::Sender<()>>,
}

impl Listener {
    /// Wraps a listener of the current runtime, with slots for `max` connections.
    pub(super) fn new(listener: TcpListener, max: usize) -> Self {
        let connections = Connections {
            slots: ConnectionSlots::new(max),
            evict: HashMap::new(),
        };
        Self {
            listener,
            connections: Arc::new(Mutex::new(connections)),
        }
    }

    fn admit(&self, stream: TcpStream, peer: SocketAddr) -> Connection {
        let (evict, evicted) = oneshot::channel();
        let mut connections = lock(&self.connections);
        let (slot, other) = connections.slots.acquire(peer.ip());
        connections.evict.insert(slot, evict);
        if let Some(other) = other.and_then(|other| connections.evict.remove(&other)) {
            // One that has ended meanwhile leaves by itself.
            let _ = other.send(());
        }
        Connection {
            stream,
            idle: Box::pin(sleep(IDLE)),
            life: Box::pin(sleep(LIFE)),
            evicted,
            progress: Progress::Idle,
            requests: 0,
            _slot: Slot {
                connections: self.connections.clone(),
                slot,
            },
        }
    }
}

fn lock(connections: &Mutex<Connections>) -> MutexGuard<'_, Connections> {
    connections.lock().unwrap_or_else(PoisonError::into_inner)
}

impl axum::serve::Listener for Listener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            let error = match self.listener.accept().await {
                Ok((stream, peer)) => return (self.admit(stream, peer), peer),
                Err(error) => error,
            };
            // A process without descriptors must still answer probes of its health.
            if descriptors::is_exhausted(&error)
                && let Some(Ok(accepted)) = descriptors::lend_spare(|| self.accept_now())
            {
                let (stream, peer) = accepted;
                return (self.admit(stream, peer), peer);
            }
            descriptors::after_failed_accept(&self.listener, "HTTP", &error, b"").await;
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Listener {
    fn accept_now(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let accepted = self
            .listener
            .poll_accept(&mut Context::from_waker(std::task::Waker::noop()));
        match accepted {
            Poll::Ready(accepted) => accepted,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

/// Position of a connection in its exchange of requests and answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// No request is under way.
    Idle,
    /// A request is being read.
    Reading,
    /// An answer is being written.
    Answering,
}

/// A connection with bounded lifetime.
pub(super) struct Connection {
    stream: TcpStream,
    idle: Pin<Box<Sleep>>,
    life: Pin<Box<Sleep>>,
    evicted: oneshot::Receiver<()>,
    progress: Progress,
    requests: u32,
    /// Must be the last field: the slot is free once the socket is closed.
    _slot: Slot,
}

/// The slot of one connection, until dropped.
struct Slot {
    connections: Arc<Mutex<Connections>>,
    slot: SlotId,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut connections = lock(&self.connections);
        connections.slots.release(self.slot);
        connections.evict.remove(&self.slot);
        // The connection may have had the spare one, and is closed by now.
        descriptors::set_spare_aside();
    }
}

impl Connection {
    /// Returns the result of an operation on the stream, or an error at the end of its timeout.
    fn patiently<T>(
        &mut self,
        cx: &mut Context<'_>,
        done: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if done.is_ready() {
            return done;
        }
        if self.idle.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if Pin::new(&mut self.evicted).poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Poll::Pending
    }

    fn wrote(
        &mut self,
        cx: &mut Context<'_>,
        done: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if matches!(done, Poll::Ready(Ok(_))) {
            self.idle.as_mut().reset(Instant::now() + IDLE);
            self.progress = Progress::Answering;
        }
        self.patiently(cx, done)
    }

    /// Whether the connection takes no further request.
    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        self.progress == Progress::Idle
            && (self.requests >= MAX_REQUESTS || self.life.as_mut().poll(cx).is_ready())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_over(cx) {
            // Looks as if the peer had no more to ask.
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let done = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before && self.progress == Progress::Idle {
            self.progress = Progress::Reading;
            self.requests += 1;
        }
        self.patiently(cx, done)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.wrote(cx, done)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.wrote(cx, done)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Called when an answer has been written to its end.
        if self.progress == Progress::Answering {
            self.progress = Progress::Idle;
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
