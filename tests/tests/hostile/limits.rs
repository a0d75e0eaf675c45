//! At each bound new work is refused at once, by a text that names the bound, while old work goes on.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use quinn::{Connection, RecvStream, SendStream};
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tunnel_proto::close::CloseReason;
use tunnel_tests::client::{ask_proxy, eventually, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

use crate::peer::{self, Credentials};
use crate::scene::{SOON, Scene, echo, metric, runtime};

/// Handshakes of a flood.
const FLOOD: usize = 400;
/// Timeout of an unanswered dial: a refusal comes long before.
const DIAL: Duration = Duration::from_secs(60);

/// An agent that is welcome and answers no dial.
struct Mute {
    connection: Connection,
    _control: (SendStream, RecvStream),
}

impl Mute {
    fn connect(runtime: &Handle, lab: &Lab) -> Result<Self> {
        let credentials = Credentials::read(&lab.folder().join("w2/agent"), "agent")?;
        let endpoint = peer::agent(
            runtime,
            lab.workers[1].netns.enter(peer::any_port)?,
            Some(&credentials),
            100,
        )?;
        let tunnel = lab.control_plane.servers[0].sockets.tunnel;
        let hello = peer::introduction("w2", &address::nodes(2))?;
        runtime.block_on(async {
            let connection = peer::dial(&endpoint, tunnel).await?;
            let (mut send, mut recv) = connection.open_bi().await?;
            send.write_all(&hello).await?;
            // Refused, it is told so by the end of the connection.
            let _ = recv.read_chunk(1, true).await;
            Ok(Self {
                connection,
                _control: (send, recv),
            })
        })
    }
}

/// A laboratory with one honest agent, whose server has these bounds.
fn lab_with(mut limits: Value) -> Result<Lab> {
    limits["dial_timeout"] = json!(format!("{}s", DIAL.as_secs()));
    let spec = LabSpec::new(Programs::of_this_test()?);
    let mut lab = Lab::without_connector(LabSpec { workers: 2, ..spec })?;
    lab.configure_connector()?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["limits"] = limits)?;
    server.start()?;
    lab.workers[0].agent()?.start()?;
    lab.workers[0].agent()?.wait_ready(SOON)?;
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    Ok(lab)
}

fn frontend(lab: &Lab) -> Result<UnixStream> {
    let stream = UnixStream::connect(&lab.control_plane.servers[0].sockets.connect_unix)?;
    stream.set_read_timeout(Some(SOON))?;
    Ok(stream)
}

fn connect(lab: &Lab, destination: SocketAddr) -> Result<UnixStream> {
    let stream = frontend(lab)?;
    ask_proxy(&stream, &destination.to_string())?;
    Ok(stream)
}

/// The next one is told of `limits.KEY`, soon, and counted.
fn refused(lab: &Lab, key: &str, destination: SocketAddr) -> Result<()> {
    let begun = Instant::now();
    let told = connect(lab, destination).err().context("it was let in")?;
    ensure!(begun.elapsed() < DIAL / 2, "it had to wait");
    let text = format!("{told:#}");
    ensure!(text.contains(&format!("(limits.{key})")), "{text}");
    let server = &lab.control_plane.servers[0].daemon;
    let counted = metric(
        server,
        &format!("cpc_limit_refused_total{{limit=\"{key}\"}}"),
    )?;
    ensure!(counted >= 1.0, "limits.{key}: not counted");
    Ok(())
}

#[test]
fn connections_are_bounded_by_name() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for key in [
        "connections",
        "connections_per_tenant",
        "connections_per_tunnel",
    ] {
        let lab = lab_with(json!({key: 3}))?;
        let mut open = Vec::new();
        for _ in 0..3 {
            open.push(connect(&lab, echo())?);
        }
        refused(&lab, key, echo())?;
        for stream in &open {
            round_trips(stream, 1).context("what was open before")?;
        }
        drop(open);
        eventually(SOON, || connect(&lab, echo())).context("after the others have gone")?;
    }
    Ok(())
}

