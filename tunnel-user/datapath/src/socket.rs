//! Local sockets: TCP, Unix, and TLS over TCP, with the one interface that the relay needs.
//!
//! Reads and writes take `&self`, so that both directions run in one task without a lock.

use std::cell::RefCell;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io::{self, BufRead, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use cpc_keeper::position::idle_time;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::ServerConnection;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;
use tunnel_proto::handover;

use super::kept::Keep;
use super::stream::Held;

/// Behaviour of a peer after its end of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerClose {
    /// The peer goes on reading.
    Half,
    /// The peer has closed, and reads no more.
    Full,
    /// TCP does not distinguish the two.
    Unknown,
}

/// A connected local socket, used by one task at a time.
pub trait LocalSocket {
    /// Waits for bytes; empty is the end of file. Holds no buffer while waiting. Cancelling loses
    /// nothing.
    fn read(&self) -> impl Future<Output = io::Result<Bytes>>;
    /// Writes as many bytes of `slices` as possible without waiting, and returns their number;
    /// `Ok(None)` when the call would block.
    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>>;
    /// Whether the kernel has all bytes that [`try_write`](Self::try_write) took. A TLS session
    /// holds records while the socket takes none.
    fn is_flushed(&self) -> bool {
        true
    }
    /// Waits until a write is possible and the kernel has all earlier bytes.
    fn writable(&self) -> impl Future<Output = io::Result<()>>;
    /// Ends the direction to the peer.
    fn finish(&self) -> impl Future<Output = io::Result<()>>;
    /// Waits until the peer has reset the connection, without reading.
    fn broken(&self) -> impl Future<Output = ()>;
    /// Waits as [`broken`](Self::broken) does, but never completes for a reset that follows the
    /// peer's end of file: earlier data can still be read then, and counts.
    fn broken_before_eof(&self) -> impl Future<Output = ()>;
    /// Returns the meaning of the peer's end of file.
    fn peer_close(&self) -> PeerClose {
        PeerClose::Unknown
    }
    /// Waits, after the peer's end of file, until the peer has closed, as far as the socket can
    /// tell that from a half-close.
    fn peer_closed(&self) -> impl Future<Output = ()> {
        self.broken()
    }
    /// Waits until the connection must end, in any state.
    fn cut(&self) -> impl Future<Output = ()> {
        std::future::pending()
    }
    /// Polls whether the peer has sent something since the last read, as far as the socket can tell that without a
    /// read.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let _ = cx;
        Poll::Pending
    }
    /// Returns the time since a byte was last received or sent, as far as the kernel tells.
    fn idle_time(&self) -> Option<Duration> {
        None
    }
    /// Sets whether closing sends a reset and discards unsent bytes (`SO_LINGER` of 0, socket(7)). A
    /// Unix socket has no reset.
    fn reset_on_close(&self, reset: bool);
    /// Discards unread input, where closing would otherwise spoil the bytes that the peer has yet to
    /// read.
    fn discard_input(&self) {}
    /// Discards what was read, where it stays in the kernel.
    fn discard_read(&self) {}
    /// Returns the number of bytes that the peer's kernel has not acknowledged (`SIOCOUTQ`, tcp(7)).
    fn unsent(&self) -> usize;
    /// Whether bytes that were read stay in the kernel.
    fn is_kept(&self) -> bool {
        false
    }
    /// Leaves in the kernel what the other end of a held session has not confirmed, and discards the rest. Gives
    /// a copy of the socket to `keeper` as soon as the session would then outlive this process. Does nothing for
    /// sockets that can't be kept. `untold` bytes of the tunnel are in the socket, of which `session` does not
    /// know yet.
    fn keep(&self, session: &Held, untold: u64, keeper: &impl Keep) {
        let _ = (session, untold, keeper);
    }
}

/// A socket that can move to another thread: it leaves one reactor and joins another. The move loses
/// nothing of the connection. A socket dropped in between is closed, by reset or not as it was set.
pub trait Portable: LocalSocket + Sized + 'static {
    /// The socket during its move.
    type Packed: Send + 'static;

    /// Leaves the current runtime.
    ///
    /// # Errors
    /// The error of the system call.
    fn pack(self) -> io::Result<Self::Packed>;

    /// Joins the current runtime.
    ///
    /// # Errors
    /// The error of the system call.
    fn unpack(packed: Self::Packed) -> io::Result<Self>;

    /// Takes a packed socket apart for another process. Returns `None`, and closes the socket, if this process
    /// has more of it than its descriptor and the bytes read ahead.
    fn into_parts(packed: Self::Packed) -> Option<SocketParts>;
}

