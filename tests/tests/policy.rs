//! Destinations of an agent, and the answer to a client that requests another one.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::ledger::Ledger;
use tunnel_tests::load::{Failure, ask, ask_through};
use tunnel_tests::target::Behaviour;

/// Something listens on it, and no agent may dial it.
const FORBIDDEN: u16 = 9000;
/// Port that may be dialled, without a listener.
const CLOSED: u16 = 7199;

/// The answer to a CONNECT: its first line and its body.
fn connect(lab: &Lab, destination: &str) -> Result<(String, String)> {
    let mut stream = UnixStream::connect(&lab.control_plane.servers[0].sockets.connect_unix)?;
    stream.set_read_timeout(Some(Duration::from_secs(15)))?;
    write!(
        stream,
        "CONNECT {destination} HTTP/1.1\r\nHost: {destination}\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
    let line = head.lines().next().unwrap_or_default();
    Ok((line.to_owned(), body.to_owned()))
}

/// A refusal of HTTP says `words` in its reason phrase and in its body.
fn refused(lab: &Lab, destination: &str, status: u16, words: &[&str]) -> Result<()> {
    let (line, body) = connect(lab, destination)?;
    let right = line.starts_with(&format!("HTTP/1.1 {status} "))
        && words
            .iter()
            .all(|word| line.contains(word) && body.contains(word));
    ensure!(
        right,
        "{destination}: {line:?} {body:?} instead of {status} and {words:?}"
    );
    Ok(())
}

/// A connection through the redirect is accepted, and then reset.
fn reset(lab: &Lab, to: SocketAddr) -> Result<()> {
    let asked = lab.control_plane.as_apiserver(|| Ok(ask(to, "hello")))?;
    ensure!(
        asked.as_ref().is_err_and(Failure::is_reset),
        "{to}: {asked:?}"
    );
    Ok(())
}

fn echoes(lab: &Lab, address: IpAddr) -> Result<()> {
    let to = SocketAddr::new(address, Behaviour::Echo.port());
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    for result in [
        lab.control_plane.as_apiserver(|| Ok(ask(to, "hello")))?,
        ask_through(proxy, to, "hello"),
    ] {
        match result {
            Ok(answer) => ensure!(answer == "hello", "{to}: {answer:?}"),
            Err(failure) => bail!("{to}: {failure:?}"),
        }
    }
    Ok(())
}

/// Node addresses and granted pod ranges are served, as far as the allow-list goes. What is not in
/// it is a reset on the redirect, and on CONNECT a 403 that names the way out; nothing arrives at
/// the target. A target that does not listen is told apart from it.
#[test]
fn an_agent_dials_what_its_allow_list_names() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let agent = lab.worker("w1")?.agent()?;
    agent.configure(|config| {
        if let Some(allow) = config["allow"].as_array_mut() {
            allow.push(json!({"cidr": "10.99.1.2/32", "ports": [CLOSED]}));
        }
    })?;
    lab.start_configured()?;
    for address in address::nodes(1).into_iter().chain(address::pods(1)) {
        echoes(&lab, address)?;
        let forbidden = SocketAddr::new(address, FORBIDDEN);
        let ledger = Ledger::start(&lab.workers[0].netns, forbidden, "forbidden")?;
        let direct = lab.router.netns.enter(|| Ok(ask(forbidden, "direct")))?;
        ensure!(direct.is_ok(), "{forbidden} does not answer: {direct:?}");

        reset(&lab, forbidden)?;
        let words = ["w1", "allow-list"];
        refused(&lab, &forbidden.to_string(), 403, &words)?;
        assert_eq!(ledger.requests(), ["direct"], "{forbidden} was dialled");
    }
    let closed = SocketAddr::from((address::node(1), CLOSED));
    reset(&lab, closed)?;
    refused(&lab, &closed.to_string(), 502, &["w1", "refused"])?;
    refused(
        &lab,
        "10.244.77.2:7001",
        503,
        &["no agent serves 10.244.77.2"],
    )
}

