//! Positions in the two directions of a TCP connection, as the kernel counts them. They need no help of the
//! process that used the socket, and outlive it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Maximum number of readings until two agree. Under load, nine were enough (Linux 6.18).
const READINGS: usize = 100;

/// Length of the beginning of `struct tcp_info` that is read, up to `tcpi_bytes_received` (Linux 4.1).
const INFO: usize = 136;

/// Offset of `tcpi_last_data_sent` in `struct tcp_info`.
const LAST_DATA_SENT: usize = 44;

/// Offset of `tcpi_last_data_recv` in `struct tcp_info`.
const LAST_DATA_RECEIVED: usize = 52;

/// Offset of `tcpi_bytes_acked` in `struct tcp_info`.
const BYTES_ACKED: usize = 120;

/// Offset of `tcpi_bytes_received` in `struct tcp_info`.
const BYTES_RECEIVED: usize = 128;

/// State of a connection (`include/net/tcp_states.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpState {
    /// Open in both directions.
    Established,
    /// Ended by this end alone.
    FinWait,
    /// Ended by the peer alone.
    CloseWait,
    /// Ended by both; the peer has not acknowledged the end of file of this end.
    Closing,
    /// Ended by both and acknowledged, or reset.
    Closed,
    /// Not established.
    Other,
}

impl TcpState {
    fn new(number: u8) -> Self {
        match number {
            1 => Self::Established,
            4 | 5 => Self::FinWait,
            7 => Self::Closed,
            8 => Self::CloseWait,
            9 | 11 => Self::Closing,
            _ => Self::Other,
        }
    }
}

/// A consistent reading of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// State.
    pub state: TcpState,
    /// Number of bytes that the kernel has received, with the end of file as one.
    received: u64,
    /// Number of bytes that the peer has acknowledged, with the end of file as one.
    acknowledged: u64,
    /// Number of received bytes that wait to be read.
    pub unread: u64,
    /// Number of written bytes that the peer has not acknowledged, with the end of file as one.
    unacknowledged: u64,
}

impl Position {
    /// Creates a position from what the kernel tells: numbers of bytes received and unread, acknowledged and
    /// unacknowledged.
    pub fn new(
        state: TcpState,
        (received, unread): (u64, u64),
        (acknowledged, unacknowledged): (u64, u64),
    ) -> Self {
        Self {
            state,
            received,
            acknowledged,
            unread,
            unacknowledged,
        }
    }

    /// Reads the position of a socket.
    ///
    /// # Errors
    /// The error of the system call; [`io::ErrorKind::WouldBlock`] if no two readings agree.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let mut before = info(socket)?;
        for _ in 0..READINGS {
            let (unread, unacknowledged) = (
                queue(socket, libc::FIONREAD)?,
                queue(socket, libc::TIOCOUTQ)?,
            );
            let after = info(socket)?;
            if before == after {
                let (state, acknowledged, received) = after;
                let state = TcpState::new(state);
                return Ok(Self::new(
                    state,
                    (received, unread),
                    (acknowledged, unacknowledged),
                ));
            }
            before = after;
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Whether this end has sent its end of file, and the connection is not closed.
    pub fn is_finished(&self) -> bool {
        matches!(self.state, TcpState::FinWait | TcpState::Closing)
    }

    /// Returns the number of bytes that were read and taken from the queue. Of a closed connection the end of file
    /// counts as a byte that was taken.
    pub fn consumed(&self) -> u64 {
        let end = u64::from(matches!(
            self.state,
            TcpState::CloseWait | TcpState::Closing
        ));
        self.received
            .saturating_sub(self.unread)
            .saturating_sub(end)
    }

    /// Returns the number of bytes that were written, and one more for a socket that has dialled. Of a closed
    /// connection the end of file counts too.
    pub fn written(&self) -> u64 {
        let end = u64::from(matches!(self.state, TcpState::FinWait | TcpState::Closing));
        (self.acknowledged + self.unacknowledged).saturating_sub(end)
    }
}

/// Returns the time since a byte was last received or sent, in milliseconds.
///
/// # Errors
/// The error of the system call.
pub fn idle_time(socket: BorrowedFd<'_>) -> io::Result<Duration> {
    let info = tcp_info(socket)?;
    let number = |at: usize| {
        let mut number = [0; 4];
        number.copy_from_slice(&info[at..at + 4]);
        u32::from_ne_bytes(number)
    };
    let idle = number(LAST_DATA_SENT).min(number(LAST_DATA_RECEIVED));
    Ok(Duration::from_millis(idle.into()))
}

/// Returns state, acknowledged and received bytes.
fn info(socket: BorrowedFd<'_>) -> io::Result<(u8, u64, u64)> {
    let info = tcp_info(socket)?;
    let number = |at: usize| {
        let mut number = [0; 8];
        number.copy_from_slice(&info[at..at + 8]);
        u64::from_ne_bytes(number)
    };
    Ok((info[0], number(BYTES_ACKED), number(BYTES_RECEIVED)))
}

/// Returns the beginning of `struct tcp_info` (`TCP_INFO`, tcp(7)).
fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<[u8; INFO]> {
    let mut bytes = [0_u8; INFO];
    let mut length = INFO as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `bytes`, and the length to `length`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            bytes.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    match done {
        0 => Ok(bytes),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the length of a queue of the socket (tcp(7)).
fn queue(socket: BorrowedFd<'_>, which: libc::Ioctl) -> io::Result<u64> {
    let mut length = MaybeUninit::<libc::c_int>::zeroed();
    // SAFETY: both requests write one int, to a place that lives through the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), which, length.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: any bytes are an int.
    let length = unsafe { length.assume_init() };
    Ok(u64::try_from(length).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::Instant;

    use super::*;

    /// Waits until the position of a socket is as it should be.
    fn wait(socket: &TcpStream, is_meant: impl Fn(&Position) -> bool) -> Position {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let position = Position::of(socket.as_fd()).unwrap();
            if is_meant(&position) {
                return position;
            }
            assert!(Instant::now() < end, "{position:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn positions_count_bytes_and_not_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(&[1; 1000]).unwrap();
        wait(&server, |it| it.unread == 1000);
        server.read_exact(&mut [0; 300]).unwrap();
        server.write_all(&[2; 50]).unwrap();
        let before = wait(&server, |it| it.unread == 700);
        assert_eq!((before.consumed(), before.written()), (300, 50));
        client.shutdown(Shutdown::Write).unwrap();
        let after = wait(&server, |it| it.state == TcpState::CloseWait);
        assert_eq!((after.consumed(), after.unread), (300, 700));
        assert!(!after.is_finished());
        // A socket that has dialled counts one byte more.
        let client_before = wait(&client, |it| it.state == TcpState::FinWait);
        assert_eq!(client_before.written(), 1001);
        assert!(client_before.is_finished());
        server.shutdown(Shutdown::Write).unwrap();
        let closed = wait(&server, |it| {
            matches!(it.state, TcpState::Closing | TcpState::Closed)
        });
        assert!(closed.written() >= 50);
    }

    #[test]
    fn a_connection_is_idle_since_its_last_byte() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let pause = Duration::from_millis(200);
        std::thread::sleep(pause);
        for socket in [&client, &server] {
            assert!(idle_time(socket.as_fd()).unwrap() >= pause / 2);
        }
        let began = Instant::now();
        client.write_all(b"?").unwrap();
        wait(&server, |it| it.unread == 1);
        for socket in [&client, &server] {
            let idle = idle_time(socket.as_fd()).unwrap();
            // The kernel counts in ticks.
            assert!(idle <= began.elapsed() + pause / 4, "{idle:?}");
        }
    }
}
