//! The client's connections: opened over a path, then used for bulk or for requests.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::Socket;

use super::target::{self, Order};
use crate::client::ask_proxy;

/// Bytes of a request and of its answer.
pub const REQUEST: usize = 100;
/// A read or a write that takes longer has failed: the path has stalled.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Way to open connections.
#[derive(Clone, Debug)]
pub enum Dial {
    /// connect(2) to this address.
    Tcp(SocketAddr),
    /// HTTP CONNECT over a Unix socket.
    Connect {
        /// The proxy.
        proxy: PathBuf,
        /// Requested destination.
        destination: SocketAddr,
    },
}

/// A connection to the target.
#[derive(Debug)]
pub struct Connection {
    /// The socket, blocking, with [`PATIENCE`].
    pub socket: Socket,
    /// Whether it is TCP on this side, where bytes can be received into nowhere.
    tcp: bool,
}

impl Dial {
    /// Opens a connection and sends `bytes`, the first of which are an order, unless that comes
    /// later.
    ///
    /// # Errors
    ///
    /// It can't be opened.
    pub fn open_with(&self, bytes: &[u8]) -> Result<Connection> {
        let (mut socket, tcp) = match self {
            Self::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, PATIENCE)
                    .with_context(|| format!("connect to {address}"))?;
                stream.set_nodelay(true)?;
                (Socket::from(stream), true)
            }
            Self::Connect { proxy, destination } => {
                let stream = UnixStream::connect(proxy)?;
                // A proxy that has stalled never answers.
                stream.set_read_timeout(Some(PATIENCE))?;
                ask_proxy(&stream, &destination.to_string())?;
                (Socket::from(stream), false)
            }
        };
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        socket.write_all(bytes)?;
        Ok(Connection { socket, tcp })
    }

    /// Opens a connection and has one byte echoed.
    ///
    /// # Errors
    ///
    /// It can't be opened, or another byte comes back.
    pub fn open_echo(&self) -> Result<Connection> {
        let mut bytes = Order::Echo.encode().to_vec();
        bytes.push(b'?');
        let mut connection = self.open_with(&bytes)?;
        let mut answer = [0];
        connection.socket.read_exact(&mut answer)?;
        if answer != *b"?" {
            bail!("{answer:?} came back for a question mark");
        }
        Ok(connection)
    }
}

impl Connection {
    /// Receives `bytes`, and nothing more.
    ///
    /// # Errors
    ///
    /// The socket's; an end too early.
    pub fn receive(&mut self, bytes: u64) -> Result<()> {
        let mut buffer = if self.tcp {
            Vec::new()
        } else {
            vec![0; 256 << 10]
        };
        let mut left = bytes;
        while left > 0 {
            let count = match self.tcp {
                true => target::throw_away(&self.socket, target::TURN),
                false => self.socket.read(&mut buffer),
            };
            match count.with_context(|| format!("with {left} of {bytes} bytes missing"))? {
                0 => bail!("the stream ended with {left} of {bytes} bytes missing"),
                count => left = left.saturating_sub(count as u64),
            }
        }
        Ok(())
    }

    /// Sends `bytes` from the file `zeros` and waits until the target has them.
    ///
    /// # Errors
    ///
    /// The socket's.
    pub fn send(&mut self, bytes: u64, zeros: &OwnedFd) -> Result<()> {
        let mut left = bytes;
        while left > 0 {
            let count = target::TURN.min(usize::try_from(left).unwrap_or(target::TURN));
            let sent = target::send_zeros(&self.socket, zeros, count);
            left -= sent.with_context(|| format!("with {left} of {bytes} bytes left"))? as u64;
        }
        self.socket.read_exact(&mut [0])?;
        Ok(())
    }

    /// Sends a request and reads its answer; how long that took.
    ///
    /// # Errors
    ///
    /// The socket's.
    pub fn ask(&mut self) -> io::Result<Duration> {
        let mut buffer = [b'?'; REQUEST];
        let start = Instant::now();
        self.socket.write_all(&buffer)?;
        self.socket.read_exact(&mut buffer)?;
        Ok(start.elapsed())
    }

    /// Asks again and again until `end`.
    ///
    /// # Errors
    ///
    /// The socket's.
    pub fn ask_until(&mut self, end: Instant) -> io::Result<Vec<Duration>> {
        let mut times = Vec::new();
        while Instant::now() < end {
            times.push(self.ask()?);
        }
        Ok(times)
    }
}
