//! Outages: no packet of an agent reaches its server for longer than a tunnel lives.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use socket2::Socket;
use tunnel_tests::client::round_trips;
use tunnel_tests::conversation::{Conversation, Pace};
use tunnel_tests::frontend::Frontend;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::side::Side;
use tunnel_tests::target::Behaviour;

/// Age from which on a connection is held, with room.
const HELD: Duration = Duration::from_secs(2);

/// More than the idle timeout of a tunnel, which is 30 s.
const LONG: Duration = Duration::from_secs(35);

/// Time for everything to come back, with room: an agent tries again every few seconds.
const BACK: Duration = Duration::from_secs(30);

fn echo() -> SocketAddr {
    (address::node(1), Behaviour::Echo.port()).into()
}

/// Brings up one server and one agent; connections wait for `resume`.
fn lab(resume: &str) -> Result<Lab> {
    let spec = LabSpec {
        workers: 1,
        servers: 1,
        ..LabSpec::new(Programs::of_this_test()?)
    };
    let (lab, ()) = Lab::up_with(spec, |lab| {
        let server = Side::Server.daemon(lab)?;
        server.configure(|config| config["limits"]["resume"] = json!(resume))
    })?;
    Ok(lab)
}

fn held(lab: &Lab) -> Result<Socket> {
    let socket = Frontend::Redirect.dial(lab, echo())?;
    round_trips(&socket, 1)?;
    thread::sleep(HELD);
    Ok(socket)
}

#[test]
fn connections_outlive_a_long_outage() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab("2m")?;
    let idle = held(&lab)?;
    let talk = Conversation::start(held(&lab)?, Pace::Messages(100, Duration::from_millis(50)))?;
    thread::sleep(HELD);
    lab.router.silence(1)?;
    thread::sleep(LONG);
    let server = &lab.control_plane.servers[0].daemon;
    let status = server.wait_status(BACK, |status| status["connections"]["waiting"] == 2)?;
    let since = &status["connections"]["waiting_since"];
    ensure!(since.is_string(), "{status}");
    lab.router.hear()?;
    server.wait_status(BACK, |status| status["connections"]["waiting"] == 0)?;
    idle.set_read_timeout(Some(BACK))?;
    round_trips(&idle, 1).with_context(|| lab.logs())?;
    let summary = talk.finish().with_context(|| lab.logs())?;
    ensure!(summary.longest_gap > LONG, "{summary:?}");
    Ok(())
}

/// A connection that waits too long ends on both sides, and new ones are served afterwards.
#[test]
fn connections_end_when_no_tunnel_comes_in_time() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab("1s")?;
    let mut socket = held(&lab)?;
    lab.router.silence(1)?;
    socket.write_all(b"?")?;
    socket.set_read_timeout(Some(LONG + BACK))?;
    let error = socket.read(&mut [0]).err().context("an answer came")?;
    ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}");
    let lost = [
        "cpc::access",
        "closed_by=\"tunnel\"",
        "reason=\"link_lost\"",
    ];
    let server = Side::Server.daemon(&mut lab)?;
    server.wait_log(BACK, 0, &lost)?;
    server.wait_status(BACK, |status| {
        status["connections"]["open"] == 0 && status["connections"]["waiting"] == 0
    })?;
    lab.router.hear()?;
    for side in [Side::Server, Side::Agent] {
        let daemon = side.daemon(&mut lab)?;
        daemon.wait_ready(BACK)?;
        daemon.wait_status(BACK, |status| status["connections"]["held"] == 0)?;
    }
    let next = Frontend::Redirect.dial(&lab, echo())?;
    round_trips(&next, 3).with_context(|| lab.logs())?;
    Ok(())
}
