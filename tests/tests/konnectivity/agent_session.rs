//! A proxy-agent's search for its servers: its metadata, its expectations, its retries.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tunnel_tests::client::eventually;
use tunnel_tests::exposition::Page;
use tunnel_tests::lab::{self, Programs};

use crate::client::metadata;
use crate::program::Maker;
use crate::scene::{Scene, each_agent};
use crate::script::SOON;
use crate::service::Incoming;
use crate::wire;

/// The only value of `key`.
fn one(incoming: &Incoming, key: &str) -> Result<String> {
    let values: Vec<_> = incoming.metadata.get_all(key).iter().collect();
    ensure!(values.len() == 1, "{key}: {values:?}");
    Ok(values[0].to_str()?.to_owned())
}

/// The identifiers in a query, in no order.
fn identifiers(query: &str) -> BTreeSet<String> {
    query
        .split('&')
        .map(|pair| pair.replace("%3A", ":").replace("%2F", "/"))
        .collect()
}

/// The agent announces its name and its identifiers, and no more.
#[test]
fn an_agent_introduces_itself() -> Result<()> {
    each_agent(&[], |_, _, agent, server| {
        let incoming = server.incoming()?;
        let id = one(&incoming, "agentid")?;
        ensure!(id == "legacy-1", "{id}");
        let said = identifiers(&one(&incoming, "agentidentifiers")?);
        let expected = ["ipv4=10.99.1.2", "ipv6=fd00:99:1::2", "host=w1"].map(str::to_owned);
        ensure!(said == BTreeSet::from(expected), "{said:?}");
        ensure!(
            incoming.metadata.get("authorization").is_none(),
            "{:?}",
            incoming.metadata
        );
        let mut stream = server.accept(incoming, "one", 1)?;
        agent.wait_ready(SOON)?;
        // One server is enough.
        let more = server.incoming_within(Duration::from_millis(2500))?;
        ensure!(more.is_none(), "{more:?}");
        stream.quiet()
    })
}

/// The agent reads its token for each connection.
#[test]
fn a_token_is_read_for_each_connection() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let ours = Maker::Ours(Programs::of_this_test()?.cpc);
    for maker in [Maker::peer(), Some(ours)].into_iter().flatten() {
        let scene = Scene::new(1)?;
        // The server asks for no certificate, and the agent has none.
        let server = scene.script_server(scene.server.open_server()?)?;
        let token = scene.lab.folder().join("token");
        fs::write(&token, "first")?;
        let flag = format!("--service-account-token-path={}", token.display());
        let flags = [flag.as_str(), "--agent-cert=", "--agent-key="];
        let agent = scene.proxy_agent(&maker, 1, &flags)?;
        let told = || format!("beside {maker:?}, which said:\n{}", agent.log());
        let incoming = server.incoming().with_context(told)?;
        ensure!(
            one(&incoming, "authorization")? == "Bearer first",
            "{maker:?}"
        );
        fs::write(&token, "second")?;
        drop(server.accept(incoming, "one", 1)?);
        let incoming = server.incoming().with_context(told)?;
        ensure!(
            one(&incoming, "authorization")? == "Bearer second",
            "{maker:?}"
        );
    }
    Ok(())
}

/// A server that does not say who it is is no server, whatever is missing.
#[test]
fn a_server_without_a_name_is_left() -> Result<()> {
    each_agent(
        &["--sync-interval=100ms", "--sync-interval-cap=300ms"],
        |_, _, agent, server| {
            let headers: [&[_]; 3] = [
                &[("servercount", "1")],
                &[("serverid", "a"), ("serverid", "b"), ("servercount", "1")],
                &[("serverid", "a"), ("servercount", "many")],
            ];
            for headers in headers {
                let incoming = server
                    .incoming()
                    .with_context(|| format!("before {headers:?}"))?;
                let mut stream = incoming.script(server.place(), metadata(headers)?, 1);
                let left = stream.packet_or_end(SOON)?;
                ensure!(matches!(left, Some(Err(_))), "{headers:?}: {left:?}");
            }
            let incoming = server.incoming()?;
            incoming.refuse(Status::unknown(
                "Failed to validate authentication token, err:no",
            ));
            let mut stream = server.agent()?;
            agent.wait_ready(SOON)?;
            stream.quiet()
        },
    )
}

/// The agent returns a second after its stream has ended, and with a growing backoff while it is
/// refused.
#[test]
fn an_agent_comes_again() -> Result<()> {
    each_agent(&[], |_, _, agent, server| {
        let stream = server.agent()?;
        agent.wait_ready(SOON)?;
        let start = Instant::now();
        drop(stream);
        let incoming = server.incoming()?;
        ensure!(
            start.elapsed() < Duration::from_secs(4),
            "{:?}",
            start.elapsed()
        );
        let mut last = Instant::now();
        incoming.refuse(Status::unavailable("not now"));
        let mut pauses = Vec::new();
        for _ in 0..3 {
            let incoming = server.incoming()?;
            pauses.push(last.elapsed());
            last = Instant::now();
            incoming.refuse(Status::unavailable("not now"));
        }
        let [first, .., third] = pauses[..] else {
            return Ok(());
        };
        ensure!(
            first < Duration::from_secs(3) && third < Duration::from_secs(5),
            "{pauses:?}"
        );
        ensure!(third > first, "it does not slow down: {pauses:?}");
        server.agent().map(drop)
    })
}

