//! Known defects of Konnectivity, which the connector must not have in either place.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use socket2::Socket;
use tunnel_tests::client::{self, connect_through, eventually};
use tunnel_tests::lab;
use tunnel_tests::puppet::Puppet;
use tunnel_tests::steady::Steady;
use tunnel_tests::target::{BANNER, Behaviour};

use crate::legacy_agent::LegacyAgent;
use crate::legacy_frontend;
use crate::scene::{Scene, target};
use crate::script::SOON;
use crate::wire;

const MEGABYTE: u64 = 1 << 20;
/// More than kernels hold for an endpoint that reads slowly.
pub(crate) const SLOW: u64 = 6 * MEGABYTE;
/// Time for which a connection may block its neighbours on a legacy agent's stream.
const NO_PROGRESS: Duration = Duration::from_secs(10);
/// Time until an unresponsive tunnel counts as dead, and room for a busy machine.
const WEDGED: Duration = Duration::from_secs(15);

/// Program that serves worker 1.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Native,
    Legacy,
}

/// A server with worker 1 behind it.
fn with_agent(kind: Kind, server_ids: usize) -> Result<(Scene, Option<LegacyAgent>)> {
    let mut scene = Scene::with_server(1, |config| {
        config["konnectivity"]["server_ids"] = json!(server_ids);
    })?;
    let legacy = match kind {
        Kind::Native => {
            scene.lab.workers[0].agent()?.start()?;
            None
        }
        Kind::Legacy => {
            let agent = scene.legacy_agent(1)?;
            agent.wait_servers(server_ids)?;
            Some(agent)
        }
    };
    scene.cpc_server().wait_ready(SOON)?;
    Ok((scene, legacy))
}

/// Neither kind of agent lets an endpoint be heard before the status line.
#[test]
fn the_status_line_comes_first() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for kind in [Kind::Native, Kind::Legacy] {
        let (scene, _agent) = with_agent(kind, 1)?;
        let (proxy, to) = (scene.connect(), target(1, Behaviour::Banner));
        thread::scope(|scope| {
            let client = || {
                for _ in 0..50 {
                    // What stands before the status line makes it unreadable.
                    let mut stream = connect_through(&proxy, &to)?;
                    let mut banner = [0; BANNER.len()];
                    stream.read_exact(&mut banner)?;
                    ensure!(banner == BANNER.as_bytes(), "{banner:?}");
                }
                Ok(())
            };
            let clients: Vec<_> = (0..4).map(|_| scope.spawn(client)).collect();
            clients
                .into_iter()
                .try_for_each(|client| client.join().expect("a client panicked"))
        })
        .with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

/// Lets `send` upload to a puppet, which reads as `read` does; fails unless `bytes` arrive.
pub(crate) fn upload(
    scene: &Scene,
    bytes: u64,
    read: impl FnOnce(Socket) -> Result<u64> + Send,
    send: impl FnOnce(&str) -> Result<()> + Send,
) -> Result<()> {
    let puppet = Puppet::on(&scene.lab.workers[0], 8000)?;
    let to = puppet.address.to_string();
    let received = thread::scope(|scope| {
        let reader = scope.spawn(move || read(puppet.accept()?));
        send(&to)?;
        reader
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    ensure!(received == bytes, "{received} of {bytes} bytes arrived");
    Ok(())
}

/// Reads no more than 64 KiB every 20 ms: longer than the client takes to send and to go.
pub(crate) fn slowly(mut stream: Socket) -> Result<u64> {
    let (mut all, mut buffer) = (0, vec![0; 64 << 10]);
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(all);
        }
        all += count as u64;
        thread::sleep(Duration::from_millis(20));
    }
}

/// Everything that a client has sent before it went arrives: through either kind of agent, by
/// either frontend, at an endpoint that reads at once or slowly.
#[test]
fn an_upload_arrives_whole_though_the_client_has_gone() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for kind in [Kind::Native, Kind::Legacy] {
        let (scene, _agent) = with_agent(kind, 1)?;
        let (http, grpc, place) = (scene.connect(), scene.grpc(), &scene.control_plane);
        let by_http = |bytes: u64| {
            let http = http.clone();
            move |to: &str| client::send(&connect_through(&http, to)?, bytes)
        };
        let by_grpc = |to: &str| {
            let mut stream = legacy_frontend::dial(place, &grpc, to)?;
            client::send(&mut stream, MEGABYTE)?;
            stream.close().map(drop)
        };
        for round in 0..2 {
            let context = |by: &str| format!("{kind:?}, {by}, round {round}");
            upload(&scene, MEGABYTE, client::receive, by_http(MEGABYTE))
                .with_context(|| context("HTTP"))?;
            upload(&scene, MEGABYTE, client::receive, by_grpc).with_context(|| context("gRPC"))?;
        }
        upload(&scene, SLOW, slowly, by_http(SLOW)).with_context(|| format!("{kind:?}, slowly"))?;
    }
    Ok(())
}

