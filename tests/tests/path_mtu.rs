//! The size of packets: found by probing, configured, and shown by both sides.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tunnel_tests::client::{self, eventually};
use tunnel_tests::frontend::Frontend;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);
const BYTES: u64 = 20_000_000;

/// A laboratory whose links take packets of these sizes.
fn laboratory(control_plane: u16, worker: u16) -> Result<Lab> {
    let lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    let set = |netns: &lab::netns::Netns, device: &str, mtu| {
        netns.ip(&format!("link set {device} mtu {mtu}\n"))
    };
    set(&lab.control_plane.netns, "eth0", control_plane)?;
    set(&lab.router.netns, "cp", control_plane)?;
    set(&lab.router.netns, "w1", worker)?;
    set(&lab.workers[0].netns, "eth0", worker)?;
    Ok(lab)
}

/// The sizes that the server and the agent say they send.
fn sizes(lab: &mut Lab) -> Result<[u64; 2]> {
    let of = |status: Value, rows: &str| {
        status[rows][0]["mtu"]
            .as_u64()
            .with_context(|| format!("no mtu in {status}"))
    };
    let server = lab.control_plane.servers[0]
        .daemon
        .wait_status(SOON, |_| true)?;
    let agent = lab.workers[0].agent()?.wait_status(SOON, |_| true)?;
    Ok([of(server, "agents")?, of(agent, "servers")?])
}

fn become_large(lab: &mut Lab, smallest: u64, largest: u64) -> Result<()> {
    eventually(SOON, || {
        let sizes = sizes(lab)?;
        let fit = |size: &u64| (smallest..=largest).contains(size);
        ensure!(sizes.iter().all(fit), "{sizes:?}");
        println!("server and agent send {sizes:?}");
        Ok(())
    })
}

fn both_ways(lab: &Lab) -> Result<()> {
    let dial = |it: Behaviour| {
        let target = SocketAddr::from((address::node(1), it.port()));
        Frontend::Redirect.dial(lab, target).map(TcpStream::from)
    };
    let down = client::download(dial(Behaviour::Source)?, BYTES)?;
    let finish = |stream: &TcpStream| stream.shutdown(Shutdown::Write);
    let up = client::upload(dial(Behaviour::Sink)?, BYTES, finish)?;
    let [down, up] = [down, up].map(|it| it.megabytes_per_second());
    println!("{down:.0} MB/s down, {up:.0} MB/s up");
    Ok(())
}

#[test]
fn jumbo_frames_are_found_and_used() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = laboratory(9000, 9000)?;
    lab.start_connector()?;
    become_large(&mut lab, 8900, 9000)?;
    both_ways(&lab)?;
    let metrics = lab.control_plane.servers[0].daemon.get("/metrics")?.1;
    let value = |sample: &str| -> Result<f64> {
        let line = metrics.lines().find_map(|line| line.strip_prefix(sample));
        Ok(line
            .with_context(|| format!("no {sample}"))?
            .trim()
            .parse()?)
    };
    for direction in ["send", "receive"] {
        let of = |name| {
            value(&format!(
                "cpc_udp_{name}_total{{direction=\"{direction}\"}}"
            ))
        };
        let (calls, datagrams, bytes) = (of("calls")?, of("datagrams")?, of("bytes")?);
        println!(
            "{direction}: {calls} calls, {:.1} datagrams a call, {:.0} bytes a datagram",
            datagrams / calls,
            bytes / datagrams
        );
        ensure!(calls <= datagrams && bytes > BYTES as f64);
        // A batch has 7 of this size at most.
        ensure!(datagrams > 1.2 * calls, "offloads move one datagram a call");
    }
    // They did not become small again on the way.
    become_large(&mut lab, 8900, 9000)
}

/// A worker with jumbo frames behind a path without: what does not pass is given up.
#[test]
fn a_path_may_take_less_than_the_interface() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = laboratory(1500, 9000)?;
    lab.start_connector()?;
    become_large(&mut lab, 1470, 1500)?;
    both_ways(&lab)?;
    become_large(&mut lab, 1470, 1500)
}

#[test]
fn a_configured_transport_is_in_force() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = laboratory(1500, 1500)?;
    lab.configure_connector()?;
    let transport = json!({"mtu": 1400, "congestion": "bbr", "ack_every": 10});
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["transport"] = transport)?;
    let transport = json!({"max_mtu": 1300, "congestion": "newreno", "ack_every": 1});
    let agent = lab.workers[0].agent()?;
    agent.configure(|config| config["transport"] = transport)?;
    lab.start_configured()?;
    both_ways(&lab)?;
    let [server, agent] = sizes(&mut lab)?;
    ensure!(server == 1400, "the server sends {server}");
    ensure!((1280..=1300).contains(&agent), "the agent sends {agent}");
    Ok(())
}
