//! Reads of a TCP socket that leave the bytes in the kernel.
//!
//! With `SO_PEEK_OFF` (Linux 6.10 for IPv4, 6.12 for IPv6) the kernel knows how far the queue was read. Earlier kernels
//! begin each read with `MSG_PEEK` at the start of the queue: there what was read before is copied once more, to a
//! buffer that is not used, in front of what is new.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use cpc_keeper::Position;
use cpc_keeper::position::TcpState;
use nix::sys::socket::{MsgFlags, recv};
use socket2::{Domain, SockRef, Socket, Type};

/// Size of the buffer for bytes that were read before. The kernel fills it several times in one read.
const SCRATCH: usize = 64 << 10;

/// Number of bytes that were read before, from which on there is no further read: copies would cost more than the rest.
pub(crate) const MOST_AGAIN: u64 = 1 << 20;

/// Maximum number of pieces of a read: the bytes that were read before, and the new ones.
const PIECES: usize = MOST_AGAIN as usize / SCRATCH + 1;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Way to read what follows the bytes that were read before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peeking {
    /// The kernel knows the offset (`SO_PEEK_OFF`).
    Offset,
    /// Reads begin at the start of the queue.
    Again,
}

impl Peeking {
    /// Prepares a socket, of which `peeked` bytes at the start of the queue were read.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn begin(socket: BorrowedFd<'_>, peeked: u64) -> io::Result<Self> {
        // Otherwise a byte of urgent data is peeked twice.
        SockRef::from(&socket).set_out_of_band_inline(true)?;
        let offset = i32::try_from(peeked).map_err(io::Error::other)?;
        let is_set = set(socket, libc::SO_PEEK_OFF, offset).is_ok();
        Ok(if is_set { Self::Offset } else { Self::Again })
    }

    /// Reads what follows the `peeked` bytes that were read before. Returns `None` if these must be taken first.
    ///
    /// # Errors
    /// The error of the system call; [`io::ErrorKind::WouldBlock`] if there is nothing.
    pub(crate) fn read(
        self,
        socket: BorrowedFd<'_>,
        peeked: u64,
        room: &mut [u8],
    ) -> io::Result<Option<usize>> {
        match self {
            Self::Again if peeked > 0 => read_behind(socket, peeked, room),
            _ => Ok(Some(recv(socket.as_raw_fd(), room, MsgFlags::MSG_PEEK)?)),
        }
    }

    /// Ends the preparation of a socket of whose queue nothing is read that is still there.
    pub(crate) fn end(self, socket: BorrowedFd<'_>) {
        if self == Self::Offset {
            // The kernel knows the option: it was set before.
            let _ = set(socket, libc::SO_PEEK_OFF, -1);
        }
    }
}

/// Copies the first `length` bytes of the queue of a socket, which has them.
///
/// # Errors
/// The error of the system call.
pub fn copy(socket: BorrowedFd<'_>, length: u64) -> io::Result<Vec<u8>> {
    // An offset of zero moves along with the reads; without the option there is none.
    let moves = set(socket, libc::SO_PEEK_OFF, 0).is_ok();
    let mut queue = vec![0; usize::try_from(length).unwrap_or(0)];
    let mut done = 0;
    while done < queue.len() {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let from = if moves { done } else { 0 };
        match from + recv(socket.as_raw_fd(), &mut queue[from..], flags)? {
            // A read from the start ends before urgent data.
            n if n <= done => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done = n,
        }
    }
    Ok(queue)
}

