//! Keeper: a server or an agent is killed, and its connections go on with the next process.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::SockRef;
use tunnel_tests::client::round_trips;
use tunnel_tests::conversation::{Conversation, Pace};
use tunnel_tests::frontend::Frontend;
use tunnel_tests::keeper::{self, Keeper};
use tunnel_tests::lab::daemon::Daemon;
use tunnel_tests::lab::{self, Lab, Programs, address};
use tunnel_tests::load::{Attempt, Load, ask, ask_through};
use tunnel_tests::pattern;
use tunnel_tests::seccomp::Refusal;
use tunnel_tests::side::Side;
use tunnel_tests::target::Behaviour;

/// Age from which on a connection is kept in any case, with room.
const KEPT: Duration = Duration::from_secs(2);

/// Time for a process to come up, with room.
const SOON: Duration = Duration::from_secs(15);

fn echo() -> SocketAddr {
    (address::node(1), Behaviour::Echo.port()).into()
}

fn lab() -> Result<(Lab, [Keeper; 2])> {
    keeper::lab(Programs::of_this_test()?, 1)
}

/// Kernel of a process.
#[derive(Clone, Copy)]
enum Kernel {
    /// The kernel of this machine.
    Own,
    /// A kernel before Linux 6.10.
    WithoutPeekOffset,
}

/// The answer of a kernel before Linux 6.10.
const NO_PEEK_OFFSET: Refusal = Refusal {
    call: libc::SYS_setsockopt,
    argument: Some((2, libc::SO_PEEK_OFF as u32)),
    errno: libc::EOPNOTSUPP,
};

fn start(daemon: &mut Daemon, kernel: Kernel) -> Result<()> {
    daemon.start_with(|command| match kernel {
        Kernel::Own => {}
        Kernel::WithoutPeekOffset => {
            // SAFETY: between fork and exec it makes system calls, and allocates nothing.
            unsafe { command.pre_exec(|| NO_PEEK_OFFSET.install()) };
        }
    })
}

/// Live connections of every pace notice nothing but a pause.
fn kill(sides: &[Side], kernel: Kernel) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (mut lab, _keepers) = lab()?;
    for side in [Side::Server, Side::Agent] {
        let process = side.daemon(&mut lab)?;
        process.kill()?;
        start(process, kernel)?;
    }
    for side in [Side::Server, Side::Agent] {
        side.daemon(&mut lab)?.wait_ready(SOON)?;
    }
    let paces = [
        Pace::Messages(100, Duration::from_millis(5)),
        Pace::Messages(3000, Duration::from_millis(50)),
        Pace::Messages(1, Duration::from_secs(3)),
        Pace::Bulk,
    ];
    let mut talks = Vec::new();
    for pace in paces {
        let stream = Frontend::Redirect.dial(&lab, echo())?;
        talks.push((pace, Conversation::start(stream, pace)?));
    }
    for side in sides {
        thread::sleep(KEPT);
        let killed = side.daemon(&mut lab)?;
        killed.kill()?;
        start(killed, kernel)?;
        let cut = talks.iter().filter(|(_, talk)| !talk.goes_on()).count();
        ensure!(
            cut == 0,
            "{cut} cut by the kill of {side:?}\n{}",
            lab.logs()
        );
    }
    thread::sleep(KEPT);
    for (pace, talk) in talks {
        let summary = talk.finish();
        let summary = summary.with_context(|| format!("{pace:?}\n{}", lab.logs()))?;
        println!("{pace:?}: {summary:?}");
    }
    Ok(())
}

/// Opens a connection to the echo that is old enough to be kept.
fn kept(lab: &Lab) -> Result<TcpStream> {
    let stream = TcpStream::from(Frontend::Redirect.dial(lab, echo())?);
    stream.set_read_timeout(Some(SOON))?;
    round_trips(&stream, 1)?;
    thread::sleep(KEPT);
    Ok(stream)
}

/// While no process serves a socket, its peer may send, end its half, or reset it.
#[test]
fn what_a_client_does_meanwhile_counts() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (mut lab, _keepers) = lab()?;
    let (mut ends, resets) = (kept(&lab)?, kept(&lab)?);
    let server = Side::Server.daemon(&mut lab)?;
    server.kill()?;
    let mut sent = vec![0; 100_000];
    pattern::fill(0, &mut sent);
    ends.write_all(&sent)?;
    ends.shutdown(Shutdown::Write)?;
    SockRef::from(&resets).set_linger(Some(Duration::ZERO))?;
    drop(resets);
    let agent = Side::Agent.daemon(&mut lab)?;
    let logged = agent.log().len();
    Side::Server.daemon(&mut lab)?.start()?;
    let mut echoed = Vec::new();
    let read = ends.read_to_end(&mut echoed);
    read.with_context(|| lab.logs())?;
    ensure!(echoed == sent, "{} bytes came back", echoed.len());
    let reset = ["cpc::access", "reason=\"peer_reset\""];
    Side::Agent
        .daemon(&mut lab)?
        .wait_log(SOON, logged, &reset)?;
    Ok(())
}

