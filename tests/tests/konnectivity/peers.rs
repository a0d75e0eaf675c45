//! The peer's own programs, where there are any: beside them the stand-ins show that they are
//! faithful, and the connector that it takes either place.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tunnel_tests::client::{self, connect_through, eventually};
use tunnel_tests::lab;
use tunnel_tests::lab::process::Process;
use tunnel_tests::target::Behaviour;

use crate::agent::configure;
use crate::defects::{SLOW, slowly, upload};
use crate::legacy_frontend;
use crate::legacy_server::{Frontend, LegacyServer, Options};
use crate::place::Place;
use crate::program::Maker;
use crate::scene::{Scene, agents, target};
use crate::script::SOON;

const BYTES: u64 = 3_000_001;
const MODES: [&str; 2] = ["grpc", "http-connect"];

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// Checks the transfers of every pair: round trips, a complete download, and an upload of which
/// every byte comes back.
fn transfers(scene: &Scene, mode: &str) -> Result<()> {
    let socket = scene.frontend(mode);
    let dial = |to: &str| dial(&scene.control_plane, mode, &socket, to);
    client::round_trips(dial(&target(1, Behaviour::Echo))?, 5).context("round trips")?;
    client::download(dial(&target(1, Behaviour::Source))?, BYTES).context("download")?;
    let mut stream = dial(&target(1, Behaviour::Echo))?;
    for round in 0..64_u8 {
        let chunk = [round; 16 << 10];
        stream.write_all(&chunk)?;
        let mut back = [0; 16 << 10];
        stream.read_exact(&mut back)?;
        ensure!(chunk == back, "round {round}");
    }
    let refused = dial("10.99.1.2:8099")
        .err()
        .context("a closed port was reached")?;
    let text = format!("{refused:#}");
    ensure!(text.contains("refused") || text.contains("502"), "{text}");
    Ok(())
}

fn dial(place: &Place, mode: &str, socket: &Path, to: &str) -> Result<Box<dyn Stream>> {
    Ok(match mode {
        "grpc" => Box::new(legacy_frontend::dial(place, socket, to)?),
        _ => Box::new(connect_through(socket, to)?),
    })
}

/// A scene with one worker and the peer, where there is one.
fn peer() -> Result<Option<Maker>> {
    Ok(if lab::available()? {
        Maker::peer()
    } else {
        None
    })
}

fn stand_in_server(scene: &Scene, mode: &str) -> Result<LegacyServer> {
    let socket = scene.frontend(mode);
    let options = Options {
        id: "stand-in".to_owned(),
        count: 1,
        agents: agents(),
        any: true,
        tls: scene.server.server()?,
        frontend: Some(match mode {
            "grpc" => Frontend::Grpc(socket),
            _ => Frontend::HttpConnect(socket),
        }),
    };
    LegacyServer::start(Place::new(&scene.lab.control_plane.netns)?, options)
}

/// The stand-ins for the agent and the client library beside the real server.
#[test]
fn the_stand_ins_serve_beside_the_peers_server() -> Result<()> {
    let Some(peer) = peer()? else {
        return Ok(());
    };
    let scene = Scene::new(1)?;
    for mode in MODES {
        let mut server = scene.proxy_server(&peer, mode, &[])?;
        let agent = scene.legacy_agent(1)?;
        assert_eq!(agent.wait_servers(1)?, ["legacy-server"]);
        server.wait_ready(SOON)?;
        transfers(&scene, mode).context(mode)?;
    }
    Ok(())
}

/// The stand-in for the server beside the real agent.
#[test]
fn the_stand_ins_serve_beside_the_peers_agent() -> Result<()> {
    let Some(peer) = peer()? else {
        return Ok(());
    };
    let scene = Scene::new(1)?;
    for mode in MODES {
        let server = stand_in_server(&scene, mode)?;
        let mut agent = scene.proxy_agent(&peer, 1, &[])?;
        assert_eq!(server.wait_agents(1)?, ["legacy-1"]);
        agent.wait_ready(SOON)?;
        transfers(&scene, mode).context(mode)?;
    }
    Ok(())
}

