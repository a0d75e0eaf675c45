//! The job on io_uring: bytes both ways, every kind of end, stopped readers, many connections; and
//! epoll where io_uring is refused. epoll's own tests are all the others.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::process::CommandExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::Socket;
use tunnel_tests::client::{self, eventually};
use tunnel_tests::frontend::{Frontend, reset};
use tunnel_tests::lab::daemon::Daemon;
use tunnel_tests::lab::usage::allow_many_files;
use tunnel_tests::lab::{self, Engine, Lab, LabSpec, Programs};
use tunnel_tests::puppet::Puppet;
use tunnel_tests::seccomp::Refusal;
use tunnel_tests::target::Behaviour;

/// For what happens within one machine.
const SOON: Duration = Duration::from_secs(10);
const BYTES: u64 = 100_000_000;
const CROWD: usize = 500;
const STOPPED: usize = 20;

/// A laboratory on io_uring; `None` where there can be none.
fn lab() -> Result<Option<Lab>> {
    if !lab::available()? || !Engine::IoUring.available()? {
        return Ok(None);
    }
    let mut spec = LabSpec::new(Programs::of_this_test()?);
    spec.allow.push(Puppet::allow()?);
    spec.engine = Some(Engine::IoUring);
    let mut lab = Lab::up(spec)?;
    for daemon in daemons(&mut lab)? {
        daemon.wait_status(SOON, |status| status["engine"] == "io_uring")?;
        let (_, metrics) = daemon.get("/metrics")?;
        let line = "cpc_datapath_engine{engine=\"io_uring\"} 1\n";
        ensure!(metrics.contains(line), "{}: {metrics}", daemon.name);
    }
    Ok(Some(lab))
}

fn daemons(lab: &mut Lab) -> Result<[&mut Daemon; 2]> {
    let agent = lab.workers[0].agent.as_mut().context("no agent")?;
    Ok([&mut lab.control_plane.servers[0].daemon, agent])
}

fn target(lab: &Lab, behaviour: Behaviour) -> SocketAddr {
    (lab.workers[0].node_addresses()[0], behaviour.port()).into()
}

/// Returns how a connection ends for its reader; `None` is an end of file.
fn end_of(mut socket: &Socket) -> Option<ErrorKind> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) => return Some(error.kind()),
        }
    }
}