/// With a native agent a client may end its half and go on listening.
#[test]
fn half_closing_works_with_native_agents() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (scene, _) = with_agent(Kind::Native, 1)?;
    for _ in 0..20 {
        let mut stream = connect_through(&scene.connect(), &target(1, Behaviour::HalfClose))?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"hello")?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer == "5 bytes\n", "{answer:?}");
    }
    Ok(())
}

/// Maximum time of the quickest of a few closes: less than the wait for a quiet target.
const AT_ONCE: Duration = Duration::from_millis(300);

/// Returns the time until the endpoint of an idle connection reads its end, once `close` has closed
/// the connection of `dial`.
fn until_closed<S: Read + Write>(
    puppet: &Puppet,
    dial: impl Fn(&str) -> Result<S>,
    close: impl Fn(S) -> Result<()>,
) -> Result<Duration> {
    let mut client = dial(&puppet.address.to_string())?;
    let mut endpoint = puppet.accept()?;
    let mut buffer = [0; 4];
    client.write_all(b"ping")?;
    endpoint.read_exact(&mut buffer)?;
    endpoint.write_all(b"pong")?;
    client.read_exact(&mut buffer)?;
    let start = Instant::now();
    close(client)?;
    ensure!(endpoint.read(&mut buffer)? == 0, "more than it was sent");
    Ok(start.elapsed())
}

/// Answers a client that has ended its half, in two parts and late; an agent of ours passes the half
/// on, so the endpoint can wait for it.
fn late_answer(scene: &Scene, puppet: &Puppet, ours: bool) -> Result<()> {
    let mut client = connect_through(&scene.connect(), &puppet.address.to_string())?;
    client.set_read_timeout(Some(SOON))?;
    let mut endpoint = puppet.accept()?;
    client.write_all(b"ask")?;
    client.shutdown(Shutdown::Write)?;
    let mut asked = [0; 3];
    endpoint.read_exact(&mut asked)?;
    if ours {
        ensure!(endpoint.read(&mut asked)? == 0, "no end of file");
    }
    for part in [&b"late "[..], b"answer"] {
        thread::sleep(Duration::from_millis(700));
        endpoint.write_all(part)?;
    }
    drop(endpoint);
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    ensure!(answer == "late answer", "{answer:?}");
    Ok(())
}

/// Over Konnectivity's protocol, with an agent of ours and with a legacy one: an endpoint learns at once
/// that its client has closed, and what it answers to a client that has ended its half arrives.
#[test]
fn the_endpoint_learns_of_a_close_at_once() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for ours in [true, false] {
        let mut scene = Scene::with_server(1, |_| ())?;
        let _agents = if ours {
            (Some(scene.proxy_agent(&scene.ours()?, 1, &[])?), None)
        } else {
            (None, Some(scene.legacy_agent(1)?))
        };
        scene.cpc_server().wait_ready(SOON)?;
        let puppet = Puppet::on(&scene.lab.workers[0], 8000)?;
        let (http, grpc, place) = (scene.connect(), scene.grpc(), &scene.control_plane);
        let by_http = || {
            let dial = |to: &str| connect_through(&http, to);
            until_closed(&puppet, dial, |client| {
                drop(client);
                Ok(())
            })
        };
        let by_grpc = || {
            let dial = |to: &str| legacy_frontend::dial(place, &grpc, to);
            until_closed(&puppet, dial, |client| client.close().map(drop))
        };
        let ways: [&dyn Fn() -> Result<Duration>; 2] = [&by_http, &by_grpc];
        for (way, name) in ways.into_iter().zip(["HTTP CONNECT", "gRPC"]) {
            let times = (0..5).map(|_| way()).collect::<Result<Vec<_>>>()?;
            let quickest = times.iter().min();
            ensure!(
                quickest.is_some_and(|time| *time < AT_ONCE),
                "{name}, ours: {ours}: {times:?}"
            );
        }
        late_answer(&scene, &puppet, ours).with_context(|| format!("ours: {ours}"))?;
    }
    Ok(())
}