/// A socket on its way to another process.
#[derive(Debug)]
pub struct SocketParts {
    /// Descriptor of the socket.
    pub descriptor: OwnedFd,
    /// Kind of the socket.
    pub kind: handover::socket::Kind,
    /// Bytes that were read from it ahead.
    pub ahead: Bytes,
}

impl Portable for TcpStream {
    type Packed = std::net::TcpStream;

    fn pack(self) -> io::Result<Self::Packed> {
        self.into_std()
    }

    fn unpack(packed: Self::Packed) -> io::Result<Self> {
        Self::from_std(packed)
    }

    fn into_parts(packed: Self::Packed) -> Option<SocketParts> {
        Some(SocketParts {
            descriptor: packed.into(),
            kind: handover::socket::Kind::Tcp,
            ahead: Bytes::new(),
        })
    }
}

impl Portable for UnixStream {
    type Packed = std::os::unix::net::UnixStream;

    fn pack(self) -> io::Result<Self::Packed> {
        self.into_std()
    }

    fn unpack(packed: Self::Packed) -> io::Result<Self> {
        Self::from_std(packed)
    }

    fn into_parts(packed: Self::Packed) -> Option<SocketParts> {
        Some(SocketParts {
            descriptor: packed.into(),
            kind: handover::socket::Kind::Unix,
            ahead: Bytes::new(),
        })
    }
}

/// Moves with its session, including unread and unsent data.
impl Portable for TlsSocket {
    type Packed = (std::net::TcpStream, Box<Secured>);

    fn pack(self) -> io::Result<Self::Packed> {
        Ok((self.tcp.into_std()?, self.secured))
    }

    fn unpack((tcp, secured): Self::Packed) -> io::Result<Self> {
        Ok(Self {
            tcp: TcpStream::from_std(tcp)?,
            secured,
        })
    }

    /// Returns `None`: the keys of the session stay in the process.
    fn into_parts(_packed: Self::Packed) -> Option<SocketParts> {
        None
    }
}

/// Sets whether a TCP socket resets when it is closed, which stays so until an orderly close is earned:
/// so a killed process resets too.
///
/// # Errors
/// The error of the system call.
fn reset_on_close(socket: &TcpStream, reset: bool) -> io::Result<()> {
    SockRef::from(socket).set_linger(reset.then_some(Duration::ZERO))
}

/// Prepares a TCP listener, whose accepted sockets inherit its options on Linux: they reset when they
/// are closed, send small writes at once, and detect a vanished peer.
///
/// Detection also works where a peer's reset was lost: the kernel ignores one that lies outside a
/// receive window of zero, as of a client that is killed while its target has stopped.
///
/// # Errors
/// The error of the system call.
pub fn prepare_listener(listener: &std::net::TcpListener) -> io::Result<()> {
    let socket = SockRef::from(listener);
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&keepalive())
}

/// Prepares a connected TCP socket in the same way.
///
/// # Errors
/// The error of the system call.
pub fn prepare(socket: &TcpStream) -> io::Result<()> {
    reset_on_close(socket, true)?;
    socket.set_nodelay(true)?;
    SockRef::from(socket).set_tcp_keepalive(&keepalive())
}

/// Returns the keepalive that detects a vanished peer after 30 s + 9 x 15 s, as in kube-apiserver.
fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(15))
        .with_retries(9)
}

pub(super) async fn error_ready<S>(ready: impl Future<Output = io::Result<S>>) {
    // An error here means that the reactor is gone, and then so is everything else.
    let _ = ready.await;
}

/// Takes the error of a broken socket: `EPIPE` when the peer had ended its half before (tcp_reset
/// in CLOSE_WAIT). A later read finds the end of file instead, so only a caller that gives the
/// socket up at any other error may use this.
pub(super) async fn unless_ended(error: io::Result<Option<io::Error>>) {
    match error {
        Ok(Some(error)) if error.kind() != io::ErrorKind::BrokenPipe => {}
        _ => std::future::pending().await,
    }
}

/// Whether one of `flags` (poll(2)) holds for a socket now.
fn polled(socket: &impl AsFd, flags: PollFlags) -> Option<bool> {
    let mut polled = [PollFd::new(socket.as_fd(), flags)];
    poll(&mut polled, PollTimeout::ZERO).ok()?;
    Some(polled[0].revents()?.intersects(flags))
}