/// Every byte arrives both ways, and what is sent before a close arrives before it.
#[test]
fn bytes_arrive_and_ends_behind_them() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    let puppet = Puppet::on(&lab.workers[0], 8000)?;
    for frontend in Frontend::ALL {
        let up = frontend.dial(&lab, target(&lab, Behaviour::Sink))?;
        client::upload(up, BYTES, |it| it.shutdown(Shutdown::Write))?;
        let down = frontend.dial(&lab, target(&lab, Behaviour::Source))?;
        client::download(down, BYTES)?;
        frontend.through(&lab, |dial| {
            for round in 0..50 {
                let client = dial(puppet.address)?;
                let target = puppet.accept()?;
                thread::scope(|scope| {
                    let received = scope.spawn(|| client::receive(&target));
                    client::send(&client, 1 << 20)?;
                    client.shutdown(Shutdown::Write)?;
                    let received = received.join().ok().context("a panic")??;
                    ensure!(received == 1 << 20, "round {round}: {received}");
                    // The other half is still there.
                    let answer = scope.spawn(|| client::receive(&client));
                    client::send(&target, 1 << 20)?;
                    target.shutdown(Shutdown::Write)?;
                    let answer = answer.join().ok().context("a panic")??;
                    ensure!(answer == 1 << 20, "round {round}: {answer}");
                    Ok(())
                })?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A reset is one at the other end, from either side and of a process that is killed.
#[test]
fn resets_arrive_as_resets() -> Result<()> {
    const RESET: Option<ErrorKind> = Some(ErrorKind::ConnectionReset);
    let Some(mut lab) = lab()? else { return Ok(()) };
    let puppet = Puppet::on(&lab.workers[0], 8000)?;
    let open = |lab: &Lab| -> Result<(Socket, Socket)> {
        let mut client = Frontend::Redirect.dial(lab, puppet.address)?;
        let mut target = puppet.accept()?;
        client.write_all(b"x")?;
        target.read_exact(&mut [0])?;
        target.write_all(b"x")?;
        client.read_exact(&mut [0])?;
        Ok((client, target))
    };
    for _ in 0..20 {
        let (client, target) = open(&lab)?;
        reset(client)?;
        assert_eq!(end_of(&target), RESET);
        let (client, target) = open(&lab)?;
        reset(target)?;
        assert_eq!(end_of(&client), RESET);
    }
    let (client, target) = open(&lab)?;
    let [server, agent] = daemons(&mut lab)?;
    agent.kill()?;
    assert_eq!(end_of(&target), RESET);
    server.kill()?;
    assert_eq!(end_of(&client), RESET);
    Ok(())
}

/// Stopped readers stall no other connection, and their data is still complete; each of many
/// concurrent connections carries its own bytes.
#[test]
fn a_crowd_beside_stopped_readers_is_served() -> Result<()> {
    let Some(lab) = lab()? else { return Ok(()) };
    allow_many_files()?;
    let (echo, source) = (
        target(&lab, Behaviour::Echo),
        target(&lab, Behaviour::Source),
    );
    Frontend::Redirect.through(&lab, |dial| {
        let stopped = (0..STOPPED).map(|_| {
            let mut reader = dial(source)?;
            reader.write_all(format!("{}\n", 1u64 << 40).as_bytes())?;
            Ok(reader)
        });
        let stopped = stopped.collect::<Result<Vec<_>>>()?;
        let mut crowd = (0..CROWD).map(|_| dial(echo)).collect::<Result<Vec<_>>>()?;
        for round in 0..3 {
            for (n, socket) in crowd.iter_mut().enumerate() {
                writeln!(socket, "round {round}, number {n:04}")?;
            }
            for (n, socket) in crowd.iter_mut().enumerate() {
                let expected = format!("round {round}, number {n:04}\n");
                let mut answer = vec![0; expected.len()];
                let read = socket.read_exact(&mut answer);
                read.with_context(|| format!("number {n}"))?;
                assert_eq!(String::from_utf8(answer)?, expected);
            }
        }
        stopped.into_iter().try_for_each(reset)
    })?;
    let server = &lab.control_plane.servers[0].daemon;
    eventually(SOON, || {
        server.wait_status(SOON, |it| it["agents"][0]["streams"] == 0)?;
        Ok(())
    })
}

/// The answer in many containers.
const REFUSED: Refusal = Refusal {
    call: libc::SYS_io_uring_setup,
    argument: None,
    errno: libc::EPERM,
};

/// A seccomp filter refuses io_uring: the process uses epoll, and the log says why.
#[test]
fn epoll_takes_over_where_io_uring_is_refused() -> Result<()> {
    let Some(mut lab) = lab()? else { return Ok(()) };
    for daemon in daemons(&mut lab)? {
        daemon.kill()?;
        let before = daemon.log().len();
        daemon.start_with(|command| {
            // SAFETY: between fork and exec it makes system calls, and allocates nothing.
            unsafe { command.pre_exec(|| REFUSED.install()) };
        })?;
        daemon.wait_status(SOON, |status| status["engine"] == "epoll")?;
        daemon.wait_log(SOON, before, &["epoll takes its place", "seccomp"])?;
    }
    let server = &mut lab.control_plane.servers[0].daemon;
    server.wait_ready(SOON)?;
    let socket = Frontend::Redirect.dial(&lab, target(&lab, Behaviour::Echo))?;
    client::round_trips(socket, 3)?;
    Ok(())
}
