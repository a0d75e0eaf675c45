//! A proxy-server's HTTP CONNECT, byte for byte.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::program::Maker;
use crate::scene::{Scene, each_server};
use crate::script::SOON;
use crate::wire;

const ESTABLISHED: &str = "HTTP/1.1 200 Connection Established\r\n\r\n";

/// Sends a request as kube-apiserver does.
fn request(scene: &Scene, destination: &str) -> Result<UnixStream> {
    send(
        scene,
        &format!("CONNECT {destination} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
    )
}

fn send(scene: &Scene, text: &str) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(scene.frontend("http-connect"))?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(text.as_bytes())?;
    Ok(stream)
}

fn to_end(mut stream: UnixStream) -> Result<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Fails unless `answer` is what the peer says. Ours may give another reason phrase, which people at
/// kubectl read.
fn answers(maker: &Maker, answer: &str, expected: &str) -> Result<()> {
    let split = |text: &'_ str| -> Result<(String, String)> {
        let (line, rest) = text.split_once("\r\n").context("no status line")?;
        let words: Vec<_> = line.splitn(3, ' ').collect();
        ensure!(words.len() == 3, "{line:?}");
        Ok((words[..2].join(" "), rest.to_owned()))
    };
    let same = match maker {
        Maker::Ours(_) => split(answer)? == split(expected)?,
        _ => answer == expected,
    };
    ensure!(same, "{answer:?}, where {expected:?} was expected");
    Ok(())
}

fn exactly(stream: &mut UnixStream, expected: &str) -> Result<()> {
    let mut bytes = vec![0; expected.len()];
    stream
        .read_exact(&mut bytes)
        .with_context(|| format!("{expected:?} did not come"))?;
    ensure!(
        bytes == expected.as_bytes(),
        "{:?}",
        String::from_utf8_lossy(&bytes)
    );
    Ok(())
}

/// Connected: the head, and what follows it, both ways; then the client ends.
#[test]
fn a_connection() -> Result<()> {
    each_server("http-connect", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let mut stream = request(scene, "10.99.1.2:7001")?;
        let dial = agent.accept(1)?;
        ensure!((dial.protocol.as_str(), dial.address.as_str()) == ("tcp", "10.99.1.2:7001"));
        exactly(&mut stream, ESTABLISHED)?;
        stream.write_all(b"ping")?;
        ensure!(agent.data(1, 4)? == b"ping");
        agent.send(wire::data(1, "pong"))?;
        exactly(&mut stream, "pong")?;
        drop(stream);
        let request = agent.next_within(Duration::from_secs(12))?;
        ensure!(request == wire::close(1), "{request:?}");
        agent.send(wire::closed(1, ""))?;
        agent.quiet()
    })
}

/// The request's target counts, not its Host; names and IPv6 addresses pass as they are.
#[test]
fn the_target_is_the_destination() -> Result<()> {
    each_server("http-connect", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let mut streams = Vec::new();
        for (id, target) in (1..).zip(["node-1.example:10250", "[fd00:99:1::2]:10250"]) {
            let mut stream = request(scene, target)?;
            let dial = agent.accept(id)?;
            ensure!(dial.address == target, "{dial:?}");
            exactly(&mut stream, ESTABLISHED)?;
            streams.push(stream);
        }
        Ok(())
    })
}

/// Bytes that arrive together with the request belong to the connection.
#[test]
fn early_bytes_are_kept() -> Result<()> {
    each_server("http-connect", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let text = "CONNECT 10.99.1.2:1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nearly";
        let mut stream = send(scene, text)?;
        stream.write_all(b" bird")?;
        agent.accept(1)?;
        exactly(&mut stream, ESTABLISHED)?;
        ensure!(agent.data(1, 10)? == b"early bird");
        Ok(())
    })
}

/// The endpoint ends: what it has said comes first, then the end of the file.
#[test]
fn an_endpoint_ends() -> Result<()> {
    each_server("http-connect", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let mut stream = request(scene, "10.99.1.2:7001")?;
        agent.accept(1)?;
        exactly(&mut stream, ESTABLISHED)?;
        agent.send(wire::data(1, "goodbye"))?;
        agent.send(wire::closed(1, ""))?;
        let rest = to_end(stream)?;
        ensure!(rest == "goodbye", "{rest:?}");
        Ok(())
    })
}

