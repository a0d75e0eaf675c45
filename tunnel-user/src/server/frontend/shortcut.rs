//! A redirected client's socket whose bytes may come past TCP (`redirect::Shortcuts`).

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::net::TcpStream;

use crate::datapath::LocalSocket;
use crate::datapath::socket::{Portable, received};
use crate::redirect::{RedirectError, Shortcut, Shortcuts};

/// As its [`TcpStream`], but that what is read is told to the kernel, and that an end of file is
/// checked.
pub(super) struct ShortcutSocket {
    open: Open,
    tcp: TcpStream,
    read: Cell<u64>,
}

/// A shortcut that is closed with its socket.
struct Open {
    shortcuts: Arc<Mutex<Shortcuts>>,
    shortcut: Shortcut,
}

impl Open {
    fn shortcuts(&self) -> MutexGuard<'_, Shortcuts> {
        lock(&self.shortcuts)
    }
}

/// They are as they were, should a thread have panicked with them.
fn lock(shortcuts: &Mutex<Shortcuts>) -> MutexGuard<'_, Shortcuts> {
    shortcuts.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ShortcutSocket {
    /// Opens the shortcut to an accepted socket; gives the socket back where that fails.
    pub(super) fn open(
        tcp: TcpStream,
        client: SocketAddr,
        shortcuts: &Arc<Mutex<Shortcuts>>,
    ) -> Result<Self, (TcpStream, RedirectError)> {
        let Ok(listener) = tcp.local_addr() else {
            return Err((tcp, RedirectError::NotAttached(client.to_string())));
        };
        let opened = lock(shortcuts).open_to(&tcp, client, listener);
        match opened {
            Ok(shortcut) => Ok(Self {
                tcp,
                open: Open {
                    shortcuts: shortcuts.clone(),
                    shortcut,
                },
                read: Cell::new(0),
            }),
            Err(error) => Err((tcp, error)),
        }
    }

    fn tell(&self, n: usize) {
        let read = self.read.get() + n as u64;
        self.read.set(read);
        let told = self.open.shortcuts().has_read(self.open.shortcut, read);
        // Untold, the client seems to wait for us, and its bytes take TCP's way.
        if let Err(error) = told {
            tracing::debug!(%error, "the kernel was not told what has been read");
        }
    }

    /// Kernels before 5.15.3 throw away what waits at the shortcut's end when TCP is through with the
    /// connection, and then say end of file. An end that lost something is no orderly one.
    fn check_end(&self) -> io::Result<()> {
        let taken = self.open.shortcuts().taken(self.open.shortcut);
        let taken = taken.map_err(io::Error::other)?;
        let read = self.read.get();
        // TCP counts the end of file too.
        if read + 1 == taken + received(&self.tcp)? {
            return Ok(());
        }
        tracing::warn!(
            read,
            taken,
            "a client's last bytes were lost on the shortcut; its connection is reset"
        );
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shortcuts().close(self.shortcut);
    }
}

/// With its shortcut, and what was read of it.
impl Portable for ShortcutSocket {
    type Packed = Packed;

    fn pack(self) -> io::Result<Packed> {
        Ok(Packed {
            tcp: self.tcp.into_std()?,
            open: self.open,
            read: self.read.get(),
        })
    }

    fn unpack(packed: Packed) -> io::Result<Self> {
        Ok(Self {
            tcp: TcpStream::from_std(packed.tcp)?,
            open: packed.open,
            read: Cell::new(packed.read),
        })
    }
}

/// A [`ShortcutSocket`] on its way to another shard.
pub(super) struct Packed {
    open: Open,
    tcp: std::net::TcpStream,
    read: u64,
}

impl LocalSocket for ShortcutSocket {
    async fn read(&self) -> io::Result<Bytes> {
        let bytes = LocalSocket::read(&self.tcp).await?;
        if bytes.is_empty() {
            self.check_end()?;
        } else {
            self.tell(bytes.len());
        }
        Ok(bytes)
    }

    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        LocalSocket::try_write(&self.tcp, slices)
    }

    async fn writable(&self) -> io::Result<()> {
        LocalSocket::writable(&self.tcp).await
    }

    async fn finish(&self) -> io::Result<()> {
        self.tcp.finish().await
    }

    async fn broken(&self) {
        self.tcp.broken().await;
    }

    async fn revoked(&self) {
        self.tcp.revoked().await;
    }

    fn reset_on_close(&self, reset: bool) {
        self.tcp.reset_on_close(reset);
    }

    fn unsent(&self) -> usize {
        self.tcp.unsent()
    }
}
