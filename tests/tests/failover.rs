//! Agents and servers come and go, and so do their addresses: what is left goes on, who comes back
//! is found, and no request is made twice.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tunnel_tests::client::{self, eventually};
use tunnel_tests::lab::process::Process;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::load::{Attempt, Failure, Load, ask, ask_through, line};
use tunnel_tests::service;
use tunnel_tests::target::Behaviour;

/// Time until a restarted process serves (3 s), and room for a busy machine.
const BACK: Duration = Duration::from_secs(5);
/// An agent that is not heard for so long is given up with its streams.
const IDLE: Duration = Duration::from_secs(30);
const MEGABYTE: u64 = 1_000_000;

fn spec(workers: u8, servers: u8) -> Result<LabSpec> {
    Ok(LabSpec {
        workers,
        servers,
        ..LabSpec::new(Programs::of_this_test()?)
    })
}

fn node(behaviour: Behaviour) -> SocketAddr {
    (address::node(1), behaviour.port()).into()
}

fn echoes(lab: &Lab) -> Result<()> {
    let asked = || Ok(ask(node(Behaviour::Echo), "hello"));
    match lab.control_plane.as_apiserver(asked)? {
        Ok(answer) => ensure!(answer == "hello", "{answer:?}"),
        Err(failure) => anyhow::bail!("{failure:?}"),
    }
    Ok(())
}

/// A stream on which things happen once so many bytes have been moved.
struct Interrupted<'a> {
    stream: TcpStream,
    moved: u64,
    interruptions: Vec<(u64, Interruption<'a>)>,
}

type Interruption<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

impl Interrupted<'_> {
    fn count(&mut self, bytes: usize) -> io::Result<usize> {
        self.moved += bytes as u64;
        while self
            .interruptions
            .first()
            .is_some_and(|(at, _)| *at <= self.moved)
        {
            let (_, mut interrupt) = self.interruptions.remove(0);
            interrupt().map_err(io::Error::other)?;
        }
        Ok(bytes)
    }
}

impl Read for Interrupted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        self.count(count)
    }
}