/// The agent dies: its clients see an end.
#[test]
fn an_agent_dies() -> Result<()> {
    each_server("http-connect", &[], |scene, maker| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let mut stream = request(scene, "10.99.1.2:7001")?;
        agent.accept(1)?;
        exactly(&mut stream, ESTABLISHED)?;
        let pending = request(scene, "10.99.1.2:7002")?;
        agent.dialled()?;
        drop(agent);
        let mut rest = Vec::new();
        let end = stream.read_to_end(&mut rest);
        // The peer's clients take it for the endpoint's own end.
        ensure!(end.is_ok() || matches!(maker, Maker::Ours(_)), "{end:?}");
        ensure!(rest.is_empty(), "{rest:?}");
        let answer = to_end(pending)?;
        let expected = "HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n\
                        Backend context error: context canceled\r\n";
        answers(maker, &answer, expected)
    })
}

/// The error's text decides what status it is.
#[test]
fn a_dial_fails() -> Result<()> {
    each_server("http-connect", &[], |scene, maker| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let cases = [
            (
                "502 Bad Gateway",
                "dial tcp 10.99.1.2:1: connect: connection refused",
            ),
            (
                "502 Bad Gateway",
                "dial tcp: lookup x on 10.0.0.10:53: no such host",
            ),
            (
                "502 Bad Gateway",
                "dial tcp 10.9.9.9:1: connect: no route to host",
            ),
            (
                "502 Bad Gateway",
                "dial tcp 10.9.9.9:1: connect: network is unreachable",
            ),
            ("504 Gateway Timeout", "dial tcp 10.99.1.2:1: i/o timeout"),
            ("504 Gateway Timeout", "context deadline exceeded"),
            (
                "503 Service Unavailable",
                "dial tcp 10.99.1.2:1: socket: too many open files",
            ),
            ("502 Bad Gateway", "something else"),
        ];
        for (status, error) in cases {
            let stream = request(scene, "10.99.1.2:1")?;
            let dial = agent.dialled()?;
            agent.send(wire::dial_failed(error, dial.random))?;
            let answer = to_end(stream)?;
            let expected = format!(
                "HTTP/1.1 {status}\r\nConnection: close\r\n\
                 Content-Type: text/plain; charset=utf-8\r\n\r\n{error}"
            );
            answers(maker, &answer, &expected)?;
        }
        Ok(())
    })
}

/// Without an agent, and with something else than CONNECT.
#[test]
fn a_request_is_refused() -> Result<()> {
    each_server("http-connect", &[], |scene, maker| {
        let answer = to_end(request(scene, "10.99.1.2:1")?)?;
        let expected = "HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n\r\n\
                        currently no tunnels available: No agent available";
        answers(maker, &answer, expected)?;

        let stream = send(scene, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")?;
        stream.shutdown(Shutdown::Write)?;
        let answer = to_end(stream)?;
        ensure!(answer.starts_with("HTTP/1.1 405 "), "{answer:?}");
        ensure!(
            answer.ends_with("this proxy only supports CONNECT passthrough\n"),
            "{answer:?}"
        );
        Ok(())
    })
}

/// With a limit for dials, the client does not wait without end.
#[test]
fn a_dial_takes_too_long() -> Result<()> {
    each_server(
        "http-connect",
        &["--backend-dial-timeout=1s"],
        |scene, maker| {
            let mut agent = scene.script_agent(1, "a", "")?;
            let stream = request(scene, "10.99.1.2:1")?;
            let dial = agent.dialled()?;
            let answer = to_end(stream)?;
            let expected = "HTTP/1.1 504 Gateway Timeout\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n\
             Backend dial timeout: timed out waiting for backend dial\r\n";
            answers(maker, &answer, expected)?;
            agent.answer(&dial, 1)?;
            loop {
                match agent.next()? {
                    packet if packet == wire::close_dial(dial.random) => (),
                    packet => {
                        ensure!(packet == wire::close(1), "{packet:?}");
                        return agent.send(wire::closed(1, ""));
                    }
                }
            }
        },
    )
}