/// Behind one address it looks for as many servers as there are, and keeps one stream to each.
#[test]
fn an_agent_walks_through_a_load_balancer() -> Result<()> {
    each_agent(&["--sync-interval=200ms"], |_, _, _, server| {
        let mut held = Vec::new();
        let mut known = BTreeSet::new();
        for id in ["one", "one", "two", "one", "three"] {
            let incoming = server
                .incoming()
                .with_context(|| format!("{known:?} are known"))?;
            let mut stream = server.accept(incoming, id, 3)?;
            if known.insert(id) {
                stream.quiet()?;
                held.push(stream);
            } else {
                // The new stream goes, the old one stays. Ours asks first not to be chosen: what
                // the server has begun on the new stream by then is served.
                let mut end = stream.packet_or_end(SOON)?;
                if matches!(&end, Some(Ok(packet)) if *packet == wire::drain()) {
                    end = stream.packet_or_end(SOON)?;
                }
                ensure!(matches!(end, Some(Err(_))), "{id}: {end:?}");
            }
        }
        let more = server.incoming_within(Duration::from_secs(1))?;
        ensure!(more.is_none(), "{more:?}");
        for stream in &mut held {
            stream.send(wire::close(7))?;
            stream.expect(wire::closed(7, "Unknown connectID"))?;
        }
        // One is lost: it looks again, and finds it.
        drop(held.pop());
        let incoming = server.incoming()?;
        server.accept(incoming, "four", 3)?.quiet()
    })
}

/// The agent's pages show whether there is a server.
#[test]
fn the_pages_tell_whether_there_is_a_server() -> Result<()> {
    each_agent(&[], |_, maker, agent, server| {
        agent.wait_healthy(SOON)?;
        let page = |path: &str, status: u16, body: &str| {
            let expected = (status, body.to_owned());
            let got = agent.get(path)?;
            ensure!(got == expected, "{maker:?}: {path}: {got:?}");
            Ok(())
        };
        page("/healthz", 200, "ok")?;
        let none = "[+]ping ok\n[-]server-connected failed: no servers connected\n";
        for path in ["/readyz", "/ready"] {
            page(path, 503, none)?;
        }
        let stream = server.agent()?;
        for path in ["/readyz", "/ready"] {
            eventually(SOON, || page(path, 200, "ok"))?;
        }
        page(
            "/readyz?verbose",
            200,
            "[+]ping ok\n[+]server-connected ok\ncheck passed\n",
        )?;
        let (status, metrics) = agent.get("/metrics")?;
        let open = "konnectivity_network_proxy_agent_open_server_connections 1";
        ensure!(
            status == 200 && metrics.contains(open),
            "{maker:?}: {metrics}"
        );
        if let Maker::Ours(_) = maker {
            Page::read(&metrics)?;
        }
        drop(stream);
        eventually(SOON, || page("/readyz", 503, none))
    })
}

/// The first SIGTERM is told to every server and changes nothing else; the second one ends it.
#[test]
fn an_agent_drains() -> Result<()> {
    each_agent(&[], |_, _, agent, server| {
        let mut stream = server.agent()?;
        let echo = stream.connect("10.99.1.2:7001", 1)?;
        agent.signal(Signal::SIGTERM)?;
        stream.expect(wire::drain())?;
        stream.echo(echo, "still here")?;
        let another = stream.connect("10.99.1.2:7001", 2)?;
        stream.echo(another, "even for new ones")?;
        agent.signal(Signal::SIGTERM)?;
        agent.wait(SOON)
    })
}

/// A server of another authority is not believed, and one that shows no certificate for the host
/// that was dialled is not either.
#[test]
fn a_server_has_to_prove_itself() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let ours = Maker::Ours(Programs::of_this_test()?.cpc);
    for maker in [Maker::peer(), Some(ours)].into_iter().flatten() {
        let scene = Scene::new(1)?;
        let foreign = crate::authority::Authority::create(scene.lab.folder().join("foreign"))?;
        let foreign = foreign.issue("server", &[lab::address::server(1).into()])?;
        let elsewhere = scene
            .authority
            .issue("elsewhere", &[lab::address::server(9).into()])?;
        let genuine = scene.server.clone();
        for (credentials, believed) in [(foreign, false), (elsewhere, false), (genuine, true)] {
            let server = scene.script_server(credentials.open_server()?)?;
            let mut agent = scene.proxy_agent(&maker, 1, &[])?;
            agent.wait_healthy(SOON)?;
            let came = server
                .incoming_within(Duration::from_millis(1500))?
                .is_some();
            ensure!(
                came == believed,
                "{maker:?}, {credentials:?}:\n{}",
                agent.log()
            );
        }
    }
    Ok(())
}

/// A server that answers nothing does not hold the agent up.
pub(crate) fn a_silent_server_is_given_up() -> Result<()> {
    // The peer waits for ever.
    let scene = Scene::new(1)?;
    let server = scene.script_server(scene.server.server()?)?;
    let _agent = scene.proxy_agent(&scene.ours()?, 1, &[])?;
    let silent = server.incoming()?;
    let next = server.incoming_within(Duration::from_secs(30))?;
    next.context("the agent waits for ever")?
        .script(server.place(), MetadataMap::new(), 1);
    drop(silent);
    Ok(())
}