impl Write for Interrupted<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.stream.write(buffer)?;
        self.count(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// The router forgets the agent's mapping, then the worker moves to another address, each in the
/// middle of a transfer: it goes on over the same tunnel, and every byte is right.
#[test]
fn a_transfer_survives_another_mapping_and_another_address() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for upload in [false, true] {
        let mut lab = Lab::up(spec(1, 1)?)?;
        let behaviour = if upload {
            Behaviour::Sink
        } else {
            Behaviour::Source
        };
        let stream = lab.control_plane.as_apiserver(|| {
            let stream = TcpStream::connect(node(behaviour))?;
            // Longer than any retransmission, shorter than the tunnel's idle timeout.
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.set_write_timeout(Some(Duration::from_secs(20)))?;
            Ok(stream)
        })?;
        let before = agent(&lab)?;
        let (router, worker) = (&mut lab.router, &lab.workers[0]);
        let mut stream = Interrupted {
            stream,
            moved: 0,
            interruptions: vec![
                (20 * MEGABYTE, Box::new(|| router.remap())),
                (
                    60 * MEGABYTE,
                    Box::new(|| worker.change_address().map(drop)),
                ),
            ],
        };
        let done = if upload {
            client::upload(&mut stream, 100 * MEGABYTE, |it| {
                it.stream.shutdown(Shutdown::Write)
            })
        } else {
            client::download(&mut stream, 100 * MEGABYTE)
        };
        let left = stream.interruptions.len();
        ensure!(
            left == 0 || done.is_err(),
            "{left} interruptions did not happen"
        );
        drop(stream);
        let done = done.with_context(|| format!("upload: {upload}"))?;
        println!("upload {upload}: {:?}", done.elapsed);
        eventually(BACK, || {
            let after = agent(&lab)?;
            ensure!(
                after["since"] == before["since"],
                "another tunnel: {before} {after}"
            );
            ensure!(
                after["address"] != before["address"],
                "no move: {before} {after}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

fn agent(lab: &Lab) -> Result<Value> {
    let server = &lab.control_plane.servers[0].daemon;
    let status = server.wait_status(BACK, |status| status["agents"][0].is_object())?;
    Ok(status["agents"][0].clone())
}

/// An agent that is killed and started again serves its node at once, without waiting until the
/// server gives its former process up. Open connections end when the new process is there; a
/// connection that was dialled meanwhile, and on which nothing was sent, goes to the new process.
#[test]
fn an_agent_killed_and_started_again_serves_its_node() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(spec(1, 1)?)?;
    let state = lab.folder().join("agent-state");
    echoes(&lab)?;
    let open = |lab: &Lab| {
        lab.control_plane.as_apiserver(|| {
            let stream = TcpStream::connect(node(Behaviour::Echo))?;
            stream.set_read_timeout(Some(BACK))?;
            Ok(stream)
        })
    };
    // The second process makes a lock, which the third one finds, and so on.
    for round in 1..=3 {
        let held = open(&lab)?;
        client::round_trips(&held, 1)?;
        let agent = lab.worker("w1")?.agent()?;
        agent.kill()?;
        agent.configure(|config| config["state_dir"] = json!(state))?;
        let waiting = open(&lab)?;
        let start = Instant::now();
        lab.worker("w1")?.agent()?.start()?;
        let ready = || {
            let (status, _) = lab.workers[0]
                .agent
                .as_ref()
                .context("no agent")?
                .get("/readyz")?;
            ensure!(status == 200, "not ready");
            Ok(())
        };
        eventually(BACK, ready)?;
        echoes(&lab).with_context(|| format!("round {round}: ready, and not served"))?;
        let took = start.elapsed();
        println!("round {round}: served {took:?} after the agent's start");
        ensure!(took < BACK, "served only {took:?} after the agent's start");
        let error = (&held).read(&mut [0]).err();
        let error = error.with_context(|| format!("round {round}: a clean end"))?;
        ensure!(error.kind() == ErrorKind::ConnectionReset, "{error}");
        println!("round {round}: ended after {:?}", start.elapsed());
        client::round_trips(&waiting, 1)
            .with_context(|| format!("round {round}: dialled while nobody was there"))?;
    }
    let log = lab.control_plane.servers[0].daemon.log();
    assert_eq!(log.matches("proven=true").count(), 2, "{log}");
    Ok(())
}

/// A second process of an agent takes new dials, and the first one, which lives, keeps its connections, as
/// in a rollout.
#[test]
fn a_live_agent_keeps_its_connections_beside_its_successor() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(spec(1, 1)?)?;
    let held = lab.control_plane.as_apiserver(|| {
        let stream = TcpStream::connect(node(Behaviour::Echo))?;
        stream.set_read_timeout(Some(BACK))?;
        Ok(stream)
    })?;
    client::round_trips(&held, 1)?;

    let config = lab.worker("w1")?.agent()?.config_file();
    let log = lab.folder().join("successor.log");
    let mut command = lab.workers[0]
        .netns
        .command(Programs::of_this_test()?.cpc)?;
    command.arg("agent").arg("--config").arg(config);
    command.args(["--admin", "127.0.0.1:8199"]);
    let mut successor = Process::start("successor", &mut command, &log)?;
    let streams = |status: &Value| -> Vec<i64> {
        let rows = status["agents"].as_array().into_iter().flatten();
        rows.filter_map(|row| row["streams"].as_i64()).collect()
    };
    let beside = || {
        let server = &lab.control_plane.servers[0].daemon;
        server.wait_status(BACK, |status| streams(status).len() == 2)?;
        // Longer than a process whose life is doubted is waited for.
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            client::round_trips(&held, 1).context("of the live process")?;
            thread::sleep(Duration::from_millis(50));
        }
        let new = lab
            .control_plane
            .as_apiserver(|| Ok(TcpStream::connect(node(Behaviour::Echo))?))?;
        client::round_trips(&new, 1)?;
        let spread = |status: &Value| streams(status) == [1, 1];
        server.wait_status(BACK, spread).map(drop)
    };
    let done = beside();
    successor.terminate()?;
    done
}

/// A server that is killed and started again has its agents back: they notice at once that it is
/// another process, and do not wait for their idle timeout.
#[test]
fn agents_come_back_to_a_server_started_again() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(spec(2, 1)?)?;
    let both = |status: &Value| {
        status["agents"]
            .as_array()
            .is_some_and(|all| all.len() == 2)
    };
    for pause in [0, 2] {
        let server = &mut lab.control_plane.servers[0].daemon;
        server.kill()?;
        thread::sleep(Duration::from_secs(pause));
        server.start()?;
        let start = Instant::now();
        server
            .wait_status(BACK, both)
            .with_context(|| format!("away for {pause} s"))?;
        println!(
            "away for {pause} s: both agents are back after {:?}",
            start.elapsed()
        );
        eventually(BACK - start.elapsed().min(BACK), || echoes(&lab))?;
    }
    Ok(())
}

/// Two agents serve one range, on two servers. One agent is killed: dials that went to it fail
/// cleanly, and within seconds none goes to it any more. One server is killed: on the other not
/// one dial fails.
#[test]
fn one_agent_and_one_server_of_two_are_enough() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(spec(2, 2)?)?;
    lab.configure_connector()?;
    service::start(&mut lab)?;
    for server in &mut lab.control_plane.servers {
        server
            .daemon
            .configure(|config| config["limits"] = json!({"dial_timeout": "3s"}))?;
    }
    lab.start_configured()?;
    for server in &lab.control_plane.servers {
        let both = |status: &Value| {
            status["agents"]
                .as_array()
                .is_some_and(|all| all.len() == 2)
        };
        server.daemon.wait_status(BACK, both)?;
    }
    let proxy = lab.control_plane.servers[1].sockets.connect_unix.clone();
    let through = move |request: &str| ask_through(&proxy, service::socket(), request);
    let both_ways = {
        let through = through.clone();
        move |request: &str| match request.starts_with(['0', '1']) {
            true => ask(service::socket(), request),
            false => through(request),
        }
    };

    let load = Load::start(&lab.control_plane, 4, both_ways)?;
    load.wait_answered(100, BACK)?;
    let killed = Instant::now();
    lab.worker("w1")?.agent()?.kill()?;
    // Left out after 5 s of silence; dials that had gone to it take their 3 s.
    thread::sleep(Duration::from_secs(9));
    load.wait_answered(50, BACK)?;
    let attempts = load.stop();
    let (before, after): (Vec<_>, Vec<_>) = attempts.iter().partition(|a| a.start < killed);
    for name in ["w1", "w2"] {
        ensure!(before.iter().any(|a| by(a, name)), "{name} never served");
    }
    let late: Vec<_> = after.iter().filter(|a| a.result.is_err()).collect();
    println!("{} of {} failed after the kill", late.len(), after.len());
    for attempt in late {
        let since = attempt.start - killed;
        ensure!(
            since < Duration::from_secs(7),
            "{since:?} after the kill: {attempt:?}"
        );
    }
    for attempt in &attempts {
        answered_or_clean(attempt, &[killed])?;
    }

    let load = Load::start(&lab.control_plane, 2, through)?;
    load.wait_answered(50, BACK)?;
    lab.control_plane.servers[0].daemon.kill()?;
    thread::sleep(Duration::from_secs(1));
    load.wait_answered(50, BACK)?;
    for attempt in load.stop() {
        ensure!(by(&attempt, "w2"), "{attempt:?}");
    }
    Ok(())
}

