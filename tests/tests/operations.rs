//! Work of an operator with a running connector: inspect it, change it, and read its output.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tunnel_tests::client::{connect_through, eventually, round_trips};
use tunnel_tests::lab::daemon::Daemon;
use tunnel_tests::lab::netns::Netns;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);

fn echo(n: u8) -> SocketAddr {
    (address::node(n), Behaviour::Echo.port()).into()
}

/// Runs `cpc` in `netns`, speaking to the process that answers at `admin`.
fn cpc(netns: &Netns, admin: SocketAddr, arguments: &[&str]) -> Result<Output> {
    let mut cpc = netns.command(Programs::of_this_test()?.cpc)?;
    cpc.args(arguments).args(["--admin", &admin.to_string()]);
    Ok(cpc.output()?)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A round trip through CONNECT; the error is what the client was told.
fn through(lab: &Lab, destination: SocketAddr) -> Result<()> {
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    let stream = connect_through(proxy, &destination.to_string())?;
    stream.set_read_timeout(Some(SOON))?;
    round_trips(stream, 1).map(drop)
}

/// The same through the redirect.
fn redirected(lab: &Lab, destination: SocketAddr) -> Result<()> {
    lab.control_plane.as_apiserver(|| {
        let stream = TcpStream::connect_timeout(&destination, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        round_trips(stream, 1).map(drop)
    })
}

/// `cpc status` of both programs: the table, the JSON, the exit code, and all of it again once the
/// agent is gone; `/readyz` says the same.
#[test]
fn status_shows_who_is_there() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let stream = connect_through(
        &lab.control_plane.servers[0].sockets.connect_unix,
        &echo(1).to_string(),
    )?;
    round_trips(&stream, 10)?;

    let (cp, admin) = (
        lab.control_plane.netns.clone(),
        lab.control_plane.servers[0].sockets.admin,
    );
    let table = cpc(&cp, admin, &["status"])?;
    let shown = text(&table.stdout);
    assert_eq!(table.status.code(), Some(0), "{shown}");
    for piece in [
        "spiffe://cluster.local/server/s1",
        "spiffe://cluster.local/agent/w1",
        "10.99.1.2",
        "10.244.1.0/24",
        "live",
        "10 B",
        "kube-apiserver",
        "fails closed",
        "127.0.0.1:8137",
    ] {
        ensure!(shown.contains(piece), "no {piece:?} in\n{shown}");
    }
    let json = cpc(&cp, admin, &["status", "--json"])?;
    assert_eq!(json.status.code(), Some(0));
    let status: Value = serde_json::from_slice(&json.stdout)?;
    let agent = &status["agents"][0];
    assert_eq!(status["role"], "server");
    assert_eq!(status["ready"], true);
    assert_eq!(agent["streams"], 1, "{status}");
    assert_eq!(
        (&agent["up_bytes"], &agent["down_bytes"]),
        (&json!(10), &json!(10))
    );
    assert_eq!(agent["refused"], json!([]));
    let remote = agent["address"].as_str().context("no address")?;
    ensure!(remote.starts_with(&address::ROUTER.to_string()), "{remote}");

    let worker = lab.workers[0].netns.clone();
    let agent_admin = lab.workers[0].agent()?.admin;
    let shown = cpc(&worker, agent_admin, &["status"])?;
    let table = text(&shown.stdout);
    assert_eq!(shown.status.code(), Some(0), "{table}");
    for piece in [
        "agent/w1",
        "s1",
        "192.0.2.1:8132",
        "1 of 1 servers",
        "may dial: 10.99.1.2/32",
    ] {
        ensure!(table.contains(piece), "no {piece:?} in\n{table}");
    }

    // A port without a listener, and a listener that is no connector.
    let absent = cpc(&cp, "127.0.0.1:1".parse()?, &["status"])?;
    assert_eq!(absent.status.code(), Some(1));
    ensure!(text(&absent.stderr).contains("no answer at 127.0.0.1:1"));
    let admin_of_health = lab.control_plane.servers[0].sockets.tunnel;
    let other = cpc(&cp, admin_of_health, &["status"])?;
    assert_eq!(other.status.code(), Some(1));
    ensure!(
        text(&other.stderr).contains("not a status"),
        "{}",
        text(&other.stderr)
    );

    // An agent that is told to end would wait for it.
    drop(stream);
    lab.workers[0].agent()?.terminate()?;
    let server = &lab.control_plane.servers[0].daemon;
    let gone = server.wait_status(SOON, |status| status["agents"] == json!([]))?;
    assert_eq!(gone["ready"], false);
    let (code, why) = server.get("/readyz")?;
    assert_eq!((code, why.as_str()), (503, "no agent answers heartbeats\n"));
    assert_eq!(server.get("/healthz")?.0, 200);
    let empty = cpc(&cp, admin, &["status"])?;
    assert_eq!(empty.status.code(), Some(1));
    ensure!(
        text(&empty.stdout).contains("NOT ready"),
        "{}",
        text(&empty.stdout)
    );

    lab.workers[0].agent()?.start()?;
    lab.workers[0].agent()?.wait_ready(SOON)?;
    lab.control_plane.servers[0].daemon.kill()?;
    let agent = lab.workers[0].agent()?;
    eventually(2 * SOON, || match agent.get("/readyz")? {
        (503, why) if why == "no server is reached\n" => Ok(()),
        other => bail!("{other:?}"),
    })?;
    assert_eq!(agent.get("/livez")?.0, 200);
    Ok(())
}

/// The server recreates a CONNECT socket that was removed; one that another process has put in its
/// place shows in `/readyz`.
#[test]
fn a_connect_socket_that_is_gone_is_made_again() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let server = &lab.control_plane.servers[0];
    let socket = &server.sockets.connect_unix;
    std::fs::remove_file(socket)?;
    eventually(SOON, || through(&lab, echo(1)))?;
    server
        .daemon
        .wait_log(SOON, 0, &["WARN", "is made again"])?;
    assert_eq!(server.daemon.get("/readyz")?.0, 200);

    std::fs::remove_file(socket)?;
    let another = std::os::unix::net::UnixListener::bind(socket)?;
    eventually(SOON, || match server.daemon.get("/readyz")? {
        (503, why) if why.contains("another process") => Ok(()),
        other => bail!("{other:?}"),
    })?;
    drop(another);
    std::fs::remove_file(socket)?;
    eventually(SOON, || through(&lab, echo(1)))?;
    assert_eq!(server.daemon.get("/readyz")?.0, 200);
    Ok(())
}

