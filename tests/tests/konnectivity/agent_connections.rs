//! Connections of a proxy-agent that a server requests.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tunnel_tests::frontend;
use tunnel_tests::pattern;
use tunnel_tests::puppet::Puppet;
use tunnel_tests::target::{BANNER, Behaviour};

use crate::scene::{each_agent, target};
use crate::script::SOON;
use crate::wire::{self, Payload};

/// Ids are counted from 1, for dials that fail as well; two connections do not meet.
#[test]
fn connections_are_numbered_and_apart() -> Result<()> {
    each_agent(&[], |_, _, _, server| {
        let mut stream = server.agent()?;
        let echo = target(1, Behaviour::Echo);
        let first = stream.connect(&echo, 11)?;
        let failed = stream.dial("10.99.1.2:9", 12)?;
        ensure!(
            !failed.error.is_empty() && failed.connect_id == 0,
            "{failed:?}"
        );
        let third = stream.connect(&echo, 13)?;
        ensure!((first, third) == (1, 3), "{first} and {third}");
        stream.echo(first, "one")?;
        stream.echo(third, "three")?;
        stream.echo(first, "one again")?;
        // A new stream counts anew.
        drop(stream);
        let mut stream = server.agent()?;
        ensure!(stream.connect(&echo, 14)? == 1);
        Ok(())
    })
}

/// Errors are told in the words of Go's dialler, which the peer's server and others read.
#[test]
fn errors_are_told_in_the_peers_words() -> Result<()> {
    each_agent(&[], |_, _, _, server| {
        let mut stream = server.agent()?;
        let cases = [
            (
                "10.99.1.2:9",
                "dial tcp 10.99.1.2:9: connect: connection refused",
            ),
            (
                "[fd00:99:1::2]:9",
                "dial tcp [fd00:99:1::2]:9: connect: connection refused",
            ),
        ];
        for (random, (address, error)) in (1..).zip(cases) {
            let response = stream.dial(address, random)?;
            ensure!(response.error == error, "{response:?}");
            ensure!(
                (response.random, response.connect_id) == (random, 0),
                "{response:?}"
            );
        }
        // A test's laboratory has no name server, and an address that nobody has takes its time.
        for (random, (address, pieces)) in (10..).zip([
            ("10.99.1:x", ["dial tcp", ""]),
            ("10.99.1.2", ["dial tcp", "port"]),
        ]) {
            let response = stream.dial(address, random)?;
            let fits = pieces.iter().all(|piece| response.error.contains(piece));
            ensure!(fits, "{response:?}");
        }
        stream.send(wire::dial("10.99.1.77:80", 20))?;
        let packet = stream
            .next_within(Duration::from_secs(8))
            .context("an address of nobody")?;
        let Some(Payload::DialResponse(response)) = packet.content() else {
            anyhow::bail!("{packet:?}");
        };
        let known = ["no route to host", "i/o timeout"];
        ensure!(
            known.iter().any(|text| response.error.ends_with(text)),
            "{response:?}"
        );
        Ok(())
    })
}

/// A packet for an unknown connection is answered, and one for connection 0 dropped.
#[test]
fn packets_for_nobody_are_answered() -> Result<()> {
    each_agent(&[], |_, _, _, server| {
        let mut stream = server.agent()?;
        stream.send(wire::data(5, "whose?"))?;
        stream.expect(wire::closed(5, "unrecognized connectID"))?;
        stream.send(wire::close(6))?;
        stream.expect(wire::closed(6, "Unknown connectID"))?;
        stream.send(wire::data(0, "nobody's"))?;
        stream.send(wire::close_dial(7))?;
        stream.send(wire::drain())?;
        stream.send(wire::Packet {
            r#type: 42,
            payload: None,
        })?;
        stream.quiet()?;
        let id = stream.connect(target(1, Behaviour::Echo), 1)?;
        stream.echo(id, "all the same")
    })
}

/// The endpoint ends: what it has said comes first, then CLOSE_RSP, once.
#[test]
fn an_endpoint_ends() -> Result<()> {
    each_agent(&[], |_, _, _, server| {
        const LENGTH: usize = 300_000;
        let mut stream = server.agent()?;
        let id = stream.connect(target(1, Behaviour::Source), 1)?;
        stream.send(wire::data(id, format!("{LENGTH}\n")))?;
        let got = stream.data(id, LENGTH)?;
        let mut expected = vec![0; LENGTH];
        pattern::fill(0, &mut expected);
        ensure!(got == expected, "the bytes have changed");
        stream.expect(wire::closed(id, ""))?;
        stream.send(wire::close(id))?;
        stream.expect(wire::closed(id, "Unknown connectID"))?;
        stream.quiet()
    })
}

