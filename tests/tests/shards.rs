//! Several shards on either side: every way in reaches every worker, wherever its tunnel lives.

use std::collections::HashSet;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tunnel_tests::client::{self, connect_through, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs};
use tunnel_tests::target::Behaviour;

const SHARDS: u64 = 3;
const WORKERS: u8 = 2;
const BYTES: u64 = 3_000_001;
const SOON: Duration = Duration::from_secs(15);

/// Both workers' agents have a tunnel on each of the server's shards and spread them over their own.
fn lab() -> Result<Lab> {
    let spec = LabSpec::new(Programs::of_this_test()?);
    let mut lab = Lab::without_connector(LabSpec {
        workers: WORKERS,
        ..spec
    })?;
    lab.configure_connector()?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["shards"] = json!(SHARDS))?;
    for worker in &mut lab.workers {
        worker.agent()?.configure(|config| {
            config["shards"] = json!(2);
            config["tunnels"] = json!(SHARDS);
        })?;
    }
    lab.start_configured()?;
    let all = usize::from(WORKERS) * SHARDS as usize;
    let server = &lab.control_plane.servers[0].daemon;
    server.wait_status(SOON, |status| live(status, "agents").count() == all)?;
    Ok(lab)
}

fn live<'a>(status: &'a Value, of: &str) -> impl Iterator<Item = &'a Value> {
    let rows = status[of].as_array().into_iter().flatten();
    rows.filter(|row| row["state"] == "live")
}

fn shards<'a>(rows: impl Iterator<Item = &'a Value>) -> HashSet<u64> {
    rows.filter_map(|row| row["shard"].as_u64()).collect()
}

/// Streams on each shard.
fn streams(lab: &Lab, count: i64) -> Result<Vec<i64>> {
    let server = &lab.control_plane.servers[0].daemon;
    let sum = |status: &Value| -> Vec<i64> {
        let on = |shard| {
            let rows = live(status, "agents").filter(move |row| row["shard"] == shard);
            rows.filter_map(|row| row["streams"].as_i64()).sum()
        };
        (0..SHARDS).map(on).collect()
    };
    let settled = server.wait_status(SOON, |status| sum(status).iter().sum::<i64>() == count)?;
    Ok(sum(&settled))
}

#[test]
fn every_way_in_reaches_every_worker_wherever_its_tunnels_live() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab()?;
    let server = &lab.control_plane.servers[0];
    let status: Value = serde_json::from_str(&server.daemon.get("/status")?.1)?;
    ensure!(status["shards"] == SHARDS, "{status}");
    for n in 1..=WORKERS {
        let own = format!("spiffe://cluster.local/agent/w{n}");
        let rows = live(&status, "agents").filter(|row| row["identity"] == own.as_str());
        ensure!(shards(rows).len() == SHARDS as usize, "of w{n}: {status}");
    }
    for worker in &mut lab.workers {
        let status: Value = serde_json::from_str(&worker.agent()?.get("/status")?.1)?;
        ensure!(shards(live(&status, "servers")).len() == 2, "{status}");
    }

    let certificates = lab.folder().join("client");
    let out = certificates.to_str().context("no UTF-8")?;
    let pki = lab.connector_pki.as_ref().context("no authority")?;
    pki.run("client", &["--name", "c", "--out", out])?;
    let server = &lab.control_plane.servers[0];
    for worker in &lab.workers {
        let node = worker.node_addresses()[0];
        let to = |it: Behaviour| SocketAddr::new(node, it.port());
        // Enough to go to each shard: the least loaded link is asked.
        let open = |dial: &dyn Fn() -> Result<Box<dyn Stream>>| -> Result<()> {
            let mut held = Vec::new();
            for _ in 0..SHARDS * 2 {
                let mut stream = dial()?;
                round_trips(&mut stream, 3)?;
                held.push(stream);
            }
            let spread = streams(&lab, SHARDS as i64 * 2)?;
            ensure!(spread.iter().all(|count| *count == 2), "{spread:?}");
            drop(held);
            streams(&lab, 0).map(drop)
        };
        lab.control_plane.as_apiserver(|| {
            open(&|| Ok(Box::new(TcpStream::connect(to(Behaviour::Echo))?)))?;
            let dial = |it| Ok(TcpStream::connect(to(it))?);
            let finish = |stream: &TcpStream| stream.shutdown(Shutdown::Write);
            both_ways(dial, finish).context("by the redirect")
        })?;
        let proxy = &server.sockets.connect_unix;
        let echo = to(Behaviour::Echo).to_string();
        open(&|| Ok(Box::new(connect_through(proxy, &echo)?)))?;
        let dial = |it| connect_through(proxy, &to(it).to_string());
        let finish = |stream: &UnixStream| stream.shutdown(Shutdown::Write);
        both_ways(dial, finish).context("by CONNECT")?;

        // Each begins on another shard than the one before.
        for round in 0..SHARDS {
            let mut curl: Command = lab.control_plane.netns.command("curl")?;
            curl.args(["--silent", "--http0.9", "--no-buffer", "--max-time", "2"])
                .args(["--proxytunnel", "--proxy"])
                .arg(format!("https://{}", server.sockets.connect_tcp))
                .arg("--proxy-cacert")
                .arg(server.daemon.config_file().with_file_name("ca.crt"))
                .arg("--proxy-cert")
                .arg(certificates.join("client.crt"))
                .arg("--proxy-key")
                .arg(certificates.join("client.key"))
                .arg(format!("http://{echo}/round-{round}"));
            let echoed = String::from_utf8(curl.output()?.stdout)?;
            let expected = format!("GET /round-{round} HTTP/1.1");
            ensure!(
                echoed.contains(&expected),
                "by CONNECT with TLS: {echoed:?}"
            );
        }
    }
    ensure!(lab.router.leaked()? == 0);
    Ok(())
}

