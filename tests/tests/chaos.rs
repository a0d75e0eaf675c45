//! The server dies, is stopped, and is restarted under load; its programs are replaced under load.
//! Captured connections are refused meanwhile, or take the ordinary route where the attachment
//! fails open (`fail: open`), but never leak and never get a wrong answer.

use std::io::{ErrorKind, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tunnel_tests::client::eventually;
use tunnel_tests::lab::netns::Netns;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::load::{Attempt, Failure, Load, ask};
use tunnel_tests::target::Behaviour;

/// After that the kernel takes a silent server for stuck. The rest is for a busy machine.
const STUCK: Duration = Duration::from_secs(3);
/// Time until a server and its agent are back, with as much for a busy machine.
const BACK: Duration = Duration::from_secs(5);
/// Answer of a decoy.
const DECOY: &str = "decoy";
const CLIENTS: usize = 4;

fn echo() -> SocketAddr {
    (address::node(1), Behaviour::Echo.port()).into()
}

/// A laboratory in which what escapes is counted by the router.
fn counting_leaks() -> Result<Lab> {
    let lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    lab.control_plane.add_ordinary_route()?;
    Ok(lab)
}

/// One request from the redirected group.
fn request(lab: &Lab) -> Result<Result<String, Failure>> {
    lab.control_plane.as_apiserver(|| Ok(ask(echo(), "hello")))
}

fn answered(lab: &Lab, expected: &str) -> Result<()> {
    match request(lab)? {
        Ok(answer) if answer == expected => Ok(()),
        other => bail!("{other:?} instead of {expected:?}"),
    }
}

fn refused_because_dead(lab: &Lab) -> Result<()> {
    match request(lab)? {
        Err(Failure::Connect(error)) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        other => bail!("{other:?} instead of ECONNREFUSED"),
    }
}

/// Connects until `done` accepts the error (`None`: the connect succeeded); returns the time. A
/// stopped server's listener accepts, and no process answers, so the function does not wait for an
/// answer.
fn connects_until(
    lab: &Lab,
    limit: Duration,
    done: impl Fn(Option<ErrorKind>) -> bool + Sync,
) -> Result<Duration> {
    let start = Instant::now();
    lab.control_plane.as_apiserver(|| {
        eventually(limit, || {
            let connected = TcpStream::connect_timeout(&echo(), Duration::from_secs(1));
            let kind = connected.err().map(|error| error.kind());
            ensure!(done(kind), "the last connect gave {kind:?}");
            Ok(start.elapsed())
        })
    })
}

/// Killed: refused at once. Stopped: refused once the heartbeat is stale. Each time served again
/// when it is back, and no packet left in between.
#[test]
fn a_dead_or_stopped_server_is_closed() -> Result<()> {
    if !lab::available()? || !lab::kernel_since((6, 1), lab::ERRNOS)? {
        return Ok(());
    }
    let mut lab = counting_leaks()?;
    answered(&lab, "hello")?;

    lab.control_plane.servers[0].daemon.kill()?;
    for _ in 0..20 {
        refused_because_dead(&lab).context("the server is dead")?;
    }
    lab.control_plane.servers[0].daemon.start()?;
    let start = Instant::now();
    eventually(BACK, || answered(&lab, "hello")).context("the server is back")?;
    println!("served {:?} after the server's start", start.elapsed());

    lab.control_plane.servers[0].daemon.stop()?;
    let refused = |kind| kind == Some(ErrorKind::ConnectionRefused);
    let took = connects_until(&lab, BACK, refused).context("the server is stopped")?;
    println!("refused {took:?} after the server was stopped");
    // The last beat is up to half a second old when the server stops.
    ensure!(
        took > STUCK - Duration::from_secs(1),
        "taken for stuck after {took:?}"
    );
    refused_because_dead(&lab).context("the server is stopped still")?;

    lab.control_plane.servers[0].daemon.cont()?;
    eventually(BACK, || answered(&lab, "hello")).context("the server goes on")?;
    assert_eq!(lab.router.leaked()?, 0);

    // The counter that all this rests on does count.
    lab.control_plane.netns.enter(|| {
        ensure!(TcpStream::connect_timeout(&echo(), Duration::from_millis(500)).is_err());
        Ok(())
    })?;
    ensure!(lab.router.leaked()? > 0, "a leak is not counted");
    Ok(())
}

/// Permitted results for the client of a restarting server: the connect is refused with one of the
/// redirect's errnos, or the connection is reset; never an end of file, a wait, or another
/// program's answer.
fn refused_or_reset(attempt: &Attempt) -> Result<()> {
    let allowed = match &attempt.result {
        Ok(answer) => *answer == attempt.request,
        Err(Failure::Connect(error)) => matches!(
            error.kind(),
            ErrorKind::ConnectionRefused
                | ErrorKind::HostUnreachable
                | ErrorKind::NetworkUnreachable
                // Accepted by a kernel whose listener ended in the same moment.
                | ErrorKind::ConnectionReset
        ),
        // A write to a connection that was reset already is a broken pipe.
        Err(Failure::Broken(error)) => matches!(
            error.kind(),
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
        ),
        Err(Failure::Proxy(_)) => false,
    };
    ensure!(allowed, "{attempt:?}");
    Ok(())
}

/// Killed, and ended in order, while clients ask all the time.
#[test]
fn a_server_restarted_under_load_leaks_nothing() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = counting_leaks()?;
    // With clients that ask all the time a drain takes all of its time.
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["limits"] = json!({"drain": "1s"}))?;
    server.restart()?;
    eventually(BACK, || answered(&lab, "hello"))?;
    let load = Load::start(&lab.control_plane, CLIENTS, |request| ask(echo(), request))?;
    load.wait_answered(50, BACK)?;
    for how in ["killed", "ended"] {
        let server = &mut lab.control_plane.servers[0].daemon;
        match how {
            "killed" => server.kill()?,
            _ => server.terminate()?,
        }
        thread::sleep(Duration::from_millis(300));
        server.start()?;
        let start = Instant::now();
        load.wait_answered(1, BACK)
            .with_context(|| format!("the server was {how}"))?;
        println!(
            "{how}: served {:?} after the server's start",
            start.elapsed()
        );
        load.wait_answered(50, BACK)?;
    }
    let attempts = load.stop();
    attempts.iter().try_for_each(refused_or_reset)?;
    let failed = attempts
        .iter()
        .filter(|attempt| attempt.result.is_err())
        .count();
    ensure!(failed > 0, "none of {} noticed a restart", attempts.len());
    assert_eq!(lab.router.leaked()?, 0);
    Ok(())
}