#[test]
fn dials_under_way_are_bounded_by_name() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let runtime = runtime()?;
    let silence = SocketAddr::new(address::nodes(2)[0], Behaviour::Echo.port());
    for key in ["dials", "dials_per_tenant", "dials_per_tunnel"] {
        let lab = lab_with(json!({key: 3}))?;
        let _mute = Mute::connect(&runtime, &lab)?;
        let old = connect(&lab, echo())?;
        let mut waiting = Vec::new();
        for _ in 0..3 {
            let mut stream = frontend(&lab)?;
            stream.write_all(format!("CONNECT {silence} HTTP/1.1\r\n\r\n").as_bytes())?;
            waiting.push(stream);
        }
        let server = &lab.control_plane.servers[0].daemon;
        eventually(SOON, || {
            let used = metric(server, "cpc_limit_used{limit=\"dials\"}")?;
            ensure!(used == 3.0, "{used} dials are under way");
            Ok(())
        })?;
        refused(&lab, key, silence)?;
        round_trips(&old, 1).context("what was open before")?;
        // An agent that answers nothing leaves the others theirs.
        if key == "dials_per_tunnel" {
            connect(&lab, echo())?;
        }
        drop(waiting);
        eventually(SOON, || connect(&lab, echo())).context("after the others have gone")?;
    }
    Ok(())
}

#[test]
fn agents_are_bounded_by_name() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let runtime = runtime()?;
    for key in ["agents", "agents_per_tenant"] {
        let lab = lab_with(json!({key: 2}))?;
        let old = connect(&lab, echo())?;
        let second = Mute::connect(&runtime, &lab)?;
        let third = Mute::connect(&runtime, &lab)?;
        let ended = runtime.block_on(peer::ended_by_peer(&third.connection, SOON));
        let (code, text) = ended?;
        assert_eq!(code.into_inner(), CloseReason::Overloaded.code(), "{text}");
        ensure!(text.contains(&format!("(limits.{key})")), "{text}");
        round_trips(&old, 1).context("what was open before")?;
        ensure!(second.connection.close_reason().is_none());
        let server = &lab.control_plane.servers[0].daemon;
        let counted = metric(
            server,
            &format!("cpc_limit_refused_total{{limit=\"{key}\"}}"),
        )?;
        assert_eq!(counted, 1.0);
    }
    Ok(())
}

/// One network begins handshakes without end, with a certificate that is good: it is refused at once,
/// an agent from elsewhere is not, and the log does not repeat it.
#[test]
fn a_flood_of_handshakes_keeps_no_other_network_out() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::new(|lab| {
        let handshakes = json!({"handshakes": {"per_second": 5, "burst": 40}});
        lab.control_plane.servers[0]
            .daemon
            .configure(|config| config["limits"] = handshakes)
    })?;
    let runtime = runtime()?;
    let credentials = Credentials::read(&scene.folder("w2/agent"), "agent")?;
    let tunnel = scene.tunnel();
    let flood = peer::agent(
        &runtime,
        scene.lab.workers[1].netns.enter(peer::any_port)?,
        Some(&credentials),
        1,
    )?;
    let elsewhere = peer::agent(
        &runtime,
        scene.lab.control_plane.netns.enter(peer::any_port)?,
        Some(&credentials),
        1,
    )?;
    let begun = Instant::now();
    let refused = runtime.block_on(async {
        let mut refused = 0;
        for _ in 0..FLOOD {
            match tokio::time::timeout(SOON, peer::dial(&flood, tunnel)).await {
                Ok(Ok(connection)) => connection.close(0_u8.into(), b""),
                Ok(Err(_)) => refused += 1,
                Err(_) => anyhow::bail!("a stranger had to wait for a refusal"),
            }
        }
        let admitted = tokio::time::timeout(SOON, peer::dial(&elsewhere, tunnel)).await;
        admitted
            .context("another network waits")?
            .context("another network is refused")?;
        Ok(refused)
    })?;
    let allowed = 40 + 5 * begun.elapsed().as_secs() as usize + 5;
    ensure!(refused + allowed >= FLOOD, "{refused} were refused");
    let counted = scene.metric("cpc_handshakes_failed_total{why=\"source_rate\"}")?;
    assert_eq!(counted, refused as f64);
    let log = scene.server().log();
    let lines = log
        .lines()
        .filter(|line| line.contains("handshake refused"));
    // What the log takes of one source: 100 at once and one more every 5 s.
    let (lines, further) = (lines.count(), begun.elapsed().as_secs() as usize / 5 + 1);
    ensure!((1..=100 + further).contains(&lines), "{lines} lines");
    ensure!(log.contains("limits.handshakes.per_second"), "{log}");

    // It is let in again once it is quiet.
    let dial = || runtime.block_on(peer::dial(&flood, tunnel)).map(drop);
    eventually(SOON, dial)?;
    scene.unharmed()
}