/// An agent that may dial everything still does not dial its own host's loopback, nor what is
/// link-local: metadata services live there.
#[test]
fn a_wide_allow_list_leaves_the_agents_own_host_alone() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut spec = LabSpec::new(Programs::of_this_test()?);
    spec.allow = vec!["0.0.0.0/0:1-65535".parse()?];
    let mut lab = Lab::without_connector(spec)?;
    lab.configure_connector()?;
    lab.control_plane.servers[0].daemon.configure(|config| {
        config["policy"]["grants"] = json!([{
            "identity": "spiffe://cluster.local/agent/w1",
            "default_route": true,
        }]);
    })?;
    let agent = lab.worker("w1")?.agent()?;
    agent.configure(|config| config["serve"] = json!({"default_route": true}))?;
    lab.start_configured()?;
    // The rest of the internet is served: here, the router's address on the worker's side.
    let gateway = (address::gateway(1), FORBIDDEN).into();
    let router = Ledger::start(&lab.router.netns, gateway, "router")?;
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    let answer = ask_through(proxy, gateway, "hello");
    ensure!(
        answer.as_ref().is_ok_and(|answer| answer == "router hello"),
        "{answer:?}"
    );
    assert_eq!(router.requests(), ["hello"]);

    let metadata = SocketAddr::from((Ipv4Addr::new(169, 254, 169, 254), FORBIDDEN));
    lab.workers[0]
        .netns
        .ip("address add 169.254.169.254/32 dev lo\n")?;
    let credentials = Ledger::start(&lab.workers[0].netns, metadata, "metadata")?;
    refused(&lab, &metadata.to_string(), 403, &["allow-list"])?;
    assert_eq!(credentials.requests(), [""; 0]);
    for own in ["127.0.0.1:7001", "[::1]:7001"] {
        refused(&lab, own, 403, &["allow-list"])?;
    }
    Ok(())
}

/// The agent alone resolves a name: the server's host has another answer, and is not asked. The
/// resolved address must be allowed like any other. A node's host name, by which kube-apiserver
/// dials kubelets by default, is such a name.
#[test]
fn names_are_resolved_by_the_agent() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.set_hosts("10.99.77.2 echo.svc.internal\n10.99.1.2 server-only.svc.internal\n")?;
    server.configure(|config| {
        config["policy"]["grants"] = json!([{
            "identity": "spiffe://cluster.local/agent/w1",
            "names": ["*.svc.internal", "w1"],
        }]);
    })?;
    let agent = lab.worker("w1")?.agent()?;
    agent.set_hosts(
        "10.244.1.2 echo.svc.internal\n127.0.0.1 loopback.svc.internal\n10.99.1.2 w1\n",
    )?;
    agent.configure(|config| config["serve"] = json!({"names": ["*.svc.internal", "w1"]}))?;
    lab.start_configured()?;

    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    for name in ["echo.svc.internal:7001", "w1:7001"] {
        let stream = tunnel_tests::client::connect_through(proxy, name)?;
        tunnel_tests::client::round_trips(stream, 1)?;
    }
    refused(
        &lab,
        "loopback.svc.internal:7001",
        403,
        &["w1", "allow-list"],
    )?;
    refused(
        &lab,
        "server-only.svc.internal:7001",
        502,
        &["w1", "server-only.svc.internal"],
    )?;
    refused(
        &lab,
        "echo.other.internal:7001",
        503,
        &["no agent serves echo.other.internal"],
    )
}

/// Rules by name: a name opens what it resolves to, as long as that is not guarded, and no address
/// that is asked for as one. SIGHUP puts another list in force. What curl is told is told by curl.
#[test]
fn an_agent_dials_what_its_allow_list_names_by_name() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    lab.control_plane.servers[0].daemon.configure(|config| {
        config["policy"]["grants"] = json!([{
            "identity": "spiffe://cluster.local/agent/w1",
            "names": ["*.internal"],
            "cidrs": ["10.244.1.0/24"],
        }]);
    })?;
    let agent = lab.worker("w1")?.agent()?;
    agent.set_hosts(
        "10.244.1.2 echo.svc.internal\n\
         10.244.1.2 other.internal\n\
         127.0.0.1 rebound.svc.internal\n\
         ::ffff:127.0.0.1 mapped.svc.internal\n\
         169.254.169.254 metadata.svc.internal\n",
    )?;
    agent.configure(|config| {
        config["serve"] = json!({"names": ["*.internal"], "cidrs": ["10.244.1.0/24"]});
        config["allow"] = json!([{"name": "*.svc.internal", "ports": [7001]}]);
    })?;
    lab.start_configured()?;

    let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
    let echoed = |destination: &str| -> Result<()> {
        let stream = tunnel_tests::client::connect_through(&proxy, destination)?;
        tunnel_tests::client::round_trips(stream, 1).map(drop)
    };
    echoed("echo.svc.internal:7001")?;
    echoed("ECHO.svc.Internal.:7001")?;
    for forbidden in [
        "echo.svc.internal:7002",
        "other.internal:7001",
        "10.244.1.2:7001",
    ] {
        refused(
            &lab,
            forbidden,
            403,
            &["w1", "is not in the agent's allow-list"],
        )?;
    }
    for guarded in ["rebound", "mapped", "metadata"] {
        let asked = format!("{guarded}.svc.internal:7001");
        refused(&lab, &asked, 403, &["w1", "resolves to", "address rule"])?;
    }
    for number in [
        "127.1:7001",
        "0x7f.1:7001",
        "2130706433:7001",
        "127.0.0.1.:7001",
    ] {
        refused(&lab, number, 400, &["number"])?;
    }

    let agent = lab.worker("w1")?.agent()?;
    agent.configure(|config| {
        config["allow"] =
            json!([{"name": "other.internal"}, {"cidr": "127.0.0.1", "ports": [7001]}]);
    })?;
    let seen = agent.log().len();
    agent.signal(Signal::SIGHUP)?;
    agent.wait_log(Duration::from_secs(15), seen, &["allow-list", "reloaded"])?;
    echoed("other.internal:7001")?;
    refused(&lab, "echo.svc.internal:7001", 403, &["allow-list"])
}