/// Whether the ledger `name` answered.
fn by(attempt: &Attempt, name: &str) -> bool {
    attempt
        .result
        .as_ref()
        .is_ok_and(|answer| *answer == format!("{name} {}", attempt.request))
}

/// The right answer, a reset, a refusal, or an error of HTTP; never an end of file, another's
/// answer, or no answer at all. Only what was connected when its agent was killed waits until the
/// tunnel is given up, which takes longer than this client has patience.
fn answered_or_clean(attempt: &Attempt, killed: &[Instant]) -> Result<()> {
    let clean = match &attempt.result {
        Ok(_) => by(attempt, "w1") || by(attempt, "w2"),
        Err(Failure::Connect(error)) => error.kind() != ErrorKind::TimedOut,
        Err(Failure::Broken(error)) => match error.kind() {
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => true,
            ErrorKind::WouldBlock => killed
                .iter()
                .any(|at| (attempt.start..attempt.end).contains(at)),
            _ => false,
        },
        Err(Failure::Proxy(answer)) => answer.contains("HTTP/1.1 50"),
    };
    ensure!(clean, "{attempt:?}");
    Ok(())
}

/// The way back from an agent is cut after it has reached the target and before its answer, until
/// the server gives the tunnel up. Where bytes of the client were sent along, the target may have
/// read them: the client sees a reset, and the server asks no other agent. Where none were, the
/// server asks another agent within a second or so, and the client notices nothing. A connection
/// from before is reset.
#[test]
fn a_lost_dial_is_tried_again_only_if_nothing_was_sent() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(spec(2, 1)?)?;
    lab.configure_connector()?;
    let ledgers = service::start(&mut lab)?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["limits"] = json!({"dial_timeout": "60s"}))?;
    lab.start_configured()?;
    let open = |to: SocketAddr| {
        let stream = lab
            .control_plane
            .as_apiserver(|| Ok(TcpStream::connect(to)?))?;
        stream.set_read_timeout(Some(IDLE + BACK))?;
        anyhow::Ok(stream)
    };
    // The second agent has more to do, so that the first is chosen.
    let work = SocketAddr::from((address::node(2), Behaviour::Echo.port()));
    let work: Vec<_> = (0..5).map(|_| open(work)).collect::<Result<_>>()?;
    work.iter()
        .try_for_each(|it| client::round_trips(it, 1).map(drop))?;
    let held = open(service::socket())?;
    assert_eq!(line(&held, "held")?, "w1 held");

    lab.router.silence(1)?;
    let late = open(service::socket())?;
    let early = open(service::socket())?;
    (&early).write_all(b"early\n")?;
    let [lost, left] = &ledgers[..] else {
        anyhow::bail!("{} ledgers", ledgers.len());
    };
    eventually(BACK, || {
        let there = (lost.connections(), lost.requests().len());
        ensure!(there == (3, 2), "at the target: {there:?}");
        Ok(())
    })?;
    // Long before the tunnel is given up, since nothing is heard of the first agent.
    eventually(BACK, || {
        ensure!(left.connections() == 1, "no other agent was asked");
        Ok(())
    })?;
    assert_eq!(line(&late, "late")?, "w2 late");

    for (mut stream, name) in [(&early, "early"), (&held, "held")] {
        let error = stream.read(&mut [0]).err();
        let error = error.with_context(|| format!("{name} was answered, or ended cleanly"))?;
        ensure!(
            error.kind() == ErrorKind::ConnectionReset,
            "{name}: {error}"
        );
    }
    assert_eq!(left.requests(), ["late"]);
    Ok(())
}

