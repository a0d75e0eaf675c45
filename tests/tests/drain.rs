//! Draining: open connections continue until their end or the deadline; new ones go elsewhere, or
//! are served where no other process serves them.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use tunnel_tests::client::{connect_through, eventually, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::load::{Failure, ask, ask_through, line};
use tunnel_tests::service;
use tunnel_tests::target::Behaviour;

const PATIENCE: Duration = Duration::from_secs(5);

fn echo() -> SocketAddr {
    (address::node(1), Behaviour::Echo.port()).into()
}

fn through_redirect(lab: &Lab, to: SocketAddr) -> Result<TcpStream> {
    let stream = lab
        .control_plane
        .as_apiserver(|| Ok(TcpStream::connect(to)?))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn through_proxy(lab: &Lab, to: SocketAddr) -> Result<UnixStream> {
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    let stream = connect_through(proxy, &to.to_string())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The server is told to end with connections open: they go on, new ones are served, by agents that have
/// come since as well, and agents are told. It ends by itself when the last connection has.
#[test]
fn a_server_that_ends_serves_until_then() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec {
        workers: 2,
        ..LabSpec::new(Programs::of_this_test()?)
    })?;
    let other = (address::node(2), Behaviour::Echo.port()).into();
    let redirected = through_redirect(&lab, other)?;
    let proxied = through_proxy(&lab, other)?;
    round_trips(&redirected, 1)?;
    round_trips(&proxied, 1)?;

    let server = &mut lab.control_plane.servers[0].daemon;
    server.signal(Signal::SIGTERM)?;
    eventually(PATIENCE, || {
        let log = lab.workers[0].agent.as_ref().context("no agent")?.log();
        ensure!(
            log.contains("server is draining"),
            "the agent was not told:\n{log}"
        );
        Ok(())
    })?;
    let (status, why) = lab.control_plane.servers[0].daemon.get("/readyz")?;
    assert_eq!((status, why.as_str()), (503, "draining\n"));
    let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
    let served = |lab: &Lab| {
        let asked = || Ok(ask(echo(), "new"));
        let answer = lab.control_plane.as_apiserver(asked)?;
        ensure!(answer.is_ok(), "redirected: {answer:?}");
        let answer = ask_through(&proxy, echo(), "new");
        ensure!(answer.is_ok(), "proxied: {answer:?}");
        Ok(())
    };
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        round_trips(&redirected, 1).context("redirected, draining")?;
        round_trips(&proxied, 1).context("proxied, draining")?;
        served(&lab)?;
        std::thread::sleep(Duration::from_millis(50));
    }
    // Each agent has its tunnel, and dials no other to this process.
    let server = &lab.control_plane.servers[0].daemon;
    let tunnels = server.log().matches("agent connected").count();
    assert_eq!(tunnels, 2);

    let agent = lab.worker("w1")?.agent()?;
    agent.kill()?;
    agent.start()?;
    eventually(2 * PATIENCE, || served(&lab)).context("by an agent that has come since")?;
    let server = &mut lab.control_plane.servers[0].daemon;
    drop((redirected, proxied));
    server.wait_ended(2 * PATIENCE)
}

/// The same with a connection that does not end with its agent: the server waits for it.
#[test]
fn a_server_that_ends_waits_for_its_connections() -> Result<()> {
    if !lab::available()? || !lab::kernel_since((6, 1), lab::ERRNOS)? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let redirected = through_redirect(&lab, echo())?;
    let proxied = through_proxy(&lab, echo())?;
    round_trips(&redirected, 1)?;
    round_trips(&proxied, 1)?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.signal(Signal::SIGTERM)?;
    drop(redirected);
    let early = server.wait_ended(Duration::from_millis(500));
    ensure!(early.is_err(), "it ended with a connection open");
    round_trips(&proxied, 1)?;
    drop(proxied);
    server.wait_ended(PATIENCE)?;
    // Neither is there any more.
    let refused = lab.control_plane.as_apiserver(|| Ok(ask(echo(), "new")))?;
    ensure!(
        matches!(&refused, Err(Failure::Connect(e)) if e.kind() == ErrorKind::ConnectionRefused),
        "{refused:?} instead of ECONNREFUSED"
    );
    Ok(())
}