/// `--watch` on a terminal draws the table again and again in one place.
#[test]
fn watching_redraws_a_terminal() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let program = Programs::of_this_test()?.cpc;
    let command = format!(
        "stty cols 220; timeout 3 {} status --watch",
        program.display()
    );
    let mut script = lab.control_plane.netns.command("script")?;
    script.args(["--quiet", "--command", &command, "/dev/null"]);
    let shown = text(&script.output()?.stdout);
    let drawn = shown.matches("\x1b[H\x1b[2J").count();
    ensure!(drawn >= 2, "drawn {drawn} times: {shown:?}");
    assert_eq!(shown.matches("agent/w1").count(), drawn, "{shown:?}");

    // A process that is away for a moment does not end the watch.
    let mut away = lab.control_plane.netns.command("timeout")?;
    away.arg("3").arg(&program);
    away.args(["status", "--watch", "--admin", "127.0.0.1:1"]);
    let shown = text(&away.output()?.stdout);
    ensure!(shown.matches("no answer at").count() >= 2, "{shown:?}");
    Ok(())
}

/// `cpc log` changes what a running process writes, and refuses what is no filter.
#[test]
fn the_log_filter_changes_while_it_runs() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let server = &lab.control_plane.servers[0];
    let log = |filter: &str| {
        cpc(
            &lab.control_plane.netns,
            server.sockets.admin,
            &["log", filter],
        )
    };
    let written = |id: &str| -> Result<usize> {
        let seen = server.daemon.log().len();
        through(&lab, echo(1))?;
        std::thread::sleep(Duration::from_millis(200));
        Ok(server.daemon.log()[seen..].matches(id).count())
    };
    ensure!(!server.daemon.log().contains("TRACE"));
    assert_eq!(written("cpc::access: ")?, 1);

    let changed = log("trace,cpc::access=off")?;
    ensure!(changed.status.success(), "{}", text(&changed.stderr));
    assert_eq!(written("cpc::access: ")?, 0);
    lab.control_plane.servers[0]
        .daemon
        .wait_log(SOON, 0, &["TRACE"])?;

    let refused = log("info,cpc=loud")?;
    assert_eq!(refused.status.code(), Some(1));
    ensure!(
        text(&refused.stderr).contains("is no log filter"),
        "{}",
        text(&refused.stderr)
    );
    assert_eq!(written("cpc::access: ")?, 0, "the old filter is gone");

    ensure!(log("info")?.status.success());
    let seen = server.daemon.log().len();
    assert_eq!(written("cpc::access: ")?, 1);
    ensure!(!server.daemon.log()[seen..].contains("TRACE"));
    Ok(())
}

/// The value of `key=` in a line of the text log.
fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let at = line.find(&format!(" {key}="))? + key.len() + 2;
    line[at..]
        .split(' ')
        .next()
        .map(|value| value.trim_matches('"'))
}