trait Stream: std::io::Read + std::io::Write {}

impl<T: std::io::Read + std::io::Write> Stream for T {}

fn both_ways<S: std::io::Read + std::io::Write>(
    dial: impl Fn(Behaviour) -> Result<S>,
    finish: impl Fn(&S) -> std::io::Result<()>,
) -> Result<()> {
    client::download(dial(Behaviour::Source)?, BYTES).context("download")?;
    client::upload(dial(Behaviour::Sink)?, BYTES, finish).context("upload")?;
    Ok(())
}

/// The kernel steers by the connection id: what comes from another port or address is no stranger.
#[test]
fn tunnels_on_every_shard_outlive_a_new_mapping() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab()?;
    let node = lab.workers[0].node_addresses()[0];
    let dial = || Ok(TcpStream::connect((node, Behaviour::Echo.port()))?);
    let mut held = Vec::new();
    for _ in 0..SHARDS {
        let stream = lab.control_plane.as_apiserver(dial)?;
        stream.set_read_timeout(Some(SOON))?;
        round_trips(&stream, 3)?;
        held.push(stream);
    }
    ensure!(streams(&lab, SHARDS as i64)? == [1; SHARDS as usize]);
    lab.router.remap()?;
    for stream in &held {
        round_trips(stream, 3).context("after the NAT forgot its mappings")?;
    }
    lab.workers[0].change_address()?;
    for stream in &held {
        round_trips(stream, 3).context("after the worker's address changed")?;
    }
    let agent = lab.worker("w1")?.agent()?;
    ensure!(!agent.log().contains("tunnel ended"), "{}", agent.log());
    Ok(())
}

/// Two agents with a tunnel each have a shard each, wherever their first packets arrive.
#[test]
fn agents_are_spread_over_the_shards_by_load() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let spec = LabSpec::new(Programs::of_this_test()?);
    let mut lab = Lab::without_connector(LabSpec { workers: 2, ..spec })?;
    lab.configure_connector()?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["shards"] = json!(2))?;
    lab.start_configured()?;
    let mut seen = 0;
    for round in 1..=4 {
        let server = &lab.control_plane.servers[0].daemon;
        // Those of before are still there until their successors have come.
        let status = server.wait_status(SOON, |status| {
            let fresh = server.log().matches("agent connected").count() >= seen + 2;
            fresh && live(status, "agents").count() == 2
        })?;
        let spread = shards(live(&status, "agents"));
        ensure!(spread.len() == 2, "round {round}: {status}\n{}", lab.logs());
        seen = server.log().matches("agent connected").count();
        for worker in &mut lab.workers {
            worker.agent()?.terminate()?;
            worker.agent()?.start()?;
        }
    }
    Ok(())
}

/// Everything that a tunnel is restarts with it: a killed server's tunnels come back to all shards,
/// also when there are others than before.
#[test]
fn tunnels_come_back_to_another_number_of_shards() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab()?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.kill()?;
    server.configure(|config| config["shards"] = json!(2))?;
    server.start()?;
    let all = usize::from(WORKERS) * SHARDS as usize;
    let back = |status: &Value| live(status, "agents").count() == all;
    let status = server.wait_status(SOON, back)?;
    ensure!(shards(live(&status, "agents")).len() == 2, "{status}");
    server.terminate()?;
    let agent = lab.worker("w1")?.agent()?;
    // A goodbye arrives on every shard.
    agent.wait_status(SOON, |status| live(status, "servers").count() == 0)?;
    Ok(())
}