/// With `fail: open` the same connects reach the ordinary route's end while the server is away,
/// and none is refused.
#[test]
fn an_attachment_that_fails_open_takes_the_ordinary_route() -> Result<()> {
    if !lab::available()? || !lab::kernel_since((6, 1), lab::ERRNOS)? {
        return Ok(());
    }
    let mut lab = Lab::without_connector(LabSpec::new(Programs::of_this_test()?))?;
    lab.configure_connector()?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["redirect"]["attachments"][0]["fail"] = "open".into())?;
    lab.start_configured()?;
    decoy(&lab.control_plane.netns)?;
    answered(&lab, "hello")?;

    let load = Load::start(&lab.control_plane, CLIENTS, |request| ask(echo(), request))?;
    load.wait_answered(50, BACK)?;
    lab.control_plane.servers[0].daemon.kill()?;
    for _ in 0..20 {
        answered(&lab, DECOY).context("the server is dead")?;
    }
    lab.control_plane.servers[0].daemon.start()?;
    eventually(BACK, || answered(&lab, "hello")).context("the server is back")?;
    load.wait_answered(50, BACK)?;
    let attempts = load.stop();
    for attempt in &attempts {
        match &attempt.result {
            Ok(answer) if *answer == attempt.request || answer == DECOY => {}
            // Redirected, and then the server died; or it was just back, and without an agent.
            _ => refused_or_reset(attempt)?,
        }
        let refused = matches!(&attempt.result, Err(Failure::Connect(error))
            if error.kind() == ErrorKind::ConnectionRefused);
        ensure!(!refused, "{attempt:?}");
    }

    lab.control_plane.servers[0].daemon.stop()?;
    thread::sleep(STUCK + Duration::from_millis(500));
    answered(&lab, DECOY).context("the server is stopped")?;
    lab.control_plane.servers[0].daemon.cont()?;
    eventually(BACK, || answered(&lab, "hello")).context("the server goes on")
}