pub(super) fn would_block(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(n) => Ok(Some(n)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) => Err(e),
    }
}

pub(super) fn unsent_bytes(fd: &impl AsRawFd) -> usize {
    let mut unsent: libc::c_int = 0;
    // SAFETY: TIOCOUTQ (the same as SIOCOUTQ) writes one int, to a place that lives through the call.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut unsent) };
    if done == 0 {
        usize::try_from(unsent).unwrap_or(0)
    } else {
        0
    }
}

/// Returns a future that waits for bytes of `$stream`, a socket of tokio's, and reads them with `$read`.
macro_rules! read_stream {
    ($stream:expr, $read:expr) => {
        std::future::poll_fn(move |cx| {
            loop {
                std::task::ready!($stream.poll_read_ready(cx))?;
                let mut last = None;
                let read = $crate::buffer::read_owned(|room| {
                    let read = $stream.try_io(tokio::io::Interest::READABLE, || {
                        let n = $read(&mut *room)?;
                        if n > 0 && n < room.len() {
                            // There was no more: what follows is news (epoll(7), edge-triggered), and
                            // another read would find nothing.
                            last = Some(n);
                            return Err(std::io::ErrorKind::WouldBlock.into());
                        }
                        Ok(n)
                    });
                    last.map_or(read, Ok)
                });
                match read {
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                    done => return std::task::Poll::Ready(done),
                }
            }
        })
    };
}
pub(super) use read_stream;

/// Defines the methods that TCP and Unix sockets share.
macro_rules! stream_socket {
    () => {
        fn read(&self) -> impl Future<Output = io::Result<Bytes>> {
            read_stream!(self, |room: &mut [u8]| (&*SockRef::from(self)).read(room))
        }

        fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
            would_block(match slices {
                // send(2), which is the cheaper call: a message is one slice, as a rule.
                [one] => self.try_write(one),
                several => self.try_write_vectored(several),
            })
        }

        async fn writable(&self) -> io::Result<()> {
            poll_fn(|cx| self.poll_write_ready(cx)).await
        }

        async fn finish(&self) -> io::Result<()> {
            SockRef::from(self).shutdown(std::net::Shutdown::Write)
        }

        async fn broken(&self) {
            error_ready(self.ready(Interest::ERROR)).await;
        }

        async fn broken_before_eof(&self) {
            self.broken().await;
            unless_ended(self.take_error()).await;
        }

        fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
            self.poll_read_ready(cx).map(drop)
        }

        fn unsent(&self) -> usize {
            unsent_bytes(self)
        }
    };
}

impl LocalSocket for TcpStream {
    fn idle_time(&self) -> Option<Duration> {
        idle_time(self.as_fd()).ok()
    }

    stream_socket!();

    fn reset_on_close(&self, reset: bool) {
        // Fails only on a socket that is broken already.
        let _ = reset_on_close(self, reset);
    }
}

impl LocalSocket for UnixStream {
    stream_socket!();

    /// Waits for `EPOLLHUP`: the kernel distinguishes a closed peer from one that has shut down its
    /// half (unix_poll).
    async fn peer_closed(&self) {
        // With a readiness of its own: clearing the stream's would stop its writers.
        let watched = self.as_fd().try_clone_to_owned();
        let Ok(watched) = watched.and_then(|fd| Self::from_std(fd.into())) else {
            return self.broken().await;
        };
        // An error here means that the reactor is gone, and then so is everything else.
        while let Ok(ready) = watched.ready(Interest::WRITABLE).await {
            if ready.is_write_closed() {
                break;
            }
            let blocks = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
            let _ = watched.try_io(Interest::WRITABLE, blocks);
        }
    }

    fn reset_on_close(&self, _reset: bool) {}

    /// Returns whether the peer has closed: the kernel shuts down both directions then
    /// (unix_release_sock).
    fn peer_close(&self) -> PeerClose {
        match polled(self, PollFlags::POLLHUP) {
            Some(true) => PeerClose::Full,
            Some(false) => PeerClose::Half,
            None => PeerClose::Unknown,
        }
    }