/// The endpoint speaks first.
#[test]
fn an_endpoint_speaks_first() -> Result<()> {
    each_agent(&[], |_, _, _, server| {
        let mut stream = server.agent()?;
        for random in 1..20 {
            let id = stream.connect(target(1, Behaviour::Banner), random)?;
            ensure!(stream.data(id, BANNER.len())? == BANNER.as_bytes());
            stream.send(wire::close(id))?;
            stream.expect(wire::closed(id, ""))?;
        }
        Ok(())
    })
}

/// The server closes: it is answered at once, and the endpoint sees an end.
#[test]
fn a_server_closes() -> Result<()> {
    each_agent(&[], |scene, _, _, server| {
        let puppet = Puppet::on(&scene.lab.workers[0], 8000)?;
        let mut stream = server.agent()?;
        let id = stream.connect(puppet.address, 1)?;
        let mut endpoint = puppet.accept()?;
        stream.send(wire::data(id, "hello"))?;
        let mut text = [0; 5];
        endpoint.read_exact(&mut text)?;
        ensure!(&text == b"hello");
        stream.send(wire::close(id))?;
        stream.expect(wire::closed(id, ""))?;
        ensure!(endpoint.read(&mut text)? == 0, "more than was sent");
        stream.quiet()
    })
}

/// The server is gone: so are its connections.
#[test]
fn a_server_dies() -> Result<()> {
    each_agent(&[], |scene, _, _, server| {
        let puppet = Puppet::on(&scene.lab.workers[0], 8000)?;
        let mut stream = server.agent()?;
        stream.connect(puppet.address, 1)?;
        let mut endpoint = puppet.accept()?;
        drop(stream);
        let mut rest = Vec::new();
        let end = endpoint.read_to_end(&mut rest);
        ensure!(rest.is_empty(), "{rest:?}");
        // An end or a reset: it is over.
        let _ = end;
        server.agent().map(drop)
    })
}

/// Every size that fits a message is written as it came, and big answers are cut as the agent
/// likes.
#[test]
fn every_size_arrives() -> Result<()> {
    each_agent(&[], |_, _, _, server| {
        let mut stream = server.agent()?;
        let id = stream.connect(target(1, Behaviour::Echo), 1)?;
        for size in [1, 4096, 32 << 10, 100_000, (4 << 20) - 64] {
            let mut sent = vec![0; size];
            pattern::fill(size as u64, &mut sent);
            stream.send(wire::data(id, sent.clone()))?;
            let got = stream
                .data(id, size)
                .with_context(|| format!("{size} bytes"))?;
            ensure!(got == sent, "{size} bytes have changed");
        }
        stream.send(wire::data(id, ""))?;
        stream.echo(id, "x")
    })
}

/// A message that is too long ends the stream, and the agent comes again.
#[test]
fn too_long_a_message_ends_the_stream() -> Result<()> {
    each_agent(&[], |_, _, _, server| {
        let mut stream = server.agent()?;
        stream.send(wire::data(1, vec![0; (4 << 20) + 1]))?;
        let end = stream.packet_or_end(SOON)?;
        ensure!(matches!(end, Some(Err(_))), "{end:?}");
        let mut stream = server.agent()?;
        let id = stream.connect(target(1, Behaviour::Echo), 1)?;
        stream.echo(id, "back again")
    })
}

/// An endpoint that resets its connection ends that connection alone.
#[test]
fn an_endpoint_resets() -> Result<()> {
    each_agent(&[], |scene, _, _, server| {
        let puppet = Puppet::on(&scene.lab.workers[0], 8000)?;
        let mut stream = server.agent()?;
        let beside = stream.connect(target(1, Behaviour::Echo), 1)?;
        let id = stream.connect(puppet.address, 2)?;
        frontend::reset(puppet.accept()?)?;
        match stream.payload()? {
            Payload::CloseResponse(response) if response.connect_id == id => (),
            other => anyhow::bail!("{other:?} came"),
        }
        stream.echo(beside, "still here")?;
        // What is said to it now is said to nobody.
        stream.send(wire::data(id, "hello?"))?;
        stream.expect(wire::closed(id, "unrecognized connectID"))?;
        let mut endpoint = {
            stream.send(wire::dial(puppet.address, 3))?;
            puppet.accept()?
        };
        let again = stream.dial_response()?.connect_id;
        endpoint.write_all(b"alive")?;
        endpoint.shutdown(Shutdown::Write)?;
        ensure!(stream.data(again, 5)? == b"alive");
        stream.expect(wire::closed(again, ""))
    })
}
