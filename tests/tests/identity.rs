//! Two that claim to be one: node addresses, server ids, and a server that comes back as itself.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tunnel_tests::client::{connect_through, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::steady::Steady;
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);

fn echo(n: u8) -> SocketAddr {
    (address::node(n), Behaviour::Echo.port()).into()
}

/// A round trip through CONNECT; the error is what the client was told.
fn through(lab: &Lab, destination: SocketAddr) -> Result<()> {
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    let stream = connect_through(proxy, &destination.to_string())?;
    stream.set_read_timeout(Some(SOON))?;
    round_trips(stream, 1).map(drop)
}

/// A second identity that has the first one's node address in its certificate is connected, and
/// refused that address: shown in the status, and the first goes on.
#[test]
fn a_node_address_has_one_owner() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let spec = LabSpec::new(Programs::of_this_test()?);
    let mut lab = Lab::without_connector(LabSpec { workers: 2, ..spec })?;
    lab.configure_connector()?;
    let out = lab.folder().join("twin");
    let folder = out.to_str().context("not UTF-8")?;
    let node = address::node(1).to_string();
    lab.pki()
        .run("agent", &["--node", "w9", "--ip", &node, "--out", folder])?;
    lab.control_plane.servers[0].daemon.start()?;
    lab.workers[0].agent()?.start()?;
    lab.workers[0].agent()?.wait_ready(SOON)?;
    let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
    let steady = Steady::start(proxy, echo(1).to_string());
    let twin = lab.workers[1].agent()?;
    twin.configure(|config| {
        config["tls"] = json!({
            "cert": out.join("agent.crt"), "key": out.join("agent.key"), "ca": out.join("ca.crt"),
        });
        config["serve"] = json!({});
    })?;
    twin.start()?;
    twin.wait_ready(SOON)?;
    twin.wait_log(SOON, 0, &["WARN", "the server refuses claims", &node])?;
    let mut cpc = lab
        .control_plane
        .netns
        .command(Programs::of_this_test()?.cpc)?;
    let admin = lab.control_plane.servers[0].sockets.admin.to_string();
    let status = cpc.args(["status", "--json", "--admin", &admin]).output()?;
    let status: Value = serde_json::from_slice(&status.stdout)?;
    let agents = status["agents"].as_array().context("no agents")?;
    let of = |name: &str| {
        let identity = json!(format!("spiffe://cluster.local/agent/{name}"));
        agents.iter().find(|agent| agent["identity"] == identity)
    };
    let (first, second) = (of("w1").context("no w1")?, of("w9").context("no w9")?);
    assert_eq!(first["refused"], json!([]), "{status}");
    assert_eq!(second["routes"], json!([]), "{status}");
    assert_eq!(second["refused"][0]["claim"], node.as_str(), "{status}");
    let why = second["refused"][0]["why"].as_str().unwrap_or_default();
    ensure!(why.contains("spiffe://cluster.local/agent/w1"), "{why}");
    steady.finish().map(drop)
}

/// Two servers have one id by mistake: the agent keeps the first, logs the conflict, and no
/// connection is disturbed.
#[test]
fn two_servers_with_one_id_do_not_fight() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let spec = LabSpec::new(Programs::of_this_test()?);
    let mut lab = Lab::without_connector(LabSpec { servers: 2, ..spec })?;
    lab.configure_connector()?;
    for file in ["server.crt", "server.key"] {
        let file = Path::new(file);
        std::fs::copy(
            lab.folder().join("s1").join(file),
            lab.folder().join("s2").join(file),
        )?;
    }
    lab.control_plane.servers[0].daemon.start()?;
    lab.workers[0].agent()?.start()?;
    lab.workers[0].agent()?.wait_ready(SOON)?;
    let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
    let held = connect_through(&proxy, &echo(1).to_string())?;
    let steady = Steady::start(proxy, echo(1).to_string());
    lab.control_plane.servers[1].daemon.start()?;
    let pieces = [
        "WARN",
        "192.0.2.2:8132",
        "192.0.2.1:8132 is a server s1 too",
    ];
    lab.workers[0].agent()?.wait_log(SOON, 0, &pieces)?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(!lab.workers[0].agent()?.log().contains("tunnel ended"));
    round_trips(&held, 3)?;
    steady.finish().map(drop)
}

/// A server that was killed and started again knows the agent's connection by its persisted
/// secret and resets it: the agent does not wait for a time-out. Without the secret it would.
#[test]
fn the_secret_outlives_the_process() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let secret = lab.folder().join("s1/state/secret");
    let before = std::fs::read(&secret)?;
    assert_eq!(before.len(), 32);
    assert_eq!(
        std::fs::metadata(&secret)?.permissions().mode() & 0o777,
        0o600
    );
    let seen = lab.workers[0].agent()?.log().len();
    let server = &mut lab.control_plane.servers[0].daemon;
    server.kill()?;
    server.start()?;
    let agent = lab.workers[0].agent()?;
    agent.wait_log(SOON, seen, &["tunnel ended", "s1", "reset by peer"])?;
    agent.wait_log(SOON, seen, &["tunnel is up", "s1"])?;
    lab.control_plane.servers[0].daemon.wait_ready(SOON)?;
    assert_eq!(std::fs::read(&secret)?, before);
    through(&lab, echo(1))
}