/// The redirect and a frontend have separate lists for their clients' requests. The server refuses
/// any other destination before it asks an agent, by reset or with a 403 that names the list.
/// SIGHUP puts another list in force, and connections stay.
#[test]
fn a_frontends_clients_ask_for_what_its_allow_list_names() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let echo = SocketAddr::from((address::node(1), Behaviour::Echo.port()));
    let pod = SocketAddr::from((address::pods(1)[0], Behaviour::Echo.port()));
    let echo_only = json!([{"cidr": echo.ip(), "ports": [echo.port()]}]);
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| {
        config["frontends"]["http_connect"][0]["allow"] = echo_only.clone();
        config["redirect"]["attachments"][0]["allow"] = echo_only.clone();
        config["audit"] = json!({"directory": "audit"});
    })?;
    lab.start_configured()?;
    let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
    let mut kept = tunnel_tests::client::connect_through(&proxy, &echo.to_string())?;
    echoes(&lab, echo.ip())?;

    reset(&lab, pod)?;
    let words = ["allow-list", "http_connect"];
    for asked in [&*pod.to_string(), "127.0.0.1:7001", "web.svc:7001"] {
        refused(&lab, asked, 403, &words)?;
    }
    let server = &mut lab.control_plane.servers[0].daemon;
    for frontend in ["http_connect", "redirect"] {
        let pieces = ["policy_denied", &*pod.to_string(), frontend];
        server.wait_log(Duration::from_secs(15), 0, &pieces)?;
    }
    let (_, metrics) = server.get("/metrics")?;
    for (frontend, count) in [("http_connect", 3), ("redirect", 1)] {
        let line = format!(
            "cpc_connections_closed_total{{frontend=\"{frontend}\",by=\"server\",\
             reason=\"policy_denied\"}} {count}"
        );
        ensure!(metrics.contains(&line), "no {line:?} in {metrics}");
    }

    server.configure(|config| {
        config["frontends"]["http_connect"][0]["allow"] = json!([{"cidr": pod.ip()}]);
        if let Some(attachment) = config["redirect"]["attachments"][0].as_object_mut() {
            attachment.remove("allow");
        }
    })?;
    let seen = server.log().len();
    server.signal(Signal::SIGHUP)?;
    for frontend in ["http_connect", "redirect"] {
        server.wait_log(
            Duration::from_secs(15),
            seen,
            &["allow-list reloaded", frontend],
        )?;
    }
    refused(&lab, &echo.to_string(), 403, &words)?;
    let answer = ask_through(&proxy, pod, "hello");
    ensure!(answer.as_ref().is_ok_and(|it| it == "hello"), "{answer:?}");
    for to in [echo, pod] {
        let answer = lab.control_plane.as_apiserver(|| Ok(ask(to, "hello")))?;
        ensure!(
            answer.as_ref().is_ok_and(|it| it == "hello"),
            "{to}: {answer:?}"
        );
    }
    kept.write_all(b"still here")?;
    let mut answer = [0; 10];
    kept.read_exact(&mut answer)?;
    assert_eq!(&answer, b"still here");
    Ok(())
}