/// One line a connection on each side, under one id, for CONNECT, for the redirect and for a dial
/// that failed; in JSON the same fields.
#[test]
fn the_access_log_tells_each_connection() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let closed: SocketAddr = (address::node(1), 7000).into();
    for (way, frontend) in [
        (
            through as fn(&Lab, SocketAddr) -> Result<()>,
            "http_connect",
        ),
        (redirected, "redirect"),
    ] {
        way(&lab, echo(1))?;
        let server = &lab.control_plane.servers[0].daemon;
        let wanted = format!("frontend=\"{frontend}\"");
        let line = server.wait_log(SOON, 0, &["cpc::access", &wanted])?;
        for (key, value) in [
            ("destination", echo(1).to_string()),
            ("peer", "w1".into()),
            ("up", "1".into()),
            ("down", "1".into()),
            ("closed_by", "client".into()),
            ("reason", "finished".into()),
        ] {
            assert_eq!(field(&line, key), Some(value.as_str()), "{line}");
        }
        let dial: f64 = field(&line, "dial_ms").context("no dial_ms")?.parse()?;
        ensure!(dial > 0.0, "{line}");
        let client = field(&line, "client").is_some_and(|it| it.starts_with("127.0.0.1:"));
        assert_eq!(client, frontend == "redirect", "{line}");
        let id = field(&line, "id").context("no id")?.to_owned();
        assert_eq!(id.len(), 32, "{line}");
        let pieces = ["cpc::access", &id, "peer=\"s1\"", "reason=\"finished\""];
        lab.workers[0].agent()?.wait_log(SOON, 0, &pieces)?;
    }
    ensure!(through(&lab, closed).is_err());
    let server = &lab.control_plane.servers[0].daemon;
    let line = server.wait_log(SOON, 0, &["cpc::access", &closed.to_string()])?;
    // The agent's allow-list has no port 7000.
    assert_eq!(field(&line, "reason"), Some("policy_denied"), "{line}");
    assert_eq!(field(&line, "closed_by"), Some("agent"), "{line}");
    ensure!(
        line.contains("allow-list") && field(&line, "dial_ms").is_none(),
        "{line}"
    );

    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["log"] = json!({"format": "json"}))?;
    let seen = server.log().len();
    server.restart()?;
    server.wait_ready(SOON)?;
    through(&lab, echo(1))?;
    let server = &lab.control_plane.servers[0].daemon;
    let line = server.wait_log(SOON, seen, &["cpc::access", "finished"])?;
    let record: Value = serde_json::from_str(&line)?;
    assert_eq!(record["target"], "cpc::access");
    assert_eq!(record["destination"], echo(1).to_string());
    assert_eq!((&record["up"], &record["down"]), (&json!(1), &json!(1)));
    assert_eq!(record["closed_by"], "client");
    ensure!(
        record["dial_ms"].as_f64().is_some_and(|ms| ms > 0.0),
        "{line}"
    );
    let all_json = |line: &str| serde_json::from_str::<Value>(line).is_ok();
    let own = server.log()[seen..]
        .lines()
        .skip_while(|line| !all_json(line))
        .all(all_json);
    ensure!(own, "not each line is JSON");
    Ok(())
}