/// Asks for more than anything on the way holds, and reads none of it.
fn stopped_reader(proxy: &Path) -> Result<UnixStream> {
    let mut stream = connect_through(proxy, &target(1, Behaviour::Source))?;
    stream.write_all(format!("{}\n", 64 * MEGABYTE).as_bytes())?;
    Ok(stream)
}

/// Sends to an endpoint that never reads until nothing more goes.
fn stopped_endpoint(proxy: &Path) -> Result<UnixStream> {
    let mut stream = connect_through(proxy, &target(1, Behaviour::Stuck))?;
    stream.set_write_timeout(Some(Duration::from_millis(500)))?;
    let chunk = vec![0; 64 << 10];
    for _ in 0..1024 {
        if stream.write(&chunk).is_err() {
            return Ok(stream);
        }
    }
    bail!("64 MiB went to an endpoint that does not read")
}

/// Round trips by new connections, for `length`; gives the longest.
fn requests(proxy: &Path, length: Duration) -> Result<Duration> {
    let (start, mut longest) = (Instant::now(), Duration::ZERO);
    while start.elapsed() < length {
        let begin = Instant::now();
        let stream = connect_through(proxy, &target(1, Behaviour::Echo))?;
        stream.set_read_timeout(Some(NO_PROGRESS + SOON))?;
        client::round_trips(stream, 2)?;
        longest = longest.max(begin.elapsed());
        thread::sleep(Duration::from_millis(10));
    }
    Ok(longest)
}

/// Readers and endpoints that stop, through both frontends, beside a request loop: with a native
/// agent the loop does not notice.
#[test]
fn who_stops_stops_nobody_else_with_native_agents() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (scene, _) = with_agent(Kind::Native, 1)?;
    let proxy = scene.connect();
    let steady = Steady::start(proxy.clone(), target(1, Behaviour::Echo));
    let mut readers = Vec::new();
    let mut endpoints = Vec::new();
    for _ in 0..3 {
        readers.push(stopped_reader(&proxy)?);
        endpoints.push(stopped_endpoint(&proxy)?);
    }
    // A gRPC client that reads no further.
    let mut script = scene.client_at(scene.grpc())?;
    let id = script.connect(target(1, Behaviour::Source), 1)?;
    script.send(wire::data(id, format!("{}\n", 64 * MEGABYTE)))?;
    let mut stuck = scene.client_at(scene.grpc())?;
    let id = stuck.connect(target(1, Behaviour::Stuck), 2)?;
    let chunk = wire::data(id, vec![0; 32 << 10]);
    let sent = stuck.send_until_blocked(&chunk, Duration::from_millis(500), 2048)?;
    ensure!(sent < 2048, "64 MiB went to an endpoint that does not read");

    let longest = requests(&proxy, Duration::from_secs(3))?;
    ensure!(
        longest < Duration::from_secs(1),
        "a request took {longest:?}"
    );
    steady.finish().map(drop)
}

/// On a legacy agent's one stream a reader that stops delays the others by no more than the limit;
/// then it is reset, and they go on.
pub(crate) fn a_stopped_reader_is_reset_on_a_legacy_agent() -> Result<()> {
    let mut scene = Scene::with_server(1, |config| {
        config["konnectivity"]["server_ids"] = json!(1);
        // A dial that begins with the stall waits for its end: the two are as long by default.
        config["limits"] = json!({"dial_timeout": "15s"});
    })?;
    let agent = scene.legacy_agent(1)?;
    agent.wait_servers(1)?;
    scene.cpc_server().wait_ready(SOON)?;
    let proxy = scene.connect();
    let mut stopped = stopped_reader(&proxy)?;
    let longest = requests(&proxy, NO_PROGRESS + Duration::from_secs(3))?;
    ensure!(
        longest < NO_PROGRESS + Duration::from_secs(3),
        "a request took {longest:?}"
    );
    let longest = requests(&proxy, Duration::from_secs(1))?;
    ensure!(
        longest < Duration::from_secs(1),
        "later a request took {longest:?}"
    );
    // What was reset ends before everything is there.
    stopped.set_read_timeout(Some(SOON))?;
    let mut rest = Vec::new();
    let _ = stopped.read_to_end(&mut rest);
    ensure!((rest.len() as u64) < 64 * MEGABYTE, "it was not reset");
    scene.cpc_server().check()
}

