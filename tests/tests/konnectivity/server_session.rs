//! The arrival of an agent at a proxy-server: certificates, metadata, server ids, pages.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tonic::Code;
use tunnel_tests::client::eventually;
use tunnel_tests::exposition::Page;
use tunnel_tests::lab::{self, address};

use crate::authority::Authority;
use crate::program::Maker;
use crate::scene::{Scene, each_server};
use crate::script::SOON;
use crate::wire;

/// Number of repetitions of DRAIN.
const REPEATS: usize = 1000;

/// Each server says who it is and how many there are, at once and once.
#[test]
fn a_server_introduces_itself_before_the_first_packet() -> Result<()> {
    each_server("grpc", &["--server-count=2"], |scene, maker| {
        let mut agent = scene.script_agent(1, "a", "")?;
        let id = agent.header("serverid")?;
        ensure!(id == "legacy-server", "{id}");
        let count: usize = agent.header("servercount")?.parse()?;
        // Ours has several ids, so that an agent opens as many streams.
        let peers = matches!(maker, Maker::Peer(_));
        ensure!(
            if peers {
                count == 2
            } else {
                count.is_multiple_of(2) && count > 0
            },
            "{count}"
        );
        agent.quiet()
    })
}

/// An agent may send this metadata, and other metadata ends its stream.
#[test]
fn an_agent_is_refused_for_its_metadata_alone() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let tls = scene.agent.client()?;
        let refused: [(&[_], _); 3] = [
            (&[], "expected one agent ID in the context, got []"),
            (
                &[("agentid", "a"), ("agentid", "b")],
                "expected one agent ID in the context, got [a b]",
            ),
            (
                &[
                    ("agentid", "a"),
                    ("agentidentifiers", "host=x"),
                    ("agentidentifiers", "host=y"),
                ],
                "expected at most one set of agent identifiers in the context, got [host=x host=y]",
            ),
        ];
        for (entries, text) in refused {
            let status = scene.agent_stream(1, entries, tls.clone())?.ended()?;
            ensure!(status.code() == Code::Unknown, "{entries:?}: {status:?}");
            ensure!(status.message() == text, "{entries:?}: {status:?}");
        }
        let taken: [&[_]; 5] = [
            &[("agentid", "a")],
            &[("agentid", "b"), ("agentidentifiers", "")],
            &[
                ("agentid", "c"),
                ("agentidentifiers", "ipv4=10.0.0.1&ipv4=10.0.0.2&host=x"),
            ],
            &[
                ("agentid", "d"),
                ("agentidentifiers", "colour=red&default-route=perhaps"),
            ],
            &[
                ("agentid", "e"),
                ("agentidentifiers", "cidr=10.0.0.0%2F8&ipv6=fd00%3A%3A1"),
            ],
        ];
        for entries in taken {
            let mut agent = scene.agent_stream(1, entries, tls.clone())?;
            agent.headers().with_context(|| format!("{entries:?}"))?;
            agent.quiet()?;
        }
        Ok(())
    })
}

/// With an authority for agents, a certificate of that authority is the way in.
#[test]
fn a_server_asks_for_certificates_where_it_knows_an_authority() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let entries = [("agentid", "a"), ("agentidentifiers", "")];
        let foreign = Authority::create(scene.lab.folder().join("foreign"))?.issue("agent", &[])?;
        // The foreign agent believes the server all the same.
        let foreign = crate::authority::Credentials {
            ca: scene.agent.ca.clone(),
            ..foreign
        };
        let cases = [
            ("none", scene.agent.anonymous()?),
            ("of another authority", foreign.client()?),
        ];
        for (certificate, tls) in cases {
            // In TLS 1.3 the client has finished before the server has judged.
            let refused = match scene.agent_stream(1, &entries, tls) {
                Ok(mut agent) => agent.headers().is_err(),
                Err(_) => true,
            };
            ensure!(refused, "a certificate {certificate} was taken");
        }
        scene
            .agent_stream(1, &entries, scene.agent.client()?)?
            .headers()
            .map(drop)
    })?;
    // A later flag counts: an empty authority is none.
    each_server("grpc", &["--cluster-ca-cert="], |scene, _| {
        let entries = [("agentid", "a"), ("agentidentifiers", "")];
        let mut agent = scene.agent_stream(1, &entries, scene.agent.anonymous()?)?;
        agent.headers().map(drop)
    })
}