/// SIGHUP puts another policy, allow-list and capture set in force without touching a connection;
/// a file that can't be read changes nothing and is complained about.
#[test]
fn configuration_is_reloaded() -> Result<()> {
    if !lab::available()? || !lab::kernel_since((6, 1), lab::ERRNOS)? {
        return Ok(());
    }
    let mut lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
    let old = connect_through(&proxy, &echo(1).to_string())?;
    old.set_read_timeout(Some(SOON))?;
    let pod = SocketAddr::from((address::pod(1), Behaviour::Echo.port()));
    through(&lab, pod)?;

    // Policy: the pods' network is granted no more, then again.
    let grants = json!([{"identity": "spiffe://cluster.local/agent/nobody", "cidrs": []}]);
    let server = &mut lab.control_plane.servers[0].daemon;
    let mut before = Value::Null;
    server.configure(|config| {
        before = std::mem::replace(&mut config["policy"]["grants"], grants);
    })?;
    server.signal(Signal::SIGHUP)?;
    let status = server.wait_status(SOON, |status| {
        status["agents"][0]["refused"]
            .as_array()
            .is_some_and(|all| all.len() == 2)
    })?;
    ensure!(
        status["agents"][0]["refused"][0]["claim"] == "10.244.1.0/24",
        "{status}"
    );
    let told = through(&lab, pod).err().context("still served")?;
    ensure!(format!("{told:#}").contains("503"), "{told:#}");
    through(&lab, echo(1))?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| config["policy"]["grants"] = before)?;
    server.signal(Signal::SIGHUP)?;
    eventually(SOON, || through(&lab, pod))?;

    // Capture set: what was left alone is refused, since nobody serves it.
    let elsewhere: SocketAddr = "192.0.2.77:9".parse()?;
    let errno = |lab: &Lab| -> Result<Option<i32>> {
        lab.control_plane.as_apiserver(|| {
            let refused = TcpStream::connect_timeout(&elsewhere, SOON).err();
            Ok(refused.and_then(|error| error.raw_os_error()))
        })
    };
    assert_eq!(errno(&lab)?, Some(libc::EHOSTUNREACH), "nobody has it");
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| {
        let capture = &mut config["redirect"]["attachments"][0]["capture"];
        if let Some(all) = capture.as_array_mut() {
            all.push(json!({"cidr": "192.0.2.77/32"}));
        }
    })?;
    server.signal(Signal::SIGHUP)?;
    eventually(SOON, || match errno(&lab)? {
        Some(libc::ENETUNREACH) => Ok(()),
        other => bail!("errno {other:?}"),
    })?;

    // The agent's allow-list.
    let agent = lab.workers[0].agent()?;
    let seen = agent.log().len();
    agent.configure(|config| config["allow"] = json!([{"cidr": "10.244.0.0/16"}]))?;
    agent.signal(Signal::SIGHUP)?;
    agent.wait_log(SOON, seen, &["INFO", "allow-list", "reloaded"])?;
    let told = through(&lab, echo(1)).err().context("still dialled")?;
    ensure!(format!("{told:#}").contains("403"), "{told:#}");
    through(&lab, pod)?;

    // Broken files, on both sides.
    let shows = |daemon: &Daemon, is_successful: u8| {
        eventually(SOON, || {
            let (_, metrics) = daemon.get("/metrics")?;
            let line = format!("\ncpc_config_last_reload_successful {is_successful}\n");
            ensure!(metrics.contains(&line), "no {line} in {metrics}");
            Ok(())
        })
    };
    let broken = |daemon: &mut Daemon| -> Result<()> {
        shows(daemon, 1)?;
        let seen = daemon.log().len();
        daemon.configure(|config| config["unheard_of"] = json!(1))?;
        daemon.signal(Signal::SIGHUP)?;
        let pieces = ["WARN", "configuration not reloaded", "unheard_of", "line"];
        daemon.wait_log(SOON, seen, &pieces)?;
        shows(daemon, 0)
    };
    let mended = |daemon: &mut Daemon| -> Result<()> {
        daemon.configure(|config| {
            config.as_object_mut().map(|it| it.remove("unheard_of"));
        })?;
        daemon.signal(Signal::SIGHUP)?;
        shows(daemon, 1)
    };
    broken(&mut lab.control_plane.servers[0].daemon)?;
    broken(lab.workers[0].agent()?)?;
    through(&lab, pod)?;
    assert_eq!(errno(&lab)?, Some(libc::ENETUNREACH));
    mended(&mut lab.control_plane.servers[0].daemon)?;
    mended(lab.workers[0].agent()?)?;
    round_trips(&old, 3).context("the connection from before")?;
    Ok(())
}

/// The admin port takes a filter of any form and size without harm, and nothing but what it knows.
#[test]
fn the_admin_port_knows_its_paths() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = Lab::up(LabSpec::new(Programs::of_this_test()?))?;
    let ask = |port: SocketAddr, head: &str, body: &[u8]| -> Result<String> {
        let mut stream = lab
            .control_plane
            .netns
            .enter(|| Ok(TcpStream::connect(port)?))?;
        stream.set_read_timeout(Some(SOON))?;
        let length = body.len();
        let head = format!("{head} HTTP/1.0\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes())?;
        // It may be refused before it is sent.
        let _ = stream.write_all(body);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = text(&answer);
        Ok(answer.split(' ').nth(1).unwrap_or_default().to_owned())
    };
    let sockets = &lab.control_plane.servers[0].sockets;
    let huge = vec![b'a'; 8 << 20];
    for (head, body, expected) in [
        ("GET /healthz", &b""[..], "200"),
        ("GET /livez", b"", "200"),
        ("GET /readyz", b"", "200"),
        ("GET /status", b"", "200"),
        ("GET /metrics", b"", "200"),
        ("GET /", b"", "404"),
        ("GET /../status", b"", "404"),
        ("DELETE /status", b"", "405"),
        ("POST /log", b"info", "405"),
        ("PUT /log", b"\xff\xfe", "400"),
        ("PUT /log", b"cpc=loud", "400"),
        ("PUT /log", &huge, "413"),
        ("PUT /log", b"info", "200"),
    ] {
        assert_eq!(ask(sockets.admin, head, body)?, expected, "{head}");
    }
    // Strangers reach the health port: it tells whether, and nothing else.
    for (head, expected) in [
        ("GET /readyz", "200"),
        ("GET /status", "404"),
        ("GET /metrics", "404"),
        ("PUT /log", "404"),
    ] {
        assert_eq!(ask(sockets.tunnel, head, b"off")?, expected, "{head}");
    }
    Ok(())
}