/// Lets agents end without waiting for their connections.
fn end_at_once(lab: &mut Lab) -> Result<()> {
    for worker in &mut lab.workers {
        worker
            .agent()?
            .configure(|config| config["limits"] = json!({"drain": "0s"}))?;
    }
    Ok(())
}

/// Requests travel with the dial, before an agent has answered. Agents are killed, ended, halted
/// and forbidden to dial, at random, so that dials are refused, lost and tried again: no request
/// reaches a target twice, and each answered one reached it once.
#[test]
fn a_request_is_never_made_twice() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(spec(2, 1)?)?;
    lab.configure_connector()?;
    let ledgers = service::start(&mut lab)?;
    lab.control_plane.servers[0].daemon.configure(|config| {
        config["log"] = json!({"filter": "info,cpc::server::dial=debug"});
        config["limits"] = json!({"dial_timeout": "2s"});
    })?;
    end_at_once(&mut lab)?;
    lab.start_configured()?;

    let load = Load::start(&lab.control_plane, 6, |request| {
        ask(service::socket(), request)
    })?;
    load.wait_answered(50, BACK)?;
    let mut random = Random::new()?;
    let mut killed = Vec::new();
    let end = Instant::now() + Duration::from_secs(6);
    // Everything once to either, then whatever comes.
    let mut planned = (0..4).flat_map(|what| [("w1", what), ("w2", what)]);
    loop {
        let planned = planned.next();
        if planned.is_none() && Instant::now() >= end {
            break;
        }
        let by_chance = (["w1", "w2"][random.below(2)], random.below(4));
        let (worker, what) = planned.unwrap_or(by_chance);
        let agent = lab.worker(worker)?.agent()?;
        match what {
            0 => {
                killed.push(Instant::now());
                agent.kill()?;
                agent.start()?;
            }
            1 => {
                agent.terminate()?;
                agent.start()?;
            }
            2 => {
                agent.stop()?;
                thread::sleep(Duration::from_millis(300));
                agent.cont()?;
            }
            _ => {
                for allowed in [false, true] {
                    agent.configure(|config| {
                        config["allow"] = match allowed {
                            true => json!([service::allowed()]),
                            false => json!([]),
                        };
                    })?;
                    agent.signal(Signal::SIGHUP)?;
                    thread::sleep(Duration::from_millis(300));
                }
            }
        }
        thread::sleep(Duration::from_millis(random.below(500) as u64));
    }
    load.wait_answered(50, BACK)?;
    let attempts = load.stop();

    let mut seen: Vec<_> = ledgers
        .iter()
        .flat_map(|ledger| ledger.requests())
        .collect();
    seen.sort();
    let twice: Vec<_> = seen.windows(2).filter(|pair| pair[0] == pair[1]).collect();
    ensure!(twice.is_empty(), "delivered twice: {twice:?}");
    for attempt in &attempts {
        answered_or_clean(attempt, &killed)?;
        if attempt.result.is_ok() {
            let found = seen.binary_search(&attempt.request);
            ensure!(found.is_ok(), "answered by nobody: {attempt:?}");
        }
    }
    // All this says something only if dials were lost, and if some were tried again.
    let failed = attempts
        .iter()
        .filter(|attempt| attempt.result.is_err())
        .count();
    let log = lab.control_plane.servers[0].daemon.log();
    let retried = log.matches("trying another agent").count();
    println!(
        "{} requests, {failed} failed, {retried} tried again",
        attempts.len()
    );
    ensure!(
        failed > 0 && retried > 0,
        "{failed} failed, {retried} tried again"
    );
    Ok(())
}

/// A repeatable choice; its seed is printed.
struct Random(u64);

impl Random {
    fn new() -> Result<Self> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let seed = u64::from(now.subsec_nanos()) | 1;
        println!("seed {seed}");
        Ok(Self(seed))
    }

    /// xorshift64 (Marsaglia 2003).
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % bound
    }
}
