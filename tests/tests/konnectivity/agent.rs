//! `cpc agent` with tunnels to proxy-servers, alone and beside its own kind.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tunnel_tests::client::{self, connect_through, eventually};
use tunnel_tests::lab;
use tunnel_tests::puppet::Puppet;
use tunnel_tests::target::Behaviour;

use crate::legacy_server::{Frontend, LegacyServer, Options};
use crate::place::Place;
use crate::scene::{Scene, agents, target};
use crate::script::SOON;
use crate::wire::{self, Payload};

/// Time for which an endpoint may block its neighbours on one stream.
const NO_PROGRESS: Duration = Duration::from_secs(10);
/// Time until a dead server is noticed, and room for a busy machine.
const DEAD: Duration = Duration::from_secs(35);

/// Lets worker 1's agent speak Konnectivity with the server at the usual place.
pub(crate) fn configure(scene: &mut Scene, change: impl FnOnce(&mut Value)) -> Result<()> {
    let credentials = scene.agent.clone();
    scene.lab.workers[0].agent()?.configure(|config| {
        config["servers"] = json!([{"address": agents(), "protocol": "konnectivity"}]);
        config["konnectivity"] = json!({
            "ca": credentials.ca,
            "cert": credentials.cert,
            "key": credentials.key,
            "agent_id": "ours",
            "identifiers": "ipv4=10.99.1.2",
        });
        change(config);
    })
}

/// The stand-in for the server, with its HTTP CONNECT.
fn legacy_server(scene: &Scene) -> Result<LegacyServer> {
    LegacyServer::start(
        Place::new(&scene.lab.control_plane.netns)?,
        Options {
            id: "stand-in".to_owned(),
            count: 1,
            agents: agents(),
            any: true,
            tls: scene.server.server()?,
            frontend: Some(Frontend::HttpConnect(scene.frontend("http-connect"))),
        },
    )
}

/// Our agent loses nothing at a close, where the peer's agent does, and dials no forbidden
/// destination.
#[test]
fn behind_a_proxy_server_it_loses_nothing() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(1)?;
    configure(&mut scene, |_| ())?;
    let server = legacy_server(&scene)?;
    let agent = scene.lab.workers[0].agent()?;
    agent.start()?;
    agent.wait_ready(SOON)?;
    ensure!(server.wait_agents(1)? == ["ours"]);
    let proxy = scene.frontend("http-connect");
    client::round_trips(connect_through(&proxy, &target(1, Behaviour::Echo))?, 5)?;
    client::download(
        connect_through(&proxy, &target(1, Behaviour::Source))?,
        3_000_001,
    )?;
    let puppet = Puppet::on(&scene.lab.workers[0], 8000)?;
    for round in 0..10 {
        let stream = connect_through(&proxy, &puppet.address.to_string())?;
        client::send(&stream, 1 << 20)?;
        drop(stream);
        let received = client::receive(puppet.accept()?)?;
        ensure!(
            received == 1 << 20,
            "round {round}: {received} bytes arrived"
        );
    }
    let refused = connect_through(&proxy, "10.99.1.2:22")
        .err()
        .context("port 22 was dialled")?;
    ensure!(format!("{refused:#}").contains("502"), "{refused:#}");
    let none = || {
        let left = server.connections();
        ensure!(left == (0, 0), "{left:?} are left");
        Ok(())
    };
    eventually(SOON, none)
}

/// One agent holds tunnels of both kinds, and each server's clients reach the same targets.
#[test]
fn it_serves_both_kinds_of_servers_at_once() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(1)?;
    let native = scene.lab.control_plane.servers[0].sockets.tunnel;
    configure(&mut scene, |config| {
        config["servers"] = json!([
            {"address": native, "protocol": "quic"},
            {"address": agents(), "protocol": "konnectivity"},
        ]);
    })?;
    let server = legacy_server(&scene)?;
    scene.cpc_server().start()?;
    scene.lab.workers[0].agent()?.start()?;
    server.wait_agents(1)?;
    scene.cpc_server().wait_ready(SOON)?;
    for proxy in [scene.frontend("http-connect"), scene.connect()] {
        let stream = connect_through(&proxy, &target(1, Behaviour::Echo))?;
        client::round_trips(stream, 3).with_context(|| proxy.display().to_string())?;
    }
    Ok(())
}

/// The agent detects the protocol of an address: gRPC where QUIC gets no answer.
#[test]
fn it_finds_out_what_a_server_speaks() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(1)?;
    configure(&mut scene, |config| config["servers"] = json!([agents()]))?;
    let server = legacy_server(&scene)?;
    let agent = scene.lab.workers[0].agent()?;
    agent.start()?;
    agent.wait_ready(2 * SOON)?;
    server.wait_agents(1).map(drop)
}

/// An endpoint that stops delays its neighbours for a bounded time; then its connection alone is
/// reset.
pub(crate) fn a_stopped_endpoint_is_reset() -> Result<()> {
    let mut scene = Scene::new(1)?;
    configure(&mut scene, |_| ())?;
    let server = scene.script_server(scene.server.server()?)?;
    scene.lab.workers[0].agent()?.start()?;
    let mut stream = server.agent()?;
    let echo = stream.connect(target(1, Behaviour::Echo), 1)?;
    let stuck = stream.connect(target(1, Behaviour::Stuck), 2)?;
    let chunk = wire::data(stuck, vec![0; 32 << 10]);
    let sent = stream.send_until_blocked(&chunk, Duration::from_secs(1), 2048)?;
    ensure!(sent < 2048, "64 MiB went to an endpoint that does not read");
    let begin = Instant::now();
    // Behind it the stream stands still; then it goes on.
    match stream.next_within(NO_PROGRESS + SOON)?.content() {
        Some(Payload::CloseResponse(response)) if response.connect_id == stuck => {
            ensure!(!response.error.is_empty(), "{response:?}");
        }
        other => anyhow::bail!("{other:?} came"),
    }
    ensure!(
        begin.elapsed() < NO_PROGRESS + Duration::from_secs(4),
        "{:?}",
        begin.elapsed()
    );
    // Of what was on its way some may be answered, as for any connection that is over.
    stream.send(wire::data(echo, "still here"))?;
    loop {
        match stream.payload()? {
            Payload::Data(data) => {
                ensure!(
                    data.connect_id == echo && data.data == "still here",
                    "{data:?}"
                );
                return Ok(());
            }
            Payload::CloseResponse(response) if response.connect_id == stuck => (),
            other => anyhow::bail!("{other:?} came"),
        }
    }
}

/// A server that has gone without a word is no server any more.
pub(crate) fn it_notices_a_dead_server() -> Result<()> {
    let mut scene = Scene::new(1)?;
    configure(&mut scene, |_| ())?;
    let server = legacy_server(&scene)?;
    let agent = scene.lab.workers[0].agent()?;
    agent.start()?;
    agent.wait_ready(SOON)?;
    server.wait_agents(1)?;
    let mut stream = connect_through(&scene.frontend("http-connect"), &target(1, Behaviour::Echo))?;
    scene.lab.router.silence(1)?;
    // Something is on its way, so that the silence can be heard.
    std::io::Write::write_all(&mut stream, b"hello?")?;
    let agent = scene.lab.workers[0].agent()?;
    eventually(DEAD, || match agent.get("/readyz")? {
        (200, _) => anyhow::bail!("still ready"),
        _ => Ok(()),
    })
}