/// An upload to an endpoint that reads slowly, by a client that goes: what is lost with the peer's
/// programs is lost with the stand-ins too, or they would show nothing about ours.
#[test]
fn the_stand_ins_lose_what_the_peer_loses() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mode = "http-connect";
    let lost = |scene: &Scene| {
        let socket = scene.frontend(mode);
        let send = |to: &str| client::send(&connect_through(&socket, to)?, SLOW);
        let arrived = upload(scene, SLOW, slowly, send);
        ensure!(arrived.is_err(), "nothing was lost");
        Ok(())
    };
    let scene = Scene::new(1)?;
    {
        let _server = stand_in_server(&scene, mode)?;
        let agent = scene.legacy_agent(1)?;
        agent.wait_servers(1)?;
        lost(&scene).context("the stand-ins")?;
    }
    if let Some(peer) = Maker::peer() {
        let mut server = scene.proxy_server(&peer, mode, &[])?;
        let _agent = scene.proxy_agent(&peer, 1, &[])?;
        server.wait_healthy(SOON)?;
        // Both strategies may be ready at different times: it is what dials that counts.
        let socket = scene.frontend(mode);
        eventually(SOON, || {
            connect_through(&socket, &target(1, Behaviour::Echo))
        })?;
        lost(&scene).context("the peer")?;
    }
    Ok(())
}

/// Our agent, both ways to start it, behind the real server.
#[test]
fn our_agents_serve_behind_the_peers_server() -> Result<()> {
    let Some(peer) = peer()? else {
        return Ok(());
    };
    let mut scene = Scene::new(1)?;
    configure(&mut scene, |_| ())?;
    for mode in MODES {
        let mut server = scene.proxy_server(&peer, mode, &[])?;
        {
            let mut agent = scene.proxy_agent(&scene.ours()?, 1, &[])?;
            agent.wait_ready(SOON)?;
            server.wait_ready(SOON)?;
            transfers(&scene, mode).with_context(|| format!("cpc proxy-agent, {mode}"))?;
        }
        let agent = scene.lab.workers[0].agent()?;
        agent.start()?;
        agent.wait_ready(SOON)?;
        server.wait_ready(SOON)?;
        transfers(&scene, mode).with_context(|| format!("cpc agent, {mode}"))?;
        scene.lab.workers[0].agent()?.kill()?;
    }
    Ok(())
}

/// The real agent, and the real test client, at our server.
#[test]
fn the_peers_programs_use_our_server() -> Result<()> {
    let Some(peer) = peer()? else {
        return Ok(());
    };
    let Maker::Peer(folder) = &peer else {
        return Ok(());
    };
    let scene = Scene::new(1)?;
    let log = scene.lab.folder().join("http-test-server.log");
    let worker = &scene.lab.workers[0].netns;
    let mut command = worker.command(folder.join("http-test-server"))?;
    command.arg("--server-port=8000");
    let mut endpoint = Process::start("http-test-server", &mut command, &log)?;
    let served = both_modes(&scene, &peer, folder);
    endpoint.kill()?;
    served
}

fn both_modes(scene: &Scene, peer: &Maker, folder: &Path) -> Result<()> {
    for mode in MODES {
        let mut server = scene.proxy_server(&scene.ours()?, mode, &[])?;
        let mut agent = scene.proxy_agent(peer, 1, &[])?;
        agent.wait_ready(SOON)?;
        server.wait_ready(SOON)?;
        transfers(scene, mode).context(mode)?;
        let mut client = scene
            .lab
            .control_plane
            .netns
            .command(folder.join("proxy-test-client"))?;
        let endpoint = SocketAddr::from((Ipv4Addr::LOCALHOST, 8000));
        client.args([
            format!("--mode={mode}"),
            format!("--proxy-uds={}", scene.frontend(mode).display()),
            "--proxy-host=".to_owned(),
            "--proxy-port=0".to_owned(),
            format!("--request-host={}", endpoint.ip()),
            format!("--request-port={}", endpoint.port()),
            "--test-requests=5".to_owned(),
        ]);
        let output = client.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{mode}: {}: {said}", output.status);
        ensure!(said.matches("HTML Response").count() == 5, "{mode}: {said}");
    }
    Ok(())
}
