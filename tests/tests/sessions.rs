//! Sessions: connections go on when their tunnel is lost, and no byte is lost, doubled or changed.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use socket2::Socket;
use tunnel_tests::client::{self, eventually};
use tunnel_tests::conversation::{Conversation, Pace};
use tunnel_tests::frontend::Frontend;
use tunnel_tests::lab::process::Process;
use tunnel_tests::lab::{self, Engine, Lab, LabSpec, Programs, address};
use tunnel_tests::side::Side;
use tunnel_tests::target::Behaviour;

/// Age from which on a connection outlives its tunnel, and room for a busy machine.
const HELD: Duration = Duration::from_secs(2);

/// Time in which a lost tunnel is noticed and replaced, with room.
const SETTLED: Duration = Duration::from_secs(5);

/// Bytes of a transfer.
const MUCH: u64 = 40_000_000;

fn node(behaviour: Behaviour) -> SocketAddr {
    (address::node(1), behaviour.port()).into()
}

fn spec() -> Result<LabSpec> {
    Ok(LabSpec {
        workers: 1,
        servers: 1,
        ..LabSpec::new(Programs::of_this_test()?)
    })
}

/// Returns the sum of a metric of the server, over its labels.
fn metric(lab: &Lab, name: &str) -> Result<f64> {
    let (_, page) = lab.control_plane.servers[0].daemon.get("/metrics")?;
    let lines = page.lines().filter(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with([' ', '{']))
    });
    let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    Ok(values.sum())
}

/// Returns the way through `frontend`.
fn through(frontend: Frontend) -> impl Fn(&Lab) -> Result<Socket> {
    move |lab| frontend.dial(lab, node(Behaviour::Echo))
}

/// A router that loses its state drops the tunnel's packets for good. The agent opens another tunnel, and
/// every connection goes on over it, again and again.
fn outlive(lab: &mut Lab, dial: &dyn Fn(&Lab) -> Result<Socket>, losses: u32) -> Result<()> {
    let paces = [
        Pace::Messages(100, Duration::from_millis(5)),
        Pace::Messages(3000, Duration::from_millis(50)),
        Pace::Messages(1, Duration::from_secs(3)),
        Pace::Bulk,
    ];
    let talks = paces.map(|pace| Conversation::start(dial(lab)?, pace));
    let talks: Vec<_> = talks.into_iter().collect::<Result<_>>()?;
    for _ in 0..losses {
        thread::sleep(HELD);
        lab.router.lose_flows()?;
        thread::sleep(SETTLED);
    }
    let status = eventually(HELD, || {
        let (_, status) = lab.control_plane.servers[0].daemon.get("/status")?;
        let status: serde_json::Value = serde_json::from_str(&status)?;
        ensure!(status["connections"]["held"] == paces.len(), "{status}");
        Ok(status)
    })?;
    ensure!(status["connections"]["waiting"] == 0, "{status}");
    for (talk, pace) in talks.into_iter().zip(paces) {
        ensure!(talk.goes_on(), "{pace:?} was cut");
        let summary = talk.finish().with_context(|| format!("{pace:?}"))?;
        println!("{pace:?}: {summary:?}");
    }
    let resumed = metric(lab, "cpc_sessions_resumed_total")?;
    let expected = f64::from(losses) * paces.len() as f64;
    ensure!(resumed >= expected, "{resumed} of {expected}");
    ensure!(metric(lab, "cpc_sessions_lost_total")? == 0.0);
    let daemon = &lab.control_plane.servers[0].daemon;
    daemon.wait_log(HELD, 0, &["cpc::access", &format!("resumed={losses}")])?;
    eventually(HELD, || {
        let held = metric(lab, "cpc_sessions_held")?;
        ensure!(held == 0.0, "{held} are held");
        Ok(())
    })
}

#[test]
fn connections_of_the_redirect_outlive_their_tunnel() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    outlive(&mut Lab::up(spec()?)?, &through(Frontend::Redirect), 2)
}

#[test]
fn connections_of_a_proxy_outlive_their_tunnel() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    outlive(&mut Lab::up(spec()?)?, &through(Frontend::Connect), 1)
}

