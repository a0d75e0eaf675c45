//! The end of connections through a proxy-server in gRPC mode, from either side.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tonic::Code;

use crate::program::Maker;
use crate::scene::{Scene, each_server};
use crate::script::Script;
use crate::script_agent::ScriptAgent;
use crate::wire::{self, Payload};

/// Time for which our server may wait until a legacy agent's endpoint has taken everything.
const LINGER: Duration = Duration::from_secs(12);

fn connected(scene: &Scene, agent: &mut ScriptAgent, id: i64) -> Result<(Script, i64)> {
    let mut client = scene.script_client()?;
    client.send(wire::dial("10.99.1.2:7001", 1000 + id))?;
    agent.accept(id)?;
    let response = client.dial_response()?;
    ensure!(response.error.is_empty(), "{response:?}");
    Ok((client, response.connect_id))
}

/// The client is done: it is told that the other end is, and the agent is told to close.
#[test]
fn a_client_closes() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let (mut client, id) = connected(scene, &mut agent, 1)?;
        client.send(wire::data(id, "last words"))?;
        client.send(wire::close(id))?;
        ensure!(agent.data(1, 10)? == b"last words");
        let request = agent.next_within(LINGER)?;
        ensure!(request == wire::close(1), "{request:?}");
        agent.send(wire::closed(1, ""))?;
        client.expect(wire::closed(id, ""))?;
        client.finish();
        client.ended_well()?;
        agent.quiet()
    })
}

/// The endpoint is done: everything that it has said comes first.
#[test]
fn an_endpoint_closes() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let (mut client, id) = connected(scene, &mut agent, 1)?;
        for n in 0..50 {
            agent.send(wire::data(1, format!("{n:04}")))?;
        }
        agent.send(wire::closed(1, ""))?;
        let text = client.data(id, 200)?;
        let expected: String = (0..50).map(|n| format!("{n:04}")).collect();
        ensure!(text == expected.as_bytes(), "{text:?}");
        client.expect(wire::closed(id, ""))?;
        client.finish();
        client.ended_well()?;
        agent.quiet()
    })
}

/// A client that is gone without a word is closed at the agent.
#[test]
fn a_client_dies() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let (client, _) = connected(scene, &mut agent, 1)?;
        drop(client);
        agent.close(1)?;
        agent.quiet()
    })
}

/// An agent that is gone is told to each of its clients, and to no other.
#[test]
fn an_agent_dies() -> Result<()> {
    each_server("grpc", &["--proxy-strategies=destHost"], |scene, maker| {
        let mut good = scene.script_agent(1, "good", "ipv4=10.99.1.2")?;
        let (beside, beside_id) = connected(scene, &mut good, 1)?;
        let mut agent = scene.script_agent(1, "a", "ipv4=10.99.1.3")?;
        let mut clients = Vec::new();
        for id in 1..4 {
            let mut client = scene.script_client()?;
            client.send(wire::dial("10.99.1.3:7001", id))?;
            agent.accept(id)?;
            let id = client.dial_response()?.connect_id;
            agent.send(wire::data(agent_id(clients.len()), "before"))?;
            clients.push((client, id));
        }
        std::thread::sleep(Duration::from_millis(100));
        drop(agent);
        for (client, id) in &mut clients {
            ensure!(client.data(*id, 6)? == b"before");
            match client.payload()? {
                Payload::CloseResponse(response) if response.connect_id == *id => {
                    // The peer gives no reason, as if the endpoint had closed.
                    let peer = matches!(maker, Maker::Peer(_));
                    ensure!(response.error.is_empty() == peer, "{response:?}");
                }
                other => bail!("{other:?} came"),
            }
            client.finish();
            let status = client.ended()?;
            if matches!(maker, Maker::Ours(_)) {
                ensure!(status.code() == Code::Unavailable, "{status:?}");
            }
        }
        beside.send(wire::data(beside_id, "still"))?;
        ensure!(good.data(1, 5)? == b"still");
        Ok(())
    })
}

fn agent_id(index: usize) -> i64 {
    i64::try_from(index).unwrap_or(0) + 1
}

/// A client that sends before its dial gets an error.
#[test]
fn who_has_not_dialled_is_told_so() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let mut client = scene.script_client()?;
        client.send(wire::close(5))?;
        client.expect(wire::closed(5, "backend uninitialized"))?;
        // It may still dial.
        client.send(wire::dial("10.99.1.2:7001", 1))?;
        agent.accept(1)?;
        client.dial_response().context("after CLOSE_REQ")?;

        let mut client = scene.script_client()?;
        client.send(wire::data(5, "hello?"))?;
        client.expect(wire::closed(5, "backend not initialized"))?;
        client.finish();
        client.ended_well()?;
        agent.quiet()
    })
}