    /// Discards unread input. The peer of a Unix socket that is closed with unread bytes reads
    /// ECONNRESET in place of the end of file (unix_release_sock); TCP delivers the end of file that
    /// came before.
    fn discard_input(&self) {
        let socket = SockRef::from(self);
        // Without effect on a socket that is broken already.
        let _ = socket.shutdown(std::net::Shutdown::Read);
        let mut unwanted = [0; 4096];
        // Not by `try_read`: the reactor may not have seen yet that there is something.
        while (&*socket).read(&mut unwanted).is_ok_and(|n| n > 0) {}
    }
}

/// TLS over TCP, used from one task.
#[derive(Debug)]
pub struct TlsSocket {
    tcp: TcpStream,
    secured: Box<Secured>,
}

/// A TLS session over TCP, ready for the relay.
pub struct Secured {
    session: RefCell<ServerConnection>,
    cut: RefCell<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl fmt::Debug for Secured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.session.fmt(f)
    }
}

impl TlsSocket {
    /// Wraps an established session, which has to end when `cut` is ready.
    pub fn new(
        stream: TlsStream<TcpStream>,
        cut: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let (tcp, session) = stream.into_inner();
        let secured = Box::new(Secured {
            session: session.into(),
            cut: RefCell::new(Box::pin(cut)),
        });
        Self { tcp, secured }
    }

    /// Takes the data of whole records; `None` when the socket must be read first.
    fn take_plaintext(&self) -> io::Result<Option<Bytes>> {
        let mut session = self.secured.session.borrow_mut();
        let mut reader = session.reader();
        // A TCP end of file without close_notify is an error here: it may have been cut.
        match reader.fill_buf() {
            Ok(plain) => {
                let bytes = Bytes::copy_from_slice(plain);
                reader.consume(bytes.len());
                Ok(Some(bytes))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn take_records(&self) -> io::Result<()> {
        let mut session = self.secured.session.borrow_mut();
        match session.read_tls(&mut TryIo(&self.tcp)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            done => done?,
        };
        session.process_new_packets().map_err(io::Error::other)?;
        Ok(())
    }

    /// Sends the ready records; `false` when the socket takes no more for now.
    fn flush(&self) -> io::Result<bool> {
        let mut session = self.secured.session.borrow_mut();
        while session.wants_write() {
            match session.write_tls(&mut TryIo(&self.tcp)) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                done => done?,
            };
        }
        Ok(true)
    }
}

impl LocalSocket for TlsSocket {
    async fn read(&self) -> io::Result<Bytes> {
        loop {
            if let Some(bytes) = self.take_plaintext()? {
                return Ok(bytes);
            }
            poll_fn(|cx| self.tcp.poll_read_ready(cx)).await?;
            self.take_records()?;
            // Answers to the session's own messages, such as key updates. An error here is the
            // writer's to see: what the peer sent before it is still there to be read.
            let _ = self.flush();
        }
    }

    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let taken = self
            .secured
            .session
            .borrow_mut()
            .writer()
            .write_vectored(slices)?;
        self.flush()?;
        // rustls takes nothing while its own buffer is full.
        Ok((taken > 0).then_some(taken))
    }

    fn is_flushed(&self) -> bool {
        !self.secured.session.borrow().wants_write()
    }

    async fn writable(&self) -> io::Result<()> {
        while !self.flush()? {
            poll_fn(|cx| self.tcp.poll_write_ready(cx)).await?;
        }
        Ok(())
    }

    /// Returns a half-close: a peer that ends its half alone sends close_notify and keeps TCP open.
    fn peer_close(&self) -> PeerClose {
        match polled(&self.tcp, PollFlags::from_bits_retain(libc::POLLRDHUP)) {
            Some(true) => PeerClose::Full,
            _ => PeerClose::Unknown,
        }
    }

    async fn finish(&self) -> io::Result<()> {
        self.secured.session.borrow_mut().send_close_notify();
        self.writable().await?;
        LocalSocket::finish(&self.tcp).await
    }

    async fn broken(&self) {
        self.tcp.broken().await;
    }

    async fn broken_before_eof(&self) {
        self.tcp.broken_before_eof().await;
    }

    fn cut(&self) -> impl Future<Output = ()> {
        poll_fn(|cx| self.secured.cut.borrow_mut().as_mut().poll(cx))
    }

    fn reset_on_close(&self, reset: bool) {
        self.tcp.reset_on_close(reset);
    }

    fn unsent(&self) -> usize {
        self.tcp.unsent()
    }
}

/// Adapter that lets rustls use a socket that may block.
struct TryIo<'a>(&'a TcpStream);

impl Read for TryIo<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buf)
    }
}

impl Write for TryIo<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.try_write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