#[test]
fn connections_through_tls_outlive_their_tunnel() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(spec()?)?;
    let folder = lab.folder().join("client");
    let out = folder.to_str().context("the folder's name is not UTF-8")?;
    lab.pki()
        .run("client", &["--name", "socat", "--out", out])?;
    // It speaks TLS to the frontend, and plain text to the test.
    let proxy = lab.folder().join("tls.sock");
    let mut socat = lab.control_plane.netns.command("socat")?;
    socat.arg(format!("UNIX-LISTEN:{},fork", proxy.display()));
    socat.arg(format!(
        "OPENSSL:{},cert={out}/client.crt,key={out}/client.key,verify=0",
        lab.control_plane.servers[0].sockets.connect_tcp
    ));
    lab.cgroup("client")?.place(&mut socat)?;
    let mut socat = Process::start("socat", &mut socat, &lab.folder().join("socat.log"))?;
    eventually(HELD, || Ok(UnixStream::connect(&proxy)?))?;
    let echo = node(Behaviour::Echo).to_string();
    let dial = |_: &Lab| Ok(client::connect_through(&proxy, &echo)?.into());
    let outlived = outlive(&mut lab, &dial, 1);
    socat.kill()?;
    outlived
}

#[test]
fn connections_on_io_uring_outlive_their_tunnel() -> Result<()> {
    if !lab::available()? || !Engine::IoUring.available()? {
        return Ok(());
    }
    let spec = LabSpec {
        engine: Some(Engine::IoUring),
        ..spec()?
    };
    outlive(&mut Lab::up(spec)?, &through(Frontend::Redirect), 1)
}

/// Half-closed connections, a reader that has stopped, and full buffers everywhere.
#[test]
fn transfers_outlive_their_tunnel_in_any_state() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(spec()?)?;
    let dial = |behaviour| Frontend::Redirect.dial(&lab, node(behaviour));
    // It waits for an answer, with its own half ended.
    let mut half = dial(Behaviour::Echo)?;
    // This client reads nothing.
    let mut stopped = dial(Behaviour::Source)?;
    // This target reads nothing.
    let mut stuck = dial(Behaviour::Stuck)?;
    stuck.set_write_timeout(Some(Duration::from_millis(500)))?;
    thread::sleep(HELD);
    stopped.write_all(format!("{MUCH}\n").as_bytes())?;
    let bytes = vec![1; 1 << 20];
    while stuck.write(&bytes).is_ok_and(|n| n > 0) {}
    half.write_all(b"question")?;
    half.read_exact(&mut [0; 8])?;
    half.write_all(b"more")?;
    thread::sleep(HELD);
    lab.router.lose_flows()?;
    // While no tunnel is there.
    half.shutdown(Shutdown::Write)?;
    thread::sleep(SETTLED);

    let mut rest = Vec::new();
    half.read_to_end(&mut rest).context("half-closed")?;
    ensure!(rest == b"more", "{rest:?}");
    let received = client::receive(&stopped).context("stopped")?;
    ensure!(received == MUCH, "{received} bytes of {MUCH}");
    let upload = client::upload(dial_sink(&lab)?, MUCH, |socket| {
        socket.shutdown(Shutdown::Write)
    });
    upload.context("upload over the next tunnel")?;
    ensure!(metric(&lab, "cpc_sessions_lost_total")? == 0.0);
    Ok(())
}

fn dial_sink(lab: &Lab) -> Result<Socket> {
    Frontend::Redirect.dial(lab, node(Behaviour::Sink))
}

/// Both sides can be told that connections end with their tunnel.
#[test]
fn nothing_is_held_where_the_configuration_says_so() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    for side in [Side::Server, Side::Agent] {
        let (lab, ()) = Lab::up_with(spec()?, |lab| {
            let daemon = side.daemon(lab)?;
            daemon.configure(|config| config["limits"]["resume"] = json!("0s"))
        })?;
        let stream = Frontend::Redirect.dial(&lab, node(Behaviour::Echo))?;
        let talk = Conversation::start(stream, Pace::Messages(10, Duration::from_millis(50)))?;
        thread::sleep(HELD);
        ensure!(metric(&lab, "cpc_sessions_held")? == 0.0);
        talk.finish()?;
    }
    Ok(())
}
