//! A proxy-server in gRPC mode with DATA of every size, and with DATA for unknown connections.

use anyhow::{Context, Result, ensure};
use tonic::Code;
use tunnel_tests::pattern;

use crate::scene::{Scene, each_server};
use crate::script::{SOON, Script};
use crate::script_agent::ScriptAgent;
use crate::wire::{self, Payload};

/// Maximum message of grpc-go.
const LONGEST: usize = 4 << 20;

/// A connection from a client to an agent, both in the test's hands; gives the client's id of it.
fn connected(scene: &Scene, agent: &mut ScriptAgent, id: i64) -> Result<(Script, i64)> {
    let mut client = scene.script_client()?;
    client.send(wire::dial("10.99.1.2:7001", 1000 + id))?;
    agent.accept(id)?;
    let response = client.dial_response()?;
    ensure!(
        response.error.is_empty() && response.connect_id > 0,
        "{response:?}"
    );
    Ok((client, response.connect_id))
}

fn bytes(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    pattern::fill(0, &mut bytes);
    bytes
}

/// Every size that fits a message arrives whole, both ways, whatever it is cut into on the way.
#[test]
fn every_size_arrives() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let (mut client, id) = connected(scene, &mut agent, 1)?;
        for size in [
            1,
            4095,
            4096,
            32 << 10,
            (32 << 10) + 1,
            1 << 20,
            LONGEST - 64,
        ] {
            let sent = bytes(size);
            client.send(wire::data(id, sent.clone()))?;
            let got = agent
                .data(1, size)
                .with_context(|| format!("{size} to the agent"))?;
            ensure!(
                got == sent,
                "{size} bytes have changed on the way to the agent"
            );
            agent.send(wire::data(1, sent.clone()))?;
            let got = client
                .data(id, size)
                .with_context(|| format!("{size} to the client"))?;
            ensure!(
                got == sent,
                "{size} bytes have changed on the way to the client"
            );
        }
        // No bytes are no data, but no mistake either.
        client.send(wire::data(id, ""))?;
        client.send(wire::data(id, "x"))?;
        ensure!(agent.data(1, 1)? == b"x");
        Ok(())
    })
}

/// A message that is too long ends the stream that it came on, and nothing else.
#[test]
fn too_long_a_message_ends_its_stream_alone() -> Result<()> {
    each_server("grpc", &["--proxy-strategies=destHost"], |scene, _| {
        let mut good = scene.script_agent(1, "good", "ipv4=10.99.1.2")?;
        let (mut beside, beside_id) = connected(scene, &mut good, 1)?;

        let (mut client, id) = connected(scene, &mut good, 2)?;
        client.send(wire::data(id, bytes(LONGEST + 1)))?;
        let status = loop {
            // The connection may be closed first.
            match client.packet_or_end(SOON)?.context("the stream goes on")? {
                Ok(packet) => {
                    let closes = matches!(packet.content(), Some(Payload::CloseResponse(_)));
                    ensure!(closes, "{packet:?} came");
                }
                Err(status) => break status,
            }
        };
        ensure!(status.code() != Code::Ok, "{status:?}");
        good.close(2)?;

        let mut bad = scene.script_agent(1, "bad", "ipv4=10.99.1.3")?;
        bad.send(wire::data(1, bytes(LONGEST + 1)))?;
        let status = bad.ended()?;
        ensure!(status.code() != Code::Ok, "{status:?}");

        beside.send(wire::data(beside_id, "still"))?;
        ensure!(good.data(1, 5)? == b"still");
        good.send(wire::data(1, "here"))?;
        ensure!(beside.data(beside_id, 4)? == b"here");
        Ok(())
    })
}

/// DATA of connection 0 is dropped; DATA of an unknown connection is answered with CLOSE_REQ.
#[test]
fn data_for_nobody_is_dropped_or_closed() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let (mut client, id) = connected(scene, &mut agent, 1)?;
        agent.send(wire::data(0, "nobody"))?;
        client.send(wire::data(0, "nobody"))?;
        agent.quiet()?;
        client.quiet()?;

        agent.reflex.know(77);
        agent.send(wire::data(77, "whose?"))?;
        agent.close(77)?;
        agent.send(wire::closed(78, "nor is this"))?;

        client.send(wire::data(id, "goes on"))?;
        ensure!(agent.data(1, 7)? == b"goes on");
        agent.send(wire::data(1, "and back"))?;
        ensure!(client.data(id, 8)? == b"and back");
        Ok(())
    })
}

/// A client's stream is for one connection: DATA for another one closes both.
#[test]
fn a_second_connection_on_a_clients_stream_closes_both() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let (mut client, id) = connected(scene, &mut agent, 1)?;
        client.send(wire::data(id, "first"))?;
        ensure!(agent.data(1, 5)? == b"first");
        client.send(wire::data(id + 1, "second"))?;
        for id in [id + 1, id] {
            client.expect(wire::closed(id, "mismatched connection IDs"))?;
        }
        // The connection that was there is closed at the agent.
        agent.expect(wire::close(1))?;
        client.finish();
        client.ended().map(drop)
    })
}

/// Unknown types, and payloads that do not fit their type, do not end the stream.
#[test]
fn unknown_packets_are_ignored() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let (mut client, id) = connected(scene, &mut agent, 1)?;
        let unknown = wire::Packet {
            r#type: 99,
            payload: None,
        };
        agent.send(unknown.clone())?;
        client.send(unknown)?;
        client.send(wire::drain())?;
        client.send(wire::close_dial(0x5555))?;
        agent.send(wire::close_dial(0x5555))?;
        agent.quiet()?;
        client.quiet()?;
        client.send(wire::data(id, "hello"))?;
        ensure!(agent.data(1, 5)? == b"hello");
        Ok(())
    })
}