/// Reads the queue from its start, and returns the number of bytes behind the first `peeked` ones, in `room`.
/// Returns `None` where a read from the start does not reach them: the kernel ends it before urgent data.
fn read_behind(socket: BorrowedFd<'_>, peeked: u64, room: &mut [u8]) -> io::Result<Option<usize>> {
    // The second read finds what has come since the first one.
    for _ in 0..2 {
        let n = BUFFER.with_borrow_mut(|scratch| {
            scratch.resize(SCRATCH, 0);
            read_pieces(socket, (scratch, peeked), room)
        })?;
        match usize::try_from((n as u64).saturating_sub(peeked)) {
            Ok(0) | Err(_) => {}
            Ok(n) => return Ok(Some(n)),
        }
        // An end of file, and an error, show once the queue is empty.
        if let Some(error) = SockRef::from(&socket).take_error()? {
            return Err(error);
        }
        let position = Position::of(socket)?;
        if position.unread <= peeked {
            return match position.state {
                TcpState::CloseWait | TcpState::Closing | TcpState::Closed => Ok(Some(0)),
                _ => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
    }
    Ok(None)
}

/// Reads `peeked` bytes to `scratch`, over and over, and what follows to `room`. Returns the number of all bytes.
fn read_pieces(
    socket: BorrowedFd<'_>,
    (scratch, peeked): (&mut [u8], u64),
    room: &mut [u8],
) -> io::Result<usize> {
    let mut left = usize::try_from(peeked.min(MOST_AGAIN)).unwrap_or(0);
    let nothing = libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    };
    let mut pieces = [nothing; PIECES];
    let mut count = 0;
    while left > 0 {
        let length = left.min(scratch.len());
        pieces[count] = libc::iovec {
            iov_base: scratch.as_mut_ptr().cast(),
            iov_len: length,
        };
        left -= length;
        count += 1;
    }
    pieces[count] = libc::iovec {
        iov_base: room.as_mut_ptr().cast(),
        iov_len: room.len(),
    };
    // SAFETY: all zeros is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = (count + 1) as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the pieces are memory of `scratch` and `room`, which live through the call, and whose bytes are only
    // read after it.
    let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Returns the way for sockets over IPv4, and over IPv6: the kernel is asked, since versions say little.
pub fn probe() -> (Peeking, Peeking) {
    let way = |domain| {
        let socket = Socket::new(domain, Type::STREAM, None);
        let way = socket.and_then(|socket| Peeking::begin(socket.as_fd(), 0));
        way.unwrap_or(Peeking::Again)
    };
    (way(Domain::IPV4), way(Domain::IPV6))
}

/// Sets a socket option of level `SOL_SOCKET` (socket(7)).
///
/// # Errors
/// The error of the system call.
pub(crate) fn set(
    socket: BorrowedFd<'_>,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the kernel reads one int, which lives through the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    const WAYS: [Peeking; 2] = [Peeking::Offset, Peeking::Again];

    fn pair(way: Peeking) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        far.set_nonblocking(true).unwrap();
        // Nothing is taken from the queue: all must fit.
        SockRef::from(&far).set_recv_buffer_size(1 << 20).unwrap();
        // A kernel without the option has one way.
        if Peeking::begin(far.as_fd(), 0).unwrap() != way {
            set(far.as_fd(), libc::SO_PEEK_OFF, -1).unwrap_or_default();
        }
        (near, far)
    }

    /// Reads until nothing is there, or the end.
    fn read_all(way: Peeking, socket: &TcpStream, peeked: &mut u64, to: &mut Vec<u8>) -> bool {
        let mut room = vec![0; 100_000];
        for _ in 0..200 {
            match way.read(socket.as_fd(), *peeked, &mut room) {
                Ok(None) => panic!("no read reaches what follows"),
                Ok(Some(0)) => return true,
                Ok(Some(n)) => {
                    to.extend_from_slice(&room[..n]);
                    *peeked += n as u64;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        }
        false
    }

    #[test]
    fn bytes_and_the_end_are_read_once_and_stay() {
        for way in WAYS {
            if probe().0 == Peeking::Again && way == Peeking::Offset {
                continue;
            }
            let (mut near, far) = pair(way);
            let sent: Vec<u8> = (0..600_000_u32).map(|n| (n % 251) as u8).collect();
            let (mut peeked, mut read) = (0, Vec::new());
            let (first, rest) = sent.split_at(70_001);
            near.write_all(first).unwrap();
            assert!(!read_all(way, &far, &mut peeked, &mut read));
            near.write_all(&rest[..100_000]).unwrap();
            assert!(!read_all(way, &far, &mut peeked, &mut read));
            near.write_all(&rest[100_000..101_000]).unwrap();
            near.shutdown(Shutdown::Write).unwrap();
            assert!(read_all(way, &far, &mut peeked, &mut read), "{way:?}");
            assert_eq!(read, sent[..171_001], "{way:?}");
            assert_eq!(copy(far.as_fd(), peeked).unwrap(), read, "{way:?}");
        }
    }

    /// The kernel ends a read before urgent data, and does not say so.
    #[test]
    fn urgent_data_is_reached_once_the_rest_is_taken() {
        let way = Peeking::Again;
        let (mut near, far) = pair(way);
        near.write_all(b"some").unwrap();
        let (mut peeked, mut read) = (0, Vec::new());
        assert!(!read_all(way, &far, &mut peeked, &mut read));
        SockRef::from(&near).send_out_of_band(b"!").unwrap();
        near.write_all(b"more").unwrap();
        while Position::of(far.as_fd()).unwrap().unread < 9 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut room = [0; 100];
        assert_eq!(way.read(far.as_fd(), peeked, &mut room).unwrap(), None);
        assert_eq!((&far).read(&mut room[..4]).unwrap(), 4);
        let mut rest = Vec::new();
        assert!(!read_all(way, &far, &mut 0, &mut rest));
        assert_eq!(rest, b"!more");
    }

    #[test]
    fn a_reset_is_no_end() {
        let way = Peeking::Again;
        let (mut near, far) = pair(way);
        near.write_all(b"some").unwrap();
        let (mut peeked, mut read) = (0, Vec::new());
        assert!(!read_all(way, &far, &mut peeked, &mut read));
        assert_eq!(read, b"some");
        SockRef::from(&near)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(near);
        let failed = std::iter::repeat_with(|| {
            std::thread::sleep(Duration::from_millis(1));
            way.read(far.as_fd(), peeked, &mut [0; 10]).unwrap_err()
        });
        let mut failed = failed.take(1000).map(|error| error.kind());
        let kind = failed.find(|kind| *kind != ErrorKind::WouldBlock);
        assert_eq!(kind, Some(ErrorKind::ConnectionReset));
    }
}
