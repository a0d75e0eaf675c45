//! Dials through a proxy-server in gRPC mode: every way in which one may end.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tunnel_tests::client::round_trips;
use tunnel_tests::lab;
use tunnel_tests::target::Behaviour;

use crate::legacy_frontend;
use crate::program::Maker;
use crate::scene::{Scene, each_server, target};
use crate::script::{QUIET, SOON};
use crate::wire::{self, Payload};

/// Without an agent the client is told so, and ends the stream itself.
#[test]
fn without_an_agent_a_dial_fails_at_once() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut client = scene.script_client()?;
        let response = client.dial("10.99.1.2:7001", 41)?;
        ensure!(
            response.error.starts_with("No agent available"),
            "{response:?}"
        );
        ensure!(
            (response.random, response.connect_id) == (41, 0),
            "{response:?}"
        );
        client.finish();
        client.ended_well()
    })
}

/// The address arrives as it was asked for, and the error as it was told.
#[test]
fn a_dial_and_its_error_pass_unchanged() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let errors = [
            (
                "127.0.0.1:1",
                "dial tcp 127.0.0.1:1: connect: connection refused",
            ),
            ("10.99.1.77:80", "dial tcp 10.99.1.77:80: i/o timeout"),
            (
                "nowhere.example:443",
                "dial tcp: lookup nowhere.example on 10.0.0.10:53: no such host",
            ),
            (
                "[fd00:99:1::77]:80",
                "dial tcp [fd00:99:1::77]:80: connect: no route to host",
            ),
        ];
        for (random, (address, error)) in (1..).zip(errors) {
            let mut client = scene.script_client()?;
            client.send(wire::dial(address, random))?;
            let request = agent.dialled()?;
            ensure!((request.protocol.as_str(), request.address.as_str()) == ("tcp", address));
            agent.send(wire::dial_failed(error, request.random))?;
            let response = client.dial_response()?;
            ensure!(response.error == error, "{response:?}");
            ensure!(
                (response.random, response.connect_id) == (random, 0),
                "{response:?}"
            );
        }
        agent.quiet()
    })
}

/// An answer to a cancelled dial closes the connection at the agent.
#[test]
fn a_late_answer_is_closed() -> Result<()> {
    each_server("grpc", &[], |scene, maker| {
        let mut agent = scene.script_agent(1, "a", "")?;
        // The client says that it gives up.
        let mut client = scene.script_client()?;
        client.send(wire::dial("10.99.1.2:7001", 5))?;
        let request = agent.dialled()?;
        client.send(wire::close_dial(5))?;
        std::thread::sleep(QUIET);
        agent.answer(&request, 1)?;
        closes(&mut agent, 1)?;
        // It may be told that its dial has failed, but of no connection.
        if let Some(Ok(packet)) = client.packet_or_end(QUIET)? {
            let Some(Payload::DialResponse(response)) = packet.content() else {
                bail!("{packet:?} came");
            };
            ensure!(
                response.connect_id == 0 && response.random == 5,
                "{response:?}"
            );
        }

        // The client is gone without a word.
        let client = scene.script_client()?;
        client.send(wire::dial("10.99.1.2:7001", 6))?;
        let request = agent.dialled()?;
        drop(client);
        if matches!(maker, Maker::Peer(_)) {
            agent.expect(wire::close_dial(request.random))?;
        } else {
            // An agent ignores DIAL_CLS: whether it is sent is not what counts.
            std::thread::sleep(Duration::from_millis(200));
        }
        agent.answer(&request, 2)?;
        closes(&mut agent, 2)?;

        // Nobody ever asked.
        agent.reflex.know(3);
        agent.send(wire::dialled(3, 0x7777))?;
        closes(&mut agent, 3)?;
        agent.send(wire::dial_failed("nobody asked", 0x7778))?;
        agent.quiet()
    })
}

/// Takes CLOSE_REQ, before which a DIAL_CLS may come, and answers it.
fn closes(agent: &mut crate::script_agent::ScriptAgent, id: i64) -> Result<()> {
    loop {
        match agent.payload()? {
            Payload::CloseDial(_) => (),
            Payload::CloseRequest(request) if request.connect_id == id => {
                return agent.send(wire::closed(id, ""));
            }
            other => bail!("{other:?} came, not the end of {id}"),
        }
    }
}

/// Many dials at once, answered in another order than they were asked in.
#[test]
fn answers_find_their_dials() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let mut clients = Vec::new();
        let mut requests = Vec::new();
        for n in 0..20 {
            let client = scene.script_client()?;
            client.send(wire::dial(format!("10.99.1.2:{}", 7000 + n), 100 + n))?;
            clients.push(client);
            requests.push(agent.dialled()?);
        }
        for (n, request) in (0..20_i64).rev().zip(requests.iter().rev()) {
            ensure!(
                request.address == format!("10.99.1.2:{}", 7000 + n),
                "{request:?}"
            );
            agent.answer(request, n + 1)?;
            let client = &mut clients[usize::try_from(n)?];
            let response = client.dial_response()?;
            ensure!(
                response.error.is_empty() && response.random == 100 + n,
                "{response:?}"
            );
            let id = response.connect_id;
            client.send(wire::data(id, format!("hello {n}")))?;
            agent.expect(wire::data(n + 1, format!("hello {n}")))?;
            agent.send(wire::data(n + 1, format!("hello yourself {n}")))?;
            client.expect(wire::data(id, format!("hello yourself {n}")))?;
        }
        Ok(())
    })
}

/// An agent that takes a dial and dies, or that says nothing: every dial ends all the same. The
/// peer lets its clients wait for their own time limit.
#[test]
fn every_dial_ends() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let scene = Scene::new(1)?;
    let mut server = scene.proxy_server(&scene.ours()?, "grpc", &["--backend-dial-timeout=1s"])?;
    server.wait_healthy(SOON)?;
    let mut agent = scene.script_agent(1, "a", "")?;
    let mut client = scene.script_client()?;
    client.send(wire::dial("10.99.1.2:7001", 1))?;
    agent.dialled()?;
    drop(agent);
    let response = client.dial_response().context("the agent has died")?;
    ensure!(
        !response.error.is_empty() && response.random == 1,
        "{response:?}"
    );

    let mut agent = scene.script_agent(1, "a", "")?;
    let mut client = scene.script_client()?;
    client.send(wire::dial("10.99.1.2:7001", 2))?;
    let request = agent.dialled()?;
    let response = client.dial_response().context("the agent says nothing")?;
    ensure!(
        response
            .error
            .starts_with("timed out waiting for backend dial"),
        "{response:?}"
    );
    agent.answer(&request, 1)?;
    closes(&mut agent, 1)
}

/// Many connections may share one gRPC connection, a stream each: one that dies or closes does not
/// touch the others.
#[test]
fn connections_share_a_grpc_connection() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let agent = scene.legacy_agent(1)?;
        agent.wait_any()?;
        let place = &scene.control_plane;
        let client = legacy_frontend::connect(place, &scene.frontend("grpc"))?;
        let echo = target(1, Behaviour::Echo);
        let dialled = (0..8).map(|_| legacy_frontend::dial_on(place, &client, &echo));
        let mut connections = dialled.collect::<Result<Vec<_>>>()?;
        while let Some(last) = connections.pop() {
            for connection in &mut connections {
                round_trips(connection, 2)?;
            }
            if connections.len() % 2 == 0 {
                let text = last.close()?;
                ensure!(text.is_empty(), "{text:?}");
            }
        }
        Ok(())
    })
}
