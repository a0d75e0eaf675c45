//! The connector in the laboratory: every way in, to every address of every worker.

use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};
use tunnel_tests::client;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs};
use tunnel_tests::target::Behaviour;

const BYTES: u64 = 3_000_001;
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn each_server_reaches_each_worker_by_each_way_in() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let spec = LabSpec::new(Programs::of_this_test()?);
    let lab = Lab::up(LabSpec {
        workers: 2,
        servers: 2,
        ..spec
    })?;
    for worker in &lab.workers {
        for address in worker
            .node_addresses()
            .into_iter()
            .chain(worker.pod_addresses())
        {
            lab.control_plane
                .as_apiserver(|| {
                    let dial = |it: Behaviour| Ok(TcpStream::connect((address, it.port()))?);
                    both_ways(dial, |stream| stream.shutdown(Shutdown::Write))
                })
                .with_context(|| format!("{address} by the redirect"))?;
            for server in &lab.control_plane.servers {
                let dial = |it: Behaviour| {
                    let destination = std::net::SocketAddr::new(address, it.port()).to_string();
                    client::connect_through(&server.sockets.connect_unix, &destination)
                };
                both_ways(dial, |stream: &UnixStream| stream.shutdown(Shutdown::Write))
                    .with_context(|| format!("{address} by CONNECT to {}", server.daemon.name))?;
            }
        }
    }
    assert_eq!(lab.router.leaked()?, 0);
    Ok(())
}

fn both_ways<S: std::io::Read + std::io::Write>(
    dial: impl Fn(Behaviour) -> Result<S>,
    finish: impl Fn(&S) -> std::io::Result<()>,
) -> Result<()> {
    client::round_trips(dial(Behaviour::Echo)?, 3)?;
    client::download(dial(Behaviour::Source)?, BYTES).context("download")?;
    client::upload(dial(Behaviour::Sink)?, BYTES, finish).context("upload")?;
    Ok(())
}

#[test]
fn a_transfer_goes_on_while_the_way_changes() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let node = lab.workers[0].node_addresses()[0];
    let dial = || Ok(TcpStream::connect((node, Behaviour::Echo.port()))?);
    let mut stream = lab.control_plane.as_apiserver(dial)?;
    // The agent's next sign of life finds the new way; a slow machine takes several.
    stream.set_read_timeout(Some(3 * PATIENCE))?;
    client::round_trips(&mut stream, 3)?;
    lab.router.remap()?;
    client::round_trips(&mut stream, 3).context("after the NAT forgot its mappings")?;
    lab.workers[0].change_address()?;
    client::round_trips(&mut stream, 3).context("after the worker's address changed")?;
    Ok(())
}

#[test]
fn a_killed_server_and_a_killed_agent_come_back() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let node = lab.workers[0].node_addresses()[0];
    let fetch = |lab: &Lab| {
        lab.control_plane.as_apiserver(|| {
            let stream = TcpStream::connect((node, Behaviour::Source.port()))?;
            // A dial that went to the dead agent waits for an answer; another is tried meanwhile.
            stream.set_read_timeout(Some(PATIENCE / 10))?;
            client::download(stream, BYTES)
        })
    };
    fetch(&lab)?;
    let agent = lab.worker("w1")?.agent()?;
    agent.kill()?;
    agent.start()?;
    client::eventually(PATIENCE, || fetch(&lab)).context("after the agent was killed")?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.kill()?;
    server.start()?;
    client::eventually(PATIENCE, || fetch(&lab)).context("after the server was killed")?;
    Ok(())
}
