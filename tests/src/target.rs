//! The plain servers on a worker: each port behaves in one way that a tunnel must carry.
//!
//! A thread a connection, blocking sockets, no dependency: what they do must be beyond doubt.
//! Each accepted connection is one line on standard output, `NAME PEER`, so that a test can count
//! how often a request was made.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};

use crate::pattern;

/// First bytes of a connection to [`Behaviour::Banner`].
pub const BANNER: &str = "220 ready\n";

/// Bytes moved at a time.
const CHUNK: usize = 64 * 1024;

/// Behaviour of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Sends back received bytes, then ends when the peer ends.
    Echo,
    /// Reads a number and a line feed, sends that many bytes of [`pattern`], and ends.
    Source,
    /// Reads to the end, then answers `BYTES CRC32\n` (decimal, eight hex digits).
    Sink,
    /// Sends [`BANNER`] before it has received anything, then behaves as [`Self::Echo`].
    Banner,
    /// Accepts and never reads.
    Stuck,
    /// Resets the connection when the first byte arrives.
    Reset,
    /// Answers `BYTES bytes\n` only after the peer has ended its half.
    HalfClose,
}

impl Behaviour {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Echo,
        Self::Source,
        Self::Sink,
        Self::Banner,
        Self::Stuck,
        Self::Reset,
        Self::HalfClose,
    ];

    /// Returns its port, TCP, both families.
    pub fn port(self) -> u16 {
        match self {
            Self::Echo => 7001,
            Self::Source => 7002,
            Self::Sink => 7003,
            Self::Banner => 7004,
            Self::Stuck => 7005,
            Self::Reset => 7006,
            Self::HalfClose => 7007,
        }
    }

    /// Returns its name in JSON and in the log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Echo => "echo",
            Self::Source => "source",
            Self::Sink => "sink",
            Self::Banner => "banner",
            Self::Stuck => "stuck",
            Self::Reset => "reset",
            Self::HalfClose => "half-close",
        }
    }

    fn serve(self, stream: TcpStream) -> io::Result<()> {
        match self {
            Self::Echo => echo(stream),
            Self::Source => source(stream),
            Self::Sink => sink(stream),
            Self::Banner => {
                (&stream).write_all(BANNER.as_bytes())?;
                echo(stream)
            }
            Self::Stuck => {
                thread::park();
                drop(stream);
                Ok(())
            }
            Self::Reset => reset(stream),
            Self::HalfClose => half_close(stream),
        }
    }
}

/// Serves every [`Behaviour`] until the process is ended, on `address` or, without one, on every
/// address of this network namespace.
///
/// # Errors
///
/// A port that can't be listened on.
pub fn serve_all(address: Option<IpAddr>) -> io::Result<()> {
    let listeners = Behaviour::ALL
        .into_iter()
        .map(|behaviour| Ok((behaviour, listener(address, behaviour.port())?)))
        .collect::<io::Result<Vec<_>>>()?;
    thread::scope(|scope| {
        for (behaviour, listener) in &listeners {
            scope.spawn(move || accept(*behaviour, listener));
        }
    });
    Ok(())
}

fn listener(address: Option<IpAddr>, port: u16) -> io::Result<TcpListener> {
    let listener = match address {
        Some(address) => TcpListener::bind((address, port)),
        // The IPv6 socket takes IPv4 as well; a kernel may be without IPv6.
        None => TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))),
    }?;
    // The standard library's 128 would turn a burst into retransmitted SYNs.
    listen(&listener, Backlog::MAXALLOWABLE)?;
    Ok(listener)
}

fn accept(behaviour: Behaviour, listener: &TcpListener) {
    loop {
        let Ok((stream, peer)) = listener.accept() else {
            // Out of descriptors: what is open must end first.
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        println!(
            "{} {}",
            behaviour.name(),
            SocketAddr::new(peer.ip().to_canonical(), peer.port())
        );
        let served = thread::Builder::new()
            .stack_size(256 * 1024)
            .spawn(move || {
                // A peer that goes away is what many tests are about.
                let _ = stream
                    .set_nodelay(true)
                    .and_then(|()| behaviour.serve(stream));
            });
        if let Err(error) = served {
            eprintln!("{}: no thread for {peer}: {error}", behaviour.name());
        }
    }
}

fn echo(stream: TcpStream) -> io::Result<()> {
    for_each(&stream, |bytes| (&stream).write_all(bytes))?;
    stream.shutdown(Shutdown::Write)
}

fn source(stream: TcpStream) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new((&stream).take(32)).read_line(&mut line)?;
    let total: u64 = line
        .trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    let mut buffer = vec![0; CHUNK];
    let mut sent = 0;
    while sent < total {
        let count = CHUNK.min(usize::try_from(total - sent).unwrap_or(CHUNK));
        pattern::fill(sent, &mut buffer[..count]);
        (&stream).write_all(&buffer[..count])?;
        sent += count as u64;
    }
    stream.shutdown(Shutdown::Write)
}

fn sink(stream: TcpStream) -> io::Result<()> {
    let mut hasher = crc32fast::Hasher::new();
    let mut total = 0;
    for_each(&stream, |bytes| {
        hasher.update(bytes);
        total += bytes.len();
        Ok(())
    })?;
    (&stream).write_all(format!("{total} {:08x}\n", hasher.finalize()).as_bytes())
}

fn half_close(stream: TcpStream) -> io::Result<()> {
    let mut total = 0;
    for_each(&stream, |bytes| {
        total += bytes.len();
        Ok(())
    })?;
    (&stream).write_all(format!("{total} bytes\n").as_bytes())
}

fn reset(stream: TcpStream) -> io::Result<()> {
    (&stream).read_exact(&mut [0])?;
    setsockopt(
        &stream,
        sockopt::Linger,
        &libc::linger {
            l_onoff: 1,
            l_linger: 0,
        },
    )?;
    Ok(())
}

/// Reads to the end of the stream.
fn for_each(
    mut stream: &TcpStream,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => each(&buffer[..count])?,
        }
    }
}
