//! A reader that stops stalls itself alone, within bounded memory, and leaves nothing behind.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use socket2::Socket;
use tunnel_tests::client::{eventually, median};
use tunnel_tests::frontend::{Dial, Frontend, reset};
use tunnel_tests::lab::daemon::Daemon;
use tunnel_tests::lab::shaper::{Impairment, Link};
use tunnel_tests::lab::usage::{memory, open_files};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs};
use tunnel_tests::target::Behaviour;

/// Stopped readers, and as many stopped targets.
const STOPPED: u64 = 200;
/// Memory of one stopped stream at its reader, in bytes. The kernel takes some MiB before a reader is seen to have
/// stopped, and the window has grown from 192 KiB by then.
const HELD: u64 = 1 << 20;
/// Memory of a stopped stream at its sender: the bytes that are not confirmed, and a read buffer of 64 KiB.
const KEPT: u64 = HELD + (64 << 10);
/// Everything else that a process may need for this: tasks, an allocator's holes.
const OVERHEAD: u64 = 32 << 20;
/// A path on which a stream needs a large window.
const RTT: Duration = Duration::from_millis(50);
/// Until all buffers are full, or empty again.
const LIMIT: Duration = Duration::from_secs(60);

/// Resources of a process.
#[derive(Clone, Copy, Debug)]
struct Usage {
    memory: u64,
    files: usize,
}

impl Usage {
    fn of(process: Pid) -> Result<Self> {
        Ok(Self {
            memory: memory(process)?,
            files: open_files(process)?,
        })
    }
}

/// 200 stopped readers and 200 stopped targets beside a request loop: every request is answered,
/// at about the pace of before; server and agent hold no more than a window for each; when the
/// clients have gone, streams, files and memory are given back.
#[test]
fn stopped_readers_stall_themselves_alone() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let spec = LabSpec::new(Programs::of_this_test()?);
    let (lab, shaper) = Lab::up_with(spec, |lab| lab.shape(Link::Worker(1)))?;
    shaper.set(Impairment::of_rtt(RTT));
    let server = &lab.control_plane.servers[0].daemon;
    let agent = lab.workers[0].agent.as_ref().context("no agent")?;
    let processes = [server, agent];
    let node = lab.workers[0].node_addresses()[0];
    let address = |behaviour: Behaviour| SocketAddr::new(node, behaviour.port());

    Frontend::Redirect.through(&lab, |dial| {
        let echo = address(Behaviour::Echo);
        let mut before = requests(dial, echo, 200)?;
        wait_streams(&processes, 0)?;
        let base = usage(&processes)?;

        let done = AtomicBool::new(false);
        let (stopped, mut beside) = thread::scope(|scope| {
            let beside = scope.spawn(|| {
                let mut samples = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    samples.extend(requests(dial, echo, 10)?);
                }
                Ok::<_, anyhow::Error>(samples)
            });
            let stopped = stop_many(dial, address(Behaviour::Source), address(Behaviour::Stuck))
                .and_then(|stopped| {
                    wait_stalled(server)?;
                    wait_stalled(agent)?;
                    // The loop goes on beside what stands still now.
                    thread::sleep(Duration::from_secs(2));
                    Ok(stopped)
                });
            done.store(true, Ordering::Relaxed);
            let beside = beside.join().expect("the request loop panicked");
            Ok::<_, anyhow::Error>((stopped?, beside.context("the request loop")?))
        })?;

        let full = usage(&processes)?;
        println!("base {base:?}\nfull {full:?}");
        for (base, full) in base.iter().zip(&full) {
            let grown = full.memory.saturating_sub(base.memory);
            // Each process has the readers of one half and the senders of the other.
            let bound = STOPPED * (HELD + KEPT) + OVERHEAD;
            ensure!(
                grown <= bound,
                "{grown} bytes for {STOPPED} readers and senders"
            );
        }
        let (before, beside) = (median(&mut before), median(&mut beside));
        println!("a request took {before:?} before and {beside:?} beside");
        ensure!(
            beside <= before * 20 + Duration::from_millis(50),
            "{beside:?}, not {before:?}"
        );

        // With all buffers full an end of file can't travel: it stands behind what is unread.
        stopped.into_iter().try_for_each(reset)?;
        wait_streams(&processes, 0)?;
        eventually(LIMIT, || {
            let after = usage(&processes)?;
            for ((base, full), after) in base.iter().zip(&full).zip(&after) {
                ensure!(after.files <= base.files, "{base:?} has become {after:?}");
                let kept = after.memory.saturating_sub(base.memory);
                ensure!(
                    kept <= (full.memory - base.memory) / 2,
                    "{full:?} is {after:?}"
                );
            }
            println!("after {after:?}");
            Ok(())
        })?;
        requests(dial, echo, 10)?;
        Ok(())
    })
}

fn usage(processes: &[&Daemon]) -> Result<Vec<Usage>> {
    let pid = |daemon: &&Daemon| daemon.pid().context("not running");
    processes.iter().map(|it| Usage::of(pid(it)?)).collect()
}

/// Connections, each with one question and its answer; how long each took.
fn requests(dial: &Dial<'_>, echo: SocketAddr, count: usize) -> Result<Vec<Duration>> {
    let request = |_| {
        let start = Instant::now();
        let mut socket = dial(echo)?;
        socket.write_all(b"question")?;
        let mut answer = [0; 8];
        socket.read_exact(&mut answer)?;
        ensure!(&answer == b"question", "{answer:?}");
        Ok(start.elapsed())
    };
    (0..count).map(request).collect()
}

/// Opens the stopped connections and lets every buffer on their way fill.
fn stop_many(dial: &Dial<'_>, source: SocketAddr, stuck: SocketAddr) -> Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for _ in 0..STOPPED {
        let mut reader = dial(source)?;
        reader.write_all(format!("{}\n", 1u64 << 40).as_bytes())?;
        sockets.push(reader);
    }
    let chunk = vec![0; 1 << 16];
    let mut writers = Vec::new();
    for _ in 0..STOPPED {
        let writer = dial(stuck)?;
        writer.set_nonblocking(true)?;
        writers.push(writer);
    }
    // Until none has taken anything for a second.
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_secs(1) {
        for mut writer in &writers {
            match writer.write(&chunk) {
                Ok(_) => last = Instant::now(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("a stopped target"),
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    sockets.append(&mut writers);
    Ok(sockets)
}

/// Waits until so many sockets of `daemon`'s take nothing, as it counts itself.
fn wait_stalled(daemon: &Daemon) -> Result<()> {
    eventually(LIMIT, || {
        let (_, metrics) = daemon.get("/metrics")?;
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("cpc_stalled_streams "));
        let stalled: u64 = line.context("no such metric")?.parse()?;
        ensure!(
            stalled == STOPPED,
            "{} counts {stalled} stalled",
            daemon.name
        );
        Ok(())
    })
}

fn wait_streams(processes: &[&Daemon; 2], count: u64) -> Result<()> {
    let [server, agent] = processes;
    server.wait_status(LIMIT, |status| status["agents"][0]["streams"] == count)?;
    agent.wait_status(LIMIT, |status| status["servers"][0]["streams"] == count)?;
    Ok(())
}