/// While no process is there, connects wait for the next one.
#[test]
fn no_connect_is_refused_while_a_server_is_killed() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (mut lab, _keepers) = lab()?;
    let redirected = Load::start(&lab.control_plane, 2, |request| ask(echo(), request))?;
    let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
    let proxied = Load::start(&lab.control_plane, 2, move |request| {
        ask_through(&proxy, echo(), request)
    })?;
    let loads = [redirected, proxied];
    let mut kills = Vec::new();
    for _ in 0..3 {
        for load in &loads {
            load.wait_answered(20, SOON)?;
        }
        let server = Side::Server.daemon(&mut lab)?;
        kills.push(Instant::now());
        server.kill()?;
        thread::sleep(Duration::from_millis(300));
        server.start()?;
    }
    for load in &loads {
        load.wait_answered(20, SOON)?;
    }
    // The membership of the first began first.
    for load in loads.into_iter().rev() {
        let attempts = load.stop();
        // A request that the killed process had already got ends with it.
        let had_begun = |attempt: &Attempt| {
            let mut kills = kills.iter();
            kills.any(|kill| attempt.start < *kill && *kill < attempt.end)
        };
        let failed = attempts.iter().filter(|it| it.result.is_err());
        let refused: Vec<_> = failed.filter(|it| !had_begun(it)).collect();
        let first = refused.first();
        ensure!(
            first.is_none(),
            "{} of {}: {first:?}\n{}",
            refused.len(),
            attempts.len(),
            lab.logs()
        );
        let longest = attempts.iter().map(|it| it.end - it.start).max();
        println!("{} requests, the longest took {longest:?}", attempts.len());
    }
    Ok(())
}

/// A keeper that was restarted keeps the connections that move.
#[test]
fn a_keeper_may_be_killed_too() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (mut lab, [mut keeper, _of_agent]) = lab()?;
    let stream = kept(&lab)?;
    keeper.kill()?;
    let cpc = Programs::of_this_test()?.cpc;
    let server = Side::Server.daemon(&mut lab)?;
    let logged = server.log().len();
    server.wait_log(SOON, logged, &["WARN", "no keeper any more"])?;
    round_trips(&stream, 1)?;
    let server = Side::Server.daemon(&mut lab)?;
    let logged = server.log().len();
    let _again = Keeper::start(&cpc, server)?;
    server.wait_log(SOON, logged, &["the keeper is there"])?;
    round_trips(&stream, 1)?;
    thread::sleep(KEPT);
    let server = Side::Server.daemon(&mut lab)?;
    server.kill()?;
    server.start()?;
    round_trips(&stream, 1).with_context(|| lab.logs())?;
    Ok(())
}

/// Returns a number below `limit` that follows from `seed`, and the next seed (a linear congruential generator).
fn draw(seed: u64, limit: u64) -> (u64, u64) {
    let next = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    ((next >> 33) % limit, next)
}

/// System calls of a process that moves bytes, with those of its start.
const CALLS: &str = "recvfrom,recvmsg,recvmmsg,sendto,sendmsg,sendmmsg,write,writev,shutdown,setsockopt,getsockopt,ioctl,\
                     close,epoll_ctl,accept4,connect,bind,dup,fcntl,mmap";

/// Has the kernel kill a process at the `n`-th of [`CALLS`] of one of its threads. Returns once it is dead.
fn kill_at(process: &mut Daemon, n: u64) -> Result<()> {
    let pid = process.pid().context("it runs")?;
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-p", &pid.to_string()]);
    strace.args(["-e", &format!("trace={CALLS}")]);
    strace.args(["-e", &format!("inject={CALLS}:signal=KILL:when={n}")]);
    // It ends with the process.
    let status = strace.status().context("strace")?;
    let is_dead = process.check().is_err();
    ensure!(is_dead, "it lives, and strace has ended with {status}");
    process.kill()
}

