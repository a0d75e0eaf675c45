//! Newer clients of the peer's (`ReusableTunnel`) keep one gRPC connection and open a stream of it for
//! each dial.

use anyhow::{Result, ensure};
use tonic::metadata::MetadataMap;
use tunnel_tests::client::eventually;
use tunnel_tests::exposition::Page;
use tunnel_tests::lab;

use crate::client::Client;
use crate::scene::Scene;
use crate::script::SOON;
use crate::wire::{self, PROXY};

/// Streams of one connection, more than HTTP/2 grants where nothing is said.
const STREAMS: i64 = 120;

const PREFIX: &str = "konnectivity_network_proxy_server_";

/// Each is a connection of its own, ends alone and is counted.
#[test]
fn one_connection_carries_a_stream_for_each_dial() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let scene = Scene::new(1)?;
    let mut server = scene.proxy_server(&scene.ours()?, "grpc", &[])?;
    server.wait_healthy(SOON)?;
    let mut agent = scene.script_agent(1, "a", "")?;
    let place = &scene.control_plane;
    let client = place.run(Client::unix(scene.frontend("grpc")))?;
    let open = || client.script(place, PROXY, MetadataMap::new(), 1);

    // One gives up while it is dialled, and takes no other with it.
    let given_up = open();
    given_up.send(wire::dial("10.99.1.2:7001", 1))?;
    let asked = agent.dialled()?;
    drop(given_up);
    let gave_up = agent.payload()?;
    ensure!(
        gave_up
            == wire::Payload::CloseDial(wire::CloseDial {
                random: asked.random
            })
    );

    let mut streams = Vec::new();
    for number in 1..=STREAMS {
        let mut stream = open();
        stream.send(wire::dial("10.99.1.2:7001", 1000 + number))?;
        agent.accept(number)?;
        let id = stream.dial_response()?.connect_id;
        streams.push((stream, id));
    }
    for (number, (stream, id)) in (1..).zip(&streams) {
        stream.send(wire::data(*id, format!("{number:04}")))?;
        ensure!(agent.data(number, 4)? == format!("{number:04}").as_bytes());
    }
    let counted = |expected: &[(&str, i64)]| {
        let (_, text) = server.get("/metrics")?;
        let page = Page::read(&text)?;
        for (sample, count) in expected {
            let name = format!("{PREFIX}{sample}");
            let mut families = page.families().values();
            let value = families.find_map(|family| family.samples.get(&name));
            ensure!(
                value == Some(&(*count as f64)),
                "{name} is {value:?}, not {count}"
            );
        }
        Ok(())
    };
    eventually(SOON, || {
        counted(&[
            ("grpc_connections{service_method=\"Proxy\"}", STREAMS),
            ("established_connections", STREAMS),
            ("dial_failure_count{reason=\"frontend_close\"}", 1),
            (
                "stream_packets_total{segment=\"from_client\",packet_type=\"DIAL_REQ\"}",
                STREAMS + 1,
            ),
            (
                "stream_packets_total{segment=\"from_client\",packet_type=\"DATA\"}",
                STREAMS,
            ),
            (
                "stream_packets_total{segment=\"to_client\",packet_type=\"DIAL_RSP\"}",
                STREAMS,
            ),
            ("frontend_write_duration_seconds_count", STREAMS),
        ])
    })?;

    for (number, (stream, id)) in (1..).zip(&mut streams) {
        agent.send(wire::closed(number, ""))?;
        stream.expect(wire::closed(*id, ""))?;
        stream.finish();
        stream.ended_well()?;
    }
    eventually(SOON, || {
        counted(&[
            ("grpc_connections{service_method=\"Proxy\"}", 0),
            ("established_connections", 0),
            ("connection_duration_seconds_count", STREAMS),
            ("frontend_write_duration_seconds_count", 2 * STREAMS),
        ])
    })
}
