//! gRPC on several shards: a stream stays where its HTTP/2 connection lives, and is carried to the
//! link of its agent wherever that lives.

use std::io::{Read, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tunnel_tests::client::{eventually, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

use crate::legacy_frontend::{connect, dial, dial_on};
use crate::place::Place;

const SHARDS: u8 = 3;
const WORKERS: u8 = 2;
const SOON: Duration = Duration::from_secs(15);

#[test]
fn streams_reach_agents_on_every_shard() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let spec = LabSpec::new(Programs::of_this_test()?);
    let mut lab = Lab::without_connector(LabSpec {
        workers: WORKERS,
        redirect: false,
        ..spec
    })?;
    lab.configure_connector()?;
    let socket = lab.folder().join("grpc.sock");
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| {
        config["shards"] = json!(SHARDS);
        config["frontends"]["grpc"] = json!([{"unix": socket}]);
    })?;
    for worker in &mut lab.workers {
        let agent = worker.agent()?;
        agent.configure(|config| config["tunnels"] = json!(SHARDS))?;
    }
    lab.start_configured()?;
    let server = &lab.control_plane.servers[0].daemon;
    server.wait_status(SOON, |status| {
        let agents = status["agents"].as_array();
        agents.is_some_and(|agents| agents.len() == usize::from(WORKERS * SHARDS))
    })?;
    let place = Place::new(&lab.control_plane.netns)?;
    for worker in 1..=WORKERS {
        let to = |it: Behaviour| format!("{}:{}", address::node(worker), it.port());
        // Each connection is another shard's, and asks the links of each.
        for _ in 0..SHARDS {
            let client = connect(&place, &socket)?;
            let mut held = Vec::new();
            for _ in 0..SHARDS {
                let mut stream = dial_on(&place, &client, &to(Behaviour::Echo))?;
                round_trips(&mut stream, 3)?;
                held.push(stream);
            }
            // A reader that stops stalls its stream alone.
            let stopped = dial_on(&place, &client, &to(Behaviour::Source))?;
            for stream in &mut held {
                round_trips(stream, 3)?;
            }
            drop(stopped);
            for stream in held {
                ensure!(stream.close()?.is_empty());
            }
        }
        for _ in 0..SHARDS {
            let refused = dial(&place, &socket, &format!("{}:9", address::node(worker)));
            ensure!(refused.is_err(), "nobody listens there");
        }
    }
    // Nothing is left of any.
    eventually(SOON, || {
        let (_, metrics) = server.get("/metrics")?;
        let mut lines = metrics.lines();
        let open = lines.find_map(|line| line.strip_prefix("cpc_connections "));
        ensure!(open.context("no metric")? == "0", "{open:?}");
        Ok(())
    })?;
    let mut last = dial(
        &place,
        &socket,
        &format!("{}:{}", address::node(1), Behaviour::Echo.port()),
    )?;
    last.write_all(b"x")?;
    last.read_exact(&mut [0])?;
    Ok(())
}
