//! Events during an unanswered dial: the client's first bytes, its end of file, its departure, and
//! the deadline.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use socket2::Socket;
use tunnel_tests::client::{self, eventually};
use tunnel_tests::frontend::{Frontend, patient, reset};
use tunnel_tests::lab::worker::Worker;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs};
use tunnel_tests::puppet::Puppet;
use tunnel_tests::target::Behaviour;

/// For what happens within one machine.
const SOON: Duration = Duration::from_secs(10);
/// Long enough for anything that is already on its way.
const A_WHILE: Duration = Duration::from_millis(500);
/// A port at which packets disappear.
const HOLE: u16 = 8050;

fn spec() -> Result<LabSpec> {
    let mut spec = LabSpec::new(Programs::of_this_test()?);
    spec.allow.push(Puppet::allow()?);
    Ok(spec)
}

fn node(lab: &Lab, port: u16) -> SocketAddr {
    (lab.workers[0].node_addresses()[0], port).into()
}

/// Asks the proxy for `destination` and does not wait for its answer.
fn request(lab: &Lab, destination: SocketAddr) -> Result<Socket> {
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    let mut stream = UnixStream::connect(proxy)?;
    write!(stream, "CONNECT {destination} HTTP/1.1\r\n\r\n")?;
    patient(stream.into())
}

fn stop_agent(lab: &mut Lab) -> Result<()> {
    lab.workers[0].agent()?.stop()
}

fn wake_agent(lab: &mut Lab) -> Result<()> {
    lab.workers[0].agent()?.cont()
}

/// Lets packets to a port of the worker disappear.
fn make_hole(worker: &Worker, port: u16) -> Result<()> {
    worker.netns.nft(&format!(
        "table inet hole {{ chain input {{
           type filter hook input priority 0; policy accept;
           tcp dport {port} drop
         }}
         }}"
    ))
}

fn fill_hole(worker: &Worker) -> Result<()> {
    worker.netns.nft("delete table inet hole")
}

/// Returns the number of the worker's connects that wait for an answer.
fn pending_connects(worker: &Worker) -> Result<usize> {
    let output = worker
        .netns
        .command("ss")?
        .args(["--no-header", "--tcp", "--numeric", "state", "syn-sent"])
        .output()?;
    ensure!(output.status.success(), "ss failed");
    Ok(String::from_utf8(output.stdout)?.lines().count())
}

fn wait_pending_connects(worker: &Worker, expected: usize) -> Result<()> {
    eventually(SOON, || {
        let pending = pending_connects(worker)?;
        ensure!(pending == expected, "{pending} connects, not {expected}");
        Ok(())
    })
}

/// The client's first bytes reach the target before any answer to the dial reaches the server, so
/// that the redirect costs no round trip. A client of CONNECT waits for the answer, and its bytes
/// with it.
#[test]
fn the_first_bytes_do_not_wait_for_the_answer() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::up(spec()?)?;
    let puppet = Puppet::on(&lab.workers[0], 8000)?;
    let router = &lab.router.netns;
    // From now on the server hears nothing of the agent.
    router.nft(
        "table inet deaf { chain forward {
           type filter hook forward priority -10; policy accept;
           oifname \"cp\" drop
         }
         }",
    )?;
    let mut held = request(&lab, puppet.address)?;
    held.write_all(b"question")?;
    let mut asked = puppet.accept()?;
    let mut client = Frontend::Redirect.dial(&lab, puppet.address)?;
    client.write_all(b"question")?;
    let mut target = puppet.accept()?;
    let mut question = [0; 8];
    target.read_exact(&mut question).context("redirect")?;
    assert_eq!(&question, b"question");
    asked.set_read_timeout(Some(A_WHILE))?;
    let early = asked.read(&mut [0]).err().context("CONNECT did not wait")?;
    assert_eq!(early.kind(), ErrorKind::WouldBlock);

    router.nft("delete table inet deaf")?;
    target.write_all(b"answer")?;
    let mut answer = [0; 6];
    client.read_exact(&mut answer)?;
    assert_eq!(&answer, b"answer");
    asked.set_read_timeout(Some(SOON))?;
    asked.read_exact(&mut question).context("CONNECT")?;
    assert_eq!(&question, b"question");
    Ok(())
}

