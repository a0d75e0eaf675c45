//! A client of the frontends that requests forbidden destinations.

use std::io::{Error, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::{Aim, WHILE};

/// Destinations that are forbidden to the agent, of no agent, no addresses at all, loopback in
/// every spelling, addresses of a host itself, and other protocols than TCP.
const DESTINATIONS: [&str; 22] = [
    "10.99.1.2:8136",
    "10.99.1.2:8199",
    "10.99.1.2:0",
    "10.99.1.1:53",
    "10.99.9.9:10250",
    "192.0.2.1:8135",
    "127.0.0.1:8099",
    "127.1:8099",
    "0.0.0.0:8099",
    "[::1]:8099",
    "[::ffff:127.0.0.1]:8099",
    "[::]:8099",
    "localhost:8099",
    "169.254.169.254:80",
    "[fe80::1]:80",
    "224.0.0.1:80",
    "255.255.255.255:80",
    "no-such-name.invalid:443",
    "metadata.google.internal:80",
    "a..b:80",
    "unix:%2Frun%2Fcpc.sock",
    "10.99.1.2:99999",
];
/// Rounds over all of them.
const ROUNDS: usize = 40;
/// Timeout of an answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// A target of which each round gives some up.
const ABANDONED: &str = "10.99.1.2:7001";

/// Sends the requests. `FOLDER` is the Unix socket of HTTP CONNECT. Also connects to captured
/// addresses.
pub(crate) fn frontend(aim: &Aim) -> Result<()> {
    let socket = aim.rest.first().context("which socket?")?;
    let begun = Instant::now();
    for _ in 0..ROUNDS {
        for destination in DESTINATIONS {
            if begun.elapsed() > WHILE {
                return Ok(());
            }
            aim.tally.one("requests");
            let status = ask(socket, destination);
            let established = status.as_ref().is_ok_and(|status| status == "200");
            aim.tally.add("connected", u64::from(established));
            aim.tally.one(match &status {
                Ok(status) => format!("answered {status}"),
                Err(_) => "no answer".to_owned(),
            });
            let address = destination.parse::<SocketAddr>();
            if let Some(address) = address.ok().filter(|it| captured(*it)) {
                aim.tally.one("connects");
                // One to a target that refuses is known by its reset: the redirect accepts first.
                let mut byte = [0];
                let reached =
                    TcpStream::connect_timeout(&address, PATIENCE).and_then(|mut stream| {
                        stream.set_read_timeout(Some(PATIENCE))?;
                        stream.read(&mut byte)
                    });
                let waits = |error: &Error| error.kind() == ErrorKind::WouldBlock;
                let reached = reached.map_or_else(|error| waits(&error), |_| true);
                aim.tally.add("connected", u64::from(reached));
            }
        }
        for _ in 0..5 {
            let mut stream = UnixStream::connect(socket)?;
            write!(stream, "CONNECT {ABANDONED} HTTP/1.1\r\n\r\nhello")?;
            aim.tally.one("requests given up");
        }
    }
    Ok(())
}

fn captured(address: SocketAddr) -> bool {
    matches!(address, SocketAddr::V4(it) if it.ip().octets()[..2] == [10, 99])
}

/// Returns the status of the answer.
fn ask(socket: &Path, destination: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "CONNECT {destination} HTTP/1.1\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    Ok(String::from_utf8_lossy(&head[9..]).into_owned())
}
