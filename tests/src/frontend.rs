//! The ways into the tunnel as a client sees them, so that one test body runs over each.
//!
//! A connection is a [`Socket`], whatever it is made of: it can be read, written, half-closed,
//! reset and given time limits.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::Socket;

use crate::client;
use crate::lab::Lab;

/// Timeout of a read or a write: far beyond the time on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Way into the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frontend {
    /// An ordinary connect(2) of the API server's.
    Redirect,
    /// HTTP CONNECT on the first server's Unix socket.
    Connect,
}

/// Opens a connection to a destination beyond the tunnel.
pub type Dial<'a> = dyn Fn(SocketAddr) -> Result<Socket> + Sync + 'a;

impl Frontend {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Redirect, Self::Connect];

    /// Runs `work` where it can dial. The connections stay usable afterwards, anywhere.
    ///
    /// # Errors
    ///
    /// Those of `work`; the API server's place can't be entered.
    pub fn through<T: Send>(
        self,
        lab: &Lab,
        work: impl FnOnce(&Dial<'_>) -> Result<T> + Send,
    ) -> Result<T> {
        let cp = &lab.control_plane;
        match self {
            Self::Redirect => cp.as_apiserver(|| {
                work(&|destination| {
                    let stream = std::net::TcpStream::connect(destination)
                        .with_context(|| format!("connect to {destination}"))?;
                    patient(stream.into())
                })
            }),
            Self::Connect => {
                let server = cp.servers.first().context("there is no server")?;
                let proxy = &server.sockets.connect_unix;
                work(&|destination| {
                    let stream = client::connect_through(proxy, &destination.to_string())?;
                    patient(stream.into())
                })
            }
        }
    }

    /// Opens one connection.
    ///
    /// # Errors
    ///
    /// As [`Self::through`].
    pub fn dial(self, lab: &Lab, destination: SocketAddr) -> Result<Socket> {
        self.through(lab, |dial| dial(destination))
            .with_context(|| format!("{self:?}"))
    }
}

/// Gives `socket` the time limits of a test.
///
/// # Errors
///
/// The kernel's.
pub fn patient(socket: Socket) -> Result<Socket> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Closes a TCP connection with a reset, which discards unsent bytes.
///
/// # Errors
///
/// The kernel's.
pub fn reset(socket: Socket) -> Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    Ok(())
}

/// Bytes that the peer's kernel has not acknowledged (`SIOCOUTQ`, tcp(7)).
pub fn unacknowledged(socket: &Socket) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ writes one int, to a place that lives through the call.
    unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    usize::try_from(bytes).unwrap_or(0)
}