/// A connection that does not end by itself is reset when the drain deadline has passed: a clean end
/// would tell its client that this was all.
#[test]
fn the_end_of_a_drain_is_a_reset() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let limits = json!({"drain": "1s"});
    lab.control_plane.servers[0]
        .daemon
        .configure(|config| config["limits"] = limits.clone())?;
    let agent = lab.worker("w1")?.agent()?;
    agent.configure(|config| config["limits"] = limits)?;
    lab.start_configured()?;
    for ending in ["agent", "server"] {
        let stream = through_redirect(&lab, echo())?;
        round_trips(&stream, 1)?;
        let daemon = match ending {
            "agent" => lab.worker("w1")?.agent()?,
            _ => &mut lab.control_plane.servers[0].daemon,
        };
        daemon.signal(Signal::SIGTERM)?;
        let start = Instant::now();
        let error = (&stream).read(&mut [0]).err();
        let error = error.with_context(|| format!("the {ending}'s end was a clean one"))?;
        ensure!(
            error.kind() == ErrorKind::ConnectionReset,
            "{ending}: {error}"
        );
        ensure!(
            start.elapsed() > Duration::from_millis(900),
            "the {ending} did not wait"
        );
        daemon.wait_ended(PATIENCE)?;
        if ending == "agent" {
            daemon.start()?;
            daemon.wait_ready(PATIENCE)?;
        }
    }
    Ok(())
}

/// One agent of two that serve a range is told to end: its streams go on, new dials go to the
/// other one, and not one fails.
#[test]
fn an_agent_that_ends_hands_over() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec {
        workers: 2,
        ..LabSpec::new(Programs::of_this_test()?)
    })?;
    lab.configure_connector()?;
    service::start(&mut lab)?;
    lab.start_configured()?;

    // Two connections at once are spread over two agents: the least loaded is chosen.
    let mut open = Vec::new();
    for number in 0..2 {
        let stream = through_redirect(&lab, service::socket())?;
        open.push((line(&stream, &format!("old {number}"))?, stream));
    }
    open.sort_by(|(a, _), (b, _)| a.cmp(b));
    ensure!(
        open[0].0.starts_with("w1 ") && open[1].0.starts_with("w2 "),
        "both by one: {open:?}"
    );

    lab.worker("w1")?.agent()?.signal(Signal::SIGTERM)?;
    let server = &lab.control_plane.servers[0].daemon;
    server.wait_status(PATIENCE, |status| {
        status["agents"][0]["state"] == "draining"
    })?;
    for number in 0..50 {
        let request = format!("new {number}");
        let asked = || Ok(ask(service::socket(), &request));
        let answer = lab.control_plane.as_apiserver(asked)?;
        ensure!(
            answer
                .as_ref()
                .is_ok_and(|answer| *answer == format!("w2 {request}")),
            "{answer:?}"
        );
    }
    assert_eq!(line(&open[0].1, "still")?, "w1 still");

    let agent = lab.worker("w1")?.agent()?;
    let early = agent.wait_ended(Duration::from_millis(500));
    ensure!(early.is_err(), "it ended with a connection open");
    drop(open);
    agent.wait_ended(PATIENCE)
}

/// The only agent for its node is told to end: until its streams have ended it serves new ones as well,
/// and so does one that is told so while a request runs.
#[test]
fn an_agent_that_ends_alone_serves_until_then() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let held = through_redirect(&lab, echo())?;
    round_trips(&held, 1)?;
    lab.worker("w1")?.agent()?.signal(Signal::SIGTERM)?;
    let server = &lab.control_plane.servers[0].daemon;
    server.wait_status(PATIENCE, |status| {
        status["agents"][0]["state"] == "draining"
    })?;
    assert_eq!(server.get("/readyz")?.0, 200);
    for _ in 0..20 {
        round_trips(through_redirect(&lab, echo())?, 1).context("redirected")?;
        round_trips(through_proxy(&lab, echo())?, 1).context("proxied")?;
    }
    round_trips(&held, 1)?;
    drop(held);
    lab.worker("w1")?.agent()?.wait_ended(PATIENCE)
}