/// A reader that is slow, but reads, is not reset.
pub(crate) fn a_slow_reader_is_served_by_a_legacy_agent() -> Result<()> {
    let (scene, _agent) = with_agent(Kind::Legacy, 1)?;
    let mut stream = connect_through(&scene.connect(), &target(1, Behaviour::Source))?;
    let length = 12 * MEGABYTE;
    stream.write_all(format!("{length}\n").as_bytes())?;
    stream.set_read_timeout(Some(SOON))?;
    let (mut all, mut buffer) = (0, vec![0; 64 << 10]);
    let start = Instant::now();
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        all += count as u64;
        // Twelve seconds for all of it.
        let due = Duration::from_millis(1000 * all / MEGABYTE);
        thread::sleep(due.saturating_sub(start.elapsed()));
    }
    ensure!(all == length, "{all} of {length} bytes");
    Ok(())
}

/// An endpoint that stops wedges one of a legacy agent's streams: dials go to the others within
/// seconds, and each ends.
pub(crate) fn a_stopped_endpoint_wedges_one_stream_of_several() -> Result<()> {
    let (mut scene, agent) = with_agent(Kind::Legacy, 3)?;
    let servers = agent.context("no agent")?;
    ensure!(
        servers.servers() == ["s1", "s1-2", "s1-3"],
        "{:?}",
        servers.servers()
    );
    let proxy = scene.connect();
    let _stopped = stopped_endpoint(&proxy)?;
    let longest = requests(&proxy, WEDGED)?;
    ensure!(longest < NO_PROGRESS, "a request took {longest:?}");
    let longest = requests(&proxy, Duration::from_secs(1))?;
    ensure!(
        longest < Duration::from_secs(1),
        "later a request took {longest:?}"
    );
    scene.cpc_server().wait_ready(SOON)
}

/// With one stream there is nothing left to serve: readiness says so, and dials end.
pub(crate) fn readiness_notices_a_wedged_stream() -> Result<()> {
    let (mut scene, _agent) = with_agent(Kind::Legacy, 1)?;
    let proxy = scene.connect();
    let stopped = stopped_endpoint(&proxy)?;
    let server = scene.cpc_server();
    eventually(WEDGED, || match server.get("/readyz")? {
        (200, _) => bail!("still ready"),
        _ => Ok(()),
    })?;
    let begin = Instant::now();
    let refused = connect_through(&proxy, &target(1, Behaviour::Echo));
    ensure!(refused.is_err(), "dialled through a wedged stream");
    ensure!(
        begin.elapsed() < WEDGED,
        "the dial took {:?}",
        begin.elapsed()
    );
    drop(stopped);
    Ok(())
}

/// An agent that answers everything but the dial: the dial ends all the same.
pub(crate) fn a_dial_that_is_never_answered_ends() -> Result<()> {
    let scene = Scene::with_server(1, |_| ())?;
    let agent = scene.script_agent(1, "a", "ipv4=10.99.1.2")?;
    let mut client = scene.client_at(scene.grpc())?;
    client.send(wire::dial(target(1, Behaviour::Echo), 1))?;
    let begin = Instant::now();
    let http = connect_through(&scene.connect(), &target(1, Behaviour::Echo));
    ensure!(http.is_err(), "connected to nobody");
    let response = client.dial_response()?;
    ensure!(!response.error.is_empty(), "{response:?}");
    ensure!(
        begin.elapsed() < Duration::from_secs(30),
        "it took {:?}",
        begin.elapsed()
    );
    drop(agent);
    Ok(())
}

/// An agent that has gone without a word is no agent any more within seconds.
pub(crate) fn a_dead_legacy_agent_is_noticed() -> Result<()> {
    let (mut scene, _agent) = with_agent(Kind::Legacy, 1)?;
    let mut stream = connect_through(&scene.connect(), &target(1, Behaviour::Echo))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    scene.lab.router.silence(1)?;
    let server = scene.cpc_server();
    eventually(WEDGED, || match server.get("/readyz")? {
        (200, _) => bail!("still ready"),
        _ => Ok(()),
    })?;
    // Its connections end when TCP has given it up.
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let end = stream.read(&mut [0]);
    ensure!(
        !matches!(&end, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
        "{end:?}"
    );
    Ok(())
}