/// Health says whether there is an agent, and a method is known or not.
#[test]
fn the_pages_tell_whether_there_is_an_agent() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let ours = Maker::Ours(lab::Programs::of_this_test()?.cpc);
    for maker in [Maker::peer(), Some(ours)].into_iter().flatten() {
        let scene = Scene::new(1)?;
        let more = ["--proxy-strategies=default"];
        let mut server = scene.proxy_server(&maker, "grpc", &more)?;
        server.wait_healthy(SOON)?;
        let page = |path: &str, status: u16, body: &str| {
            let expected = (status, body.to_owned());
            let got = server.get(path)?;
            ensure!(got == expected, "{maker:?}: {path}: {got:?}");
            Ok(())
        };
        page("/healthz", 200, "ok")?;
        for path in ["/readyz", "/ready"] {
            page(path, 500, "no connection to any proxy agent")?;
        }
        let agent = scene.script_agent(1, "a", "")?;
        for path in ["/readyz", "/ready"] {
            eventually(SOON, || page(path, 200, "ok"))?;
        }
        let (status, metrics) = server.get("/metrics")?;
        let backends =
            r#"konnectivity_network_proxy_server_ready_backends{proxy_strategy="default"} 1"#;
        ensure!(
            status == 200 && metrics.contains(backends),
            "{maker:?}: {metrics}"
        );
        if let Maker::Ours(_) = maker {
            Page::read(&metrics)?;
        }
        drop(agent);
        eventually(SOON, || {
            page("/readyz", 500, "no connection to any proxy agent")
        })?;
    }
    Ok(())
}

/// New dials go to agents that do not drain, and to one that drains if there is no other.
#[test]
fn who_drains_is_asked_last() -> Result<()> {
    each_server("grpc", &["--proxy-strategies=default"], |scene, _| {
        let mut leaving = scene.script_agent(1, "leaving", "")?;
        leaving.send(wire::drain())?;
        let mut client = scene.script_client()?;
        client.send(wire::dial("10.0.0.1:1", 1))?;
        leaving.accept(1).context("nobody else is there")?;
        client.dial_response()?;

        let mut staying = scene.script_agent(1, "staying", "")?;
        let mut clients = Vec::new();
        for random in 2..8 {
            let mut client = scene.script_client()?;
            client.send(wire::dial("10.0.0.1:1", random))?;
            staying.accept(random).context("somebody else is there")?;
            client.dial_response()?;
            clients.push(client);
        }
        leaving.quiet()
    })
}

/// An agent that repeats DRAIN drains once: the server logs one line and still dials the agent.
#[test]
fn a_drain_that_is_repeated_is_one() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut scene = Scene::with_server(1, |_| ())?;
    let mut agent = scene.script_agent(1, "leaving", "ipv4=10.7.7.7")?;
    for _ in 0..REPEATS {
        agent.send(wire::drain())?;
    }
    // Behind them.
    let mut client = scene.client_at(scene.grpc())?;
    client.send(wire::dial("10.7.7.7:1", 1))?;
    agent.accept(1)?;
    client.dial_response()?;
    let server = scene.cpc_server();
    server.wait_status(SOON, |status| status["agents"][0]["state"] == "draining")?;
    let log = server.log();
    assert_eq!(log.matches("agent is draining").count(), 1, "{log}");
    let lines = log.lines().count();
    ensure!(lines < 100, "{lines} lines: {log}");
    agent.quiet()
}

/// By destination, whatever comes first in the list of strategies.
#[test]
fn strategies_are_tried_in_order() -> Result<()> {
    let strategies = ["--proxy-strategies=destHost,defaultRoute"];
    each_server("grpc", &strategies, |scene, _| {
        let mut by_host = scene.script_agent(1, "host", "host=node.example&ipv4=10.7.7.7")?;
        let mut route = scene.script_agent(1, "route", "default-route=true")?;
        let mut clients = Vec::new();
        let mut neither = scene.script_agent(1, "neither", "default-route=false&host=other")?;
        for (random, (destination, host)) in (1..).zip([
            ("10.7.7.7:1", true),
            ("node.example:443", true),
            ("10.7.7.8:1", false),
            ("unknown.example:443", false),
        ]) {
            let mut client = scene.script_client()?;
            client.send(wire::dial(destination, random))?;
            let agent = if host { &mut by_host } else { &mut route };
            let request = agent.accept(random).context(destination)?;
            ensure!(request.address == destination, "{request:?}");
            client.dial_response()?;
            clients.push(client);
        }
        neither.quiet()?;
        drop(route);
        // The peer may still send a dial to who has just gone, and then never answers it.
        std::thread::sleep(Duration::from_millis(300));
        let gone = || {
            let response = scene.script_client()?.dial("10.7.7.8:1", 9)?;
            ensure!(
                response.error.starts_with("No agent available"),
                "{response:?}"
            );
            Ok(())
        };
        eventually(Duration::from_secs(5), gone)
    })
}

/// The port is 8091 on every address of the machine.
#[test]
fn agents_reach_a_server_by_ipv6_too() -> Result<()> {
    each_server("grpc", &[], |scene, _| {
        let place = &scene.workers[0];
        let address = format!("[{}]:{}", address::server_v6(1), crate::scene::AGENTS);
        let tls = scene.agent.client()?;
        let client = place.run(crate::client::Client::tls(address, tls))?;
        let entries = [("agentid", "a"), ("agentidentifiers", "")];
        client
            .agent(place, crate::client::metadata(&entries)?)
            .headers()
            .map(drop)
    })
}