/// More bytes than are kept for a second try, sent before the target accepts: each arrives once
/// and in order, the answer comes back, and the server has counted each of them.
#[test]
fn early_bytes_arrive_once_and_in_order() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(spec()?)?;
    // Up to what is kept (64 KiB), beyond it, and far beyond.
    const SIZES: [u64; 5] = [1, 65_536, 65_537, 300_000, 8 << 20];
    for bytes in SIZES {
        // A target that is late: its first SYN is lost.
        make_hole(&lab.workers[0], Behaviour::Sink.port())?;
        let late = Frontend::Redirect.dial(&lab, node(&lab, Behaviour::Sink.port()))?;
        thread::scope(|scope| {
            let upload =
                scope.spawn(|| client::upload(late, bytes, |it| it.shutdown(Shutdown::Write)));
            wait_pending_connects(&lab.workers[0], 1)?;
            fill_hole(&lab.workers[0])?;
            upload.join().expect("the client panicked")
        })
        .with_context(|| format!("{bytes} bytes, late target"))?;

        // An agent that is slow.
        stop_agent(&mut lab)?;
        let slow = Frontend::Redirect.dial(&lab, node(&lab, Behaviour::Sink.port()))?;
        thread::scope(|scope| {
            let upload =
                scope.spawn(|| client::upload(slow, bytes, |it| it.shutdown(Shutdown::Write)));
            thread::sleep(A_WHILE);
            wake_agent(&mut lab)?;
            upload.join().expect("the client panicked")
        })
        .with_context(|| format!("{bytes} bytes, slow agent"))?;
    }
    let total: u64 = SIZES.iter().sum::<u64>() * 2;
    let server = &lab.control_plane.servers[0].daemon;
    server.wait_status(SOON, |status| status["agents"][0]["up_bytes"] == total)?;

    let address = node(&lab, Behaviour::HalfClose.port());
    stop_agent(&mut lab)?;
    let mut held = request(&lab, address)?;
    held.write_all(&[0; 30_000])?;
    thread::sleep(A_WHILE);
    wake_agent(&mut lab)?;
    let mut head = [0; 39];
    held.read_exact(&mut head)?;
    assert_eq!(&head, b"HTTP/1.1 200 Connection Established\r\n\r\n");
    held.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    held.read_to_string(&mut answer)?;
    assert_eq!(answer, "30000 bytes\n", "behind the CONNECT request");
    Ok(())
}

/// An end of file before the dial's answer is a half-close, on the redirect and behind a CONNECT: the
/// client may have asked all it has to ask.
#[test]
fn an_early_end_of_file_is_a_half_close() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(spec()?)?;
    let target = node(&lab, Behaviour::HalfClose.port());
    stop_agent(&mut lab)?;
    let mut redirected = Frontend::Redirect.dial(&lab, target)?;
    redirected.write_all(b"question")?;
    redirected.shutdown(Shutdown::Write)?;
    // The end comes with the request, or later.
    let mut proxied = Vec::new();
    for pause in [Duration::ZERO, A_WHILE] {
        let mut client = request(&lab, target)?;
        client.write_all(b"question")?;
        thread::sleep(pause);
        client.shutdown(Shutdown::Write)?;
        proxied.push(client);
    }
    thread::sleep(A_WHILE);
    wake_agent(&mut lab)?;

    let mut answer = String::new();
    redirected.read_to_string(&mut answer)?;
    assert_eq!(answer, "8 bytes\n");
    for mut client in proxied {
        let mut answer = String::new();
        client.read_to_string(&mut answer)?;
        let expected = "HTTP/1.1 200 Connection Established\r\n\r\n8 bytes\n";
        assert_eq!(answer, expected);
    }
    Ok(())
}

/// A destination that swallows packets: after `dial_timeout` a CONNECT is answered 504, and a
/// redirected client, whose local handshake is done, is reset. Neither comes much earlier.
#[test]
fn a_dial_ends_at_its_deadline() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    const LIMIT: Duration = Duration::from_secs(2);
    let mut lab = Lab::without_connector(spec()?)?;
    lab.configure_connector()?;
    lab.control_plane.servers[0]
        .daemon
        .configure(|config| config["limits"] = json!({"dial_timeout": "2s"}))?;
    lab.start_configured()?;
    let hole = node(&lab, HOLE);
    make_hole(&lab.workers[0], HOLE)?;

    let start = Instant::now();
    let mut refused = request(&lab, hole)?;
    let mut reset = Frontend::Redirect.dial(&lab, hole)?;
    reset.write_all(b"early")?;
    let mut answer = String::new();
    refused.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 504 "), "{answer}");
    ensure!(
        answer.contains(&hole.to_string()),
        "it does not say what did not answer: {answer}"
    );
    let end = reset.read(&mut [0]).err().context("a clean end")?;
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
    let elapsed = start.elapsed();
    ensure!(elapsed >= LIMIT, "given up after {elapsed:?}");
    wait_pending_connects(&lab.workers[0], 0)?;
    Ok(())
}

/// A client that goes away while it is dialled takes the agent's connect with it: a CONNECT by
/// closing, a redirected client by a reset (its end of file would be a half-close).
#[test]
fn a_client_that_leaves_cancels_its_dial() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::up(spec()?)?;
    let worker = &lab.workers[0];
    let hole = node(&lab, HOLE);
    make_hole(worker, HOLE)?;

    let client = request(&lab, hole)?;
    ends_the_connect(worker, || drop_it(client)).context("CONNECT")?;

    let client = Frontend::Redirect.dial(&lab, hole)?;
    ends_the_connect(worker, || reset(client)).context("redirect")?;

    let mut client = Frontend::Redirect.dial(&lab, hole)?;
    client.write_all(&[0; 100_000])?;
    ends_the_connect(worker, || reset(client)).context("redirect, more sent than is kept")
}

fn drop_it(socket: Socket) -> Result<()> {
    drop(socket);
    Ok(())
}

/// Demands that `leave` ends the worker's only connect, well before the dial's deadline would.
fn ends_the_connect(worker: &Worker, leave: impl FnOnce() -> Result<()>) -> Result<()> {
    wait_pending_connects(worker, 1)?;
    let start = Instant::now();
    leave()?;
    wait_pending_connects(worker, 0)?;
    let elapsed = start.elapsed();
    ensure!(elapsed < SOON / 2, "the connect went on for {elapsed:?}");
    Ok(())
}
