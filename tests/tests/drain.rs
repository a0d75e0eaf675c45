//! Ending in order: what is open goes on until it ends or the time is over, what is new goes
//! elsewhere or is refused at once.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
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

/// The server is told to end with connections open: they go on, new ones are refused at once,
/// agents are told. It ends by itself when the last connection has.
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

    lab.control_plane.servers[0]
        .daemon
        .signal(Signal::SIGTERM)?;
    let start = Instant::now();
    let refused = || match lab.control_plane.as_apiserver(|| Ok(ask(echo(), "new")))? {
        Err(Failure::Connect(error)) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        other => bail!("{other:?} instead of ECONNREFUSED"),
    };
    eventually(PATIENCE, refused)?;
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    let asked = ask_through(proxy, echo(), "new");
    ensure!(matches!(asked, Err(Failure::Proxy(_))), "{asked:?}");
    eventually(PATIENCE, || {
        let log = lab.workers[0].agent.as_ref().context("no agent")?.log();
        ensure!(
            log.contains("server is draining"),
            "the agent was not told:\n{log}"
        );
        Ok(())
    })?;
    while start.elapsed() < Duration::from_secs(2) {
        round_trips(&redirected, 1).context("redirected, draining")?;
        round_trips(&proxied, 1).context("proxied, draining")?;
        std::thread::sleep(Duration::from_millis(50));
    }
    refused()?;

    let server = &mut lab.control_plane.servers[0].daemon;
    drop(redirected);
    let early = server.wait_ended(Duration::from_millis(500));
    ensure!(early.is_err(), "it ended with a connection open");
    drop(proxied);
    server.wait_ended(PATIENCE)
}

/// A connection that does not end by itself is reset when the drain's time is over: a clean end
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