/// Answers on the ordinary route, which leads to this namespace itself.
fn decoy(netns: &Netns) -> Result<()> {
    netns.ip("route add local 10.99.0.0/16 dev lo\n")?;
    let port = Behaviour::Echo.port();
    let listener = netns.enter(|| Ok(TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?))?;
    thread::spawn(move || {
        for mut stream in listener.incoming().filter_map(Result::ok) {
            thread::spawn(move || {
                // The question first: an answer to an unread question would be a reset.
                let read = std::io::Read::read(&mut stream, &mut [0; 4096]);
                read.and_then(|_| stream.write_all(format!("{DECOY}\n").as_bytes()))
            });
        }
    });
    Ok(())
}

fn redirect(lab: &Lab, arguments: &[&str]) -> Result<String> {
    let server = &lab.control_plane.servers[0].daemon;
    let mut cpc = lab
        .control_plane
        .netns
        .command(Programs::of_this_test()?.cpc)?;
    cpc.arg("redirect").args(arguments);
    let output = cpc.arg("--config").arg(server.config_file()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "cpc redirect {arguments:?}: {said}"
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// The number of the program in each hook, by the hook's name.
fn programs(status: &str) -> Result<Vec<(String, u64)>> {
    let status: Value = serde_json::from_str(status)?;
    let links = status[0]["links"].as_object().context("no links")?;
    let number = |(hook, link): (&String, &Value)| {
        ensure!(link["state"] == "attached", "{hook} is {link}");
        Ok((
            hook.clone(),
            link["program"].as_u64().context("no program")?,
        ))
    };
    links.iter().map(number).collect()
}

/// `cpc redirect attach` puts its own programs in the place of those that run, again and again,
/// while clients connect: not one connect fails and none escapes. `detach` gives the ordinary
/// route back.
#[test]
fn programs_are_replaced_under_load() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = counting_leaks()?;
    let load = Load::start(&lab.control_plane, CLIENTS, |request| ask(echo(), request))?;
    load.wait_answered(20, BACK)?;
    for _ in 0..15 {
        let before = programs(&redirect(&lab, &["status", "--json"])?)?;
        ensure!(before.len() >= 5, "programs: {before:?}");
        redirect(&lab, &["attach"])?;
        let after = programs(&redirect(&lab, &["status", "--json"])?)?;
        for ((hook, old), (_, new)) in before.iter().zip(&after) {
            ensure!(new > old, "{hook} was not replaced: {before:?} {after:?}");
        }
        load.wait_answered(5, BACK)?;
    }
    for attempt in load.stop() {
        ensure!(
            attempt
                .result
                .as_ref()
                .is_ok_and(|answer| *answer == attempt.request),
            "{attempt:?}"
        );
    }
    assert_eq!(lab.router.leaked()?, 0);

    let shown = redirect(&lab, &["status"])?;
    ensure!(
        shown.contains("attachment kube-apiserver  fails closed") && shown.contains("redirected"),
        "{shown}"
    );
    redirect(&lab, &["detach"])?;
    assert_eq!(redirect(&lab, &["status"])?.trim(), "nothing is attached");
    let took = connects_until(&lab, BACK, |kind| kind == Some(ErrorKind::TimedOut));
    took.context("after detach the router drops it")?;
    ensure!(lab.router.leaked()? > 0, "the ordinary route was not taken");
    Ok(())
}
