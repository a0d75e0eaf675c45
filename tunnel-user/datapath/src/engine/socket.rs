//! A TCP socket over the engine of its shard.

use std::io::{self, IoSlice};

use bytes::Bytes;
use futures_util::future::Either;
use tokio::net::TcpStream;

use super::tcp::{Packed, RingSocket};
use super::thread::current;
use crate::LocalSocket;
use crate::socket::{Portable, SocketParts};

/// A connected TCP socket.
#[derive(Debug)]
pub enum Socket {
    /// On tokio's reactor.
    Epoll(TcpStream),
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
            None => Ok(Self::Epoll(socket)),
        }
    }
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

    fn reset_on_close(&self, reset: bool) {
        either!(self, socket => socket.reset_on_close(reset));
    }

    fn unsent(&self) -> usize {
        either!(self, socket => socket.unsent())
    }
}

impl Portable for Socket {
    type Packed = Packed;

    fn pack(self) -> io::Result<Packed> {
        match self {
            Self::Epoll(socket) => Ok(socket.into_std()?.into()),
            Self::Ring(socket) => socket.pack(),
        }
    }

    fn unpack(packed: Packed) -> io::Result<Self> {
        match current() {
            Some(ring) => RingSocket::new(ring, packed).map(Self::Ring),
            // All shards have the same engine, so nothing was received ahead.
            None => TcpStream::from_std(packed.socket).map(Self::Epoll),
        }
    }

    fn into_parts(packed: Packed) -> Option<SocketParts> {
        packed.into_parts()
    }
}