/// Processes are killed between any two system calls, every third one during its start.
fn crash(points: u64) -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (mut lab, _keepers) = lab()?;
    let paces = [
        Pace::Messages(100, Duration::from_millis(5)),
        Pace::Messages(20_000, Duration::from_millis(20)),
        Pace::Messages(1, Duration::from_millis(700)),
        Pace::Bulk,
    ];
    let talks = paces.map(|pace| Conversation::start(Frontend::Redirect.dial(&lab, echo())?, pace));
    let talks = talks.into_iter().collect::<Result<Vec<_>>>()?;
    thread::sleep(KEPT);
    let mut seed = u64::from(std::process::id());
    println!("seed {seed}");
    for point in 0..points {
        let (n, next) = draw(seed, 300);
        let (side, next) = draw(next, 2);
        let (pause, next) = draw(next, 500);
        seed = next;
        let side = [Side::Server, Side::Agent][side as usize];
        let process = side.daemon(&mut lab)?;
        kill_at(process, n + 1)?;
        process.start()?;
        if point % 3 == 0 {
            kill_at(process, n / 3 + 1)?;
            process.start()?;
        }
        thread::sleep(Duration::from_millis(500 + pause));
        let cut = talks.iter().filter(|talk| !talk.goes_on()).count();
        ensure!(
            cut == 0,
            "{cut} cut: {side:?}, point {point}, call {n}\n{}",
            lab.logs()
        );
    }
    thread::sleep(KEPT);
    for talk in talks {
        println!("{:?}", talk.finish().with_context(|| lab.logs())?);
    }
    Ok(())
}

#[test]
fn a_process_may_be_killed_at_any_system_call() -> Result<()> {
    crash(5)
}

#[test]
#[ignore = "takes minutes"]
fn a_process_is_killed_at_three_hundred_system_calls() -> Result<()> {
    crash(300)
}

/// Kills server and agent fifty times each, in random order, also while they take over.
#[test]
#[ignore = "takes minutes"]
fn a_thousand_connections_outlive_a_hundred_kills() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (mut lab, _keepers) = lab()?;
    let paces = |number| match number % 10 {
        0 => Pace::Messages(20_000, Duration::from_millis(30)),
        1..5 => Pace::Messages(100, Duration::from_millis(100)),
        _ => Pace::Messages(1, Duration::from_secs(1)),
    };
    let mut talks = vec![Frontend::Redirect.dial(&lab, echo())?];
    let more = Frontend::Redirect.through(&lab, |dial| {
        (1..1000).map(|_| dial(echo())).collect::<Result<Vec<_>>>()
    })?;
    let bulk = Conversation::start(talks.remove(0), Pace::Bulk)?;
    let talks = more.into_iter().enumerate();
    let talks = talks.map(|(number, stream)| Conversation::start(stream, paces(number)));
    let talks = talks.collect::<Result<Vec<_>>>()?;
    thread::sleep(KEPT);
    let mut seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut left = [50; 2];
    for time in 0..100 {
        let (pause, next) = draw(seed, 1500);
        let (of_all, next) = draw(next, left[0] + left[1]);
        seed = next;
        let side = usize::from(of_all >= left[0]);
        left[side] -= 1;
        thread::sleep(Duration::from_millis(pause));
        let killed = [Side::Server, Side::Agent][side].daemon(&mut lab)?;
        killed.kill()?;
        killed.start()?;
        let cut = talks.iter().filter(|talk| !talk.goes_on()).count();
        let is_cut = cut > 0 || !bulk.goes_on();
        ensure!(!is_cut, "{cut} cut by kill {time}\n{}", lab.logs());
    }
    thread::sleep(KEPT);
    talks.iter().for_each(Conversation::stop);
    println!("{:?}", bulk.finish().with_context(|| lab.logs())?);
    let mut gaps = Vec::new();
    for talk in talks {
        gaps.push(talk.finish().with_context(|| lab.logs())?.longest_gap);
    }
    gaps.sort_unstable();
    println!(
        "median of the longest pauses {:?}, the longest {:?}",
        gaps[gaps.len() / 2],
        gaps.last()
    );
    Ok(())
}

#[test]
fn connections_outlive_a_killed_server() -> Result<()> {
    kill(&[Side::Server; 2], Kernel::Own)
}

#[test]
fn connections_outlive_a_killed_agent() -> Result<()> {
    kill(&[Side::Agent; 2], Kernel::Own)
}

#[test]
fn connections_outlive_a_crash_without_a_peek_offset() -> Result<()> {
    kill(&[Side::Server, Side::Agent], Kernel::WithoutPeekOffset)
}
