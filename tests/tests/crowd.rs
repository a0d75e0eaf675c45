//! Many connections at once.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tunnel_tests::client::eventually;
use tunnel_tests::frontend::Frontend;
use tunnel_tests::lab::usage::{allow_many_files, open_files};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs};
use tunnel_tests::target::Behaviour;

/// Maximum number of files that a process closes meanwhile.
const CLOSED: usize = 8;

const CROWD: usize = 2000;
const LIMIT: Duration = Duration::from_secs(30);

/// 2,000 connections are open at once and each carries its own bytes both ways; when they have
/// been closed, server and agent have no stream and no file more than before.
#[test]
fn two_thousand_connections_at_once() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    allow_many_files()?;
    let lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let server = &lab.control_plane.servers[0].daemon;
    let agent = lab.workers[0].agent.as_ref().context("no agent")?;
    let pids = [server.pid(), agent.pid()].map(|pid| pid.context("not running"));
    let [server_pid, agent_pid] = pids;
    let pids = [server_pid?, agent_pid?];
    let files = || -> Result<[usize; 2]> { Ok([open_files(pids[0])?, open_files(pids[1])?]) };
    let echo = SocketAddr::new(lab.workers[0].node_addresses()[0], Behaviour::Echo.port());

    for frontend in Frontend::ALL {
        let before = files()?;
        let mut sockets = frontend.through(&lab, |dial| {
            let sockets = (0..CROWD).map(|n| dial(echo).with_context(|| format!("number {n}")));
            sockets.collect::<Result<Vec<_>>>()
        })?;
        for (n, socket) in sockets.iter_mut().enumerate() {
            writeln!(socket, "this is number {n:04}")?;
        }
        for (n, socket) in sockets.iter_mut().enumerate() {
            let expected = format!("this is number {n:04}\n");
            let mut answer = vec![0; expected.len()];
            let read = socket.read_exact(&mut answer);
            read.with_context(|| format!("{frontend:?}, number {n}"))?;
            assert_eq!(String::from_utf8(answer)?, expected, "{frontend:?}");
        }
        let status = server.wait_status(LIMIT, |it| it["agents"][0]["streams"] == CROWD);
        status.context("not all of them are open at once")?;
        for (before, during) in before.iter().zip(files()?) {
            // A few of the start, or of a request for the status, may be closed since.
            let is_grown = during + CLOSED >= before + CROWD;
            ensure!(is_grown, "{before} files became {during}");
        }

        drop(sockets);
        server.wait_status(LIMIT, |it| it["agents"][0]["streams"] == 0)?;
        agent.wait_status(LIMIT, |it| it["servers"][0]["streams"] == 0)?;
        eventually(LIMIT, || {
            let after = files()?;
            ensure!(
                after
                    .iter()
                    .zip(&before)
                    .all(|(after, before)| after <= before),
                "{before:?} files have become {after:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}
