//! A TCP socket over the engine of its shard.

use std::io::{self, IoSlice};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::Either;
use tokio::net::TcpStream;

use super::tcp::{Packed, RingSocket};
use super::thread::current;
use crate::LocalSocket;
use crate::kept::{Keep, Kept, TcpSocket};
use crate::socket::{Portable, SocketParts};
use crate::stream::Held;

/// A connected TCP socket.
#[derive(Debug)]
pub enum Socket {
    /// On tokio's reactor.
    Epoll(TcpSocket),
    /// On the shard's ring.
    Ring(RingSocket),
}

impl Socket {
    /// Brings a socket to the engine of the current shard.
    ///
    /// # Errors
    /// The error of the system call; the socket is closed, by reset or not as it was set.
    pub fn new(socket: TcpStream) -> io::Result<Self> {
        match current() {
            Some(ring) => RingSocket::new(ring, socket.into_std()?.into()).map(Self::Ring),
            None => Ok(Self::Epoll(TcpSocket::new(socket))),
        }
    }
}

/// Returns a socket of an earlier process, with the bytes that are in the kernel, ready to
/// [unpack](Portable::unpack).
pub fn packed(socket: std::net::TcpStream, kept: Option<Box<Kept>>) -> Packed {
    Packed::kept(socket, kept)
}

/// Calls the same method on either variant.
macro_rules! either {
    ($self:ident, $socket:ident => $call:expr) => {
        match $self {
            Socket::Epoll($socket) => $call,
            Socket::Ring($socket) => $call,
        }
    };
}

impl LocalSocket for Socket {
    fn read(&self) -> impl Future<Output = io::Result<Bytes>> {
        match self {
            Self::Epoll(socket) => Either::Left(socket.read()),
            Self::Ring(socket) => Either::Right(socket.read()),
        }
    }

    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        either!(self, socket => LocalSocket::try_write(socket, slices))
    }

    async fn writable(&self) -> io::Result<()> {
        either!(self, socket => LocalSocket::writable(socket).await)
    }

    async fn finish(&self) -> io::Result<()> {
        either!(self, socket => socket.finish().await)
    }

    async fn broken(&self) {
        either!(self, socket => socket.broken().await);
    }

    async fn broken_before_eof(&self) {
        either!(self, socket => socket.broken_before_eof().await);
    }

    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        either!(self, socket => socket.poll_readable(cx))
    }

    fn idle_time(&self) -> Option<Duration> {
        either!(self, socket => socket.idle_time())
    }

    fn reset_on_close(&self, reset: bool) {
        either!(self, socket => socket.reset_on_close(reset));
    }

    fn discard_input(&self) {
        either!(self, socket => socket.discard_input());
    }

    fn discard_read(&self) {
        either!(self, socket => socket.discard_read());
    }

    fn unsent(&self) -> usize {
        either!(self, socket => socket.unsent())
    }

    fn is_kept(&self) -> bool {
        either!(self, socket => socket.is_kept())
    }

    fn keep(&self, session: &Held, untold: u64, keeper: &impl Keep) {
        either!(self, socket => socket.keep(session, untold, keeper));
    }
}

impl Portable for Socket {
    type Packed = Packed;

    fn pack(self) -> io::Result<Packed> {
        match self {
            Self::Epoll(socket) => {
                let (socket, kept) = socket.into_std()?;
                Ok(Packed::kept(socket, kept))
            }
            Self::Ring(socket) => socket.pack(),
        }
    }

    fn unpack(packed: Packed) -> io::Result<Self> {
        match current() {
            Some(ring) => RingSocket::new(ring, packed).map(Self::Ring),
            // All shards have the same engine, so nothing was received ahead.
            None => TcpSocket::from_std(packed.socket, packed.kept).map(Self::Epoll),
        }
    }

    fn into_parts(packed: Packed) -> Option<SocketParts> {
        packed.into_parts()
    }
}
