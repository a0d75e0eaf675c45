//! A client of the [targets](crate::target), which checks every byte and measures.
//!
//! The functions take a connected stream, so that the same measurement runs over a direct
//! connection, over the redirect and through HTTP CONNECT.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::pattern::{self, Checker};

const CHUNK: usize = 64 * 1024;

/// Moved bytes, and their time.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Bytes of payload.
    pub bytes: u64,
    /// Time from the first byte of the request to the last byte of the answer.
    pub elapsed: Duration,
}

impl Transfer {
    /// Megabytes (10^6 bytes) a second.
    pub fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.elapsed.as_secs_f64()
    }
}

/// Fetches `bytes` from a [source](crate::target::Behaviour::Source) and compares each of them.
///
/// # Errors
///
/// A failed read or write, a byte that is not the pattern's, or an end too early or too late.
pub fn download(mut stream: impl Read + Write, bytes: u64) -> Result<Transfer> {
    let start = Instant::now();
    stream.write_all(format!("{bytes}\n").as_bytes())?;
    let received = receive(stream)?;
    if received != bytes {
        bail!("the stream ended after {received} of {bytes} bytes");
    }
    Ok(Transfer {
        bytes,
        elapsed: start.elapsed(),
    })
}

/// Sends `bytes` of the pattern to a [sink](crate::target::Behaviour::Sink), ends its half with
/// `finish`, and compares the checksum in the answer.
///
/// # Errors
///
/// A failed read or write, or a sink that received something else.
pub fn upload<S: Read + Write>(
    mut stream: S,
    bytes: u64,
    finish: impl FnOnce(&S) -> io::Result<()>,
) -> Result<Transfer> {
    let start = Instant::now();
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; CHUNK];
    let mut sent = 0;
    while sent < bytes {
        let count = CHUNK.min(usize::try_from(bytes - sent).unwrap_or(CHUNK));
        pattern::fill(sent, &mut buffer[..count]);
        hasher.update(&buffer[..count]);
        stream
            .write_all(&buffer[..count])
            .with_context(|| format!("after {sent} bytes"))?;
        sent += count as u64;
    }
    finish(&stream)?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .context("the sink's answer")?;
    let expected = format!("{bytes} {:08x}\n", hasher.finalize());
    if answer != expected {
        bail!(
            "the sink received {:?}, sent was {:?}",
            answer.trim(),
            expected.trim()
        );
    }
    Ok(Transfer {
        bytes,
        elapsed: start.elapsed(),
    })
}

/// Sends one byte to an [echo](crate::target::Behaviour::Echo) and waits for it, `count` times.
///
/// # Errors
///
/// A failed read or write, or another byte than the one that was sent.
pub fn round_trips(mut stream: impl Read + Write, count: usize) -> Result<Vec<Duration>> {
    (0..count)
        .map(|round| {
            let sent = [round as u8];
            let mut received = [0];
            let start = Instant::now();
            stream.write_all(&sent)?;
            stream.read_exact(&mut received)?;
            if received != sent {
                bail!("round {round}: {received:?} came back for {sent:?}");
            }
            Ok(start.elapsed())
        })
        .collect()
}

/// Returns the median of `samples`; zero when there are none.
pub fn median(samples: &mut [Duration]) -> Duration {
    samples.sort_unstable();
    samples.get(samples.len() / 2).copied().unwrap_or_default()
}

/// Opens a connection to `destination` (`host:port`) through an HTTP CONNECT proxy that listens
/// on a Unix socket.
///
/// # Errors
///
/// The socket can't be reached, or the answer is not 200; the error holds the answer's first line.
pub fn connect_through(proxy: &Path, destination: &str) -> Result<UnixStream> {
    let stream = UnixStream::connect(proxy)
        .with_context(|| format!("cannot reach the proxy at {}", proxy.display()))?;
    ask_proxy(&stream, destination)?;
    Ok(stream)
}

/// Requests `destination` (`host:port`) of the HTTP CONNECT proxy behind `stream`; all later bytes
/// are those of the destination.
///
/// # Errors
///
/// The answer is not 200; the error holds its first line.
pub fn ask_proxy(mut stream: &UnixStream, destination: &str) -> Result<()> {
    stream.write_all(
        format!("CONNECT {destination} HTTP/1.1\r\nHost: {destination}\r\n\r\n").as_bytes(),
    )?;
    // One byte at a time: what follows the head belongs to the tunnel.
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == 8192 {
            bail!("the proxy's answer has no end");
        }
        stream.read_exact(&mut byte).context("the proxy's answer")?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head);
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        bail!("the proxy answered: {status}");
    }
    Ok(())
}

/// Writes the first `bytes` of the [`pattern`].
///
/// # Errors
///
/// A failed write, and how much was written before.
pub fn send(mut stream: impl Write, bytes: u64) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut sent = 0;
    while sent < bytes {
        let count = CHUNK.min(usize::try_from(bytes - sent).unwrap_or(CHUNK));
        pattern::fill(sent, &mut buffer[..count]);
        stream
            .write_all(&buffer[..count])
            .with_context(|| format!("after {sent} bytes"))?;
        sent += count as u64;
    }
    Ok(())
}

/// Reads the [`pattern`] to its end and gives its length.
///
/// # Errors
///
/// A failed read, or a byte that is not the pattern's.
pub fn receive(mut stream: impl Read) -> Result<u64> {
    let mut checker = Checker::default();
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = stream
            .read(&mut buffer)
            .with_context(|| format!("after {} bytes", checker.position()))?;
        if count == 0 {
            return Ok(checker.position());
        }
        checker.update(&buffer[..count])?;
    }
}

/// Asks `check` every 20 ms until it gives an answer, for at most `limit`.
///
/// # Errors
///
/// The last error of `check` when the time is over.
pub fn eventually<T>(limit: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("still so after {limit:?}")));
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}
