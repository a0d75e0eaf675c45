//! Revoked peers: their tunnels and connections end within seconds, they don't come back, and no
//! other peer notices.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tunnel_tests::client::{connect_through, eventually, round_trips};
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);
const RELOADED: [&str; 2] = ["INFO", "list of revoked peers reloaded"];

/// A laboratory without a redirect, whose first server and agents read a list each, `revoked` beside
/// their configuration.
fn lab_with_lists(workers: u8) -> Result<Lab> {
    let spec = LabSpec {
        workers,
        redirect: false,
        ..LabSpec::new(Programs::of_this_test()?)
    };
    let mut lab = Lab::without_connector(spec)?;
    lab.configure_connector()?;
    let mut daemons = vec![&mut lab.control_plane.servers[0].daemon];
    for worker in &mut lab.workers {
        daemons.push(worker.agent()?);
    }
    for daemon in daemons {
        fs::write(daemon.config_file().with_file_name("revoked"), "# nobody\n")?;
        daemon.configure(|config| config["tls"]["revoked"] = json!("revoked"))?;
    }
    lab.start_configured()?;
    Ok(lab)
}

fn echo(n: u8) -> String {
    format!("{}:{}", address::node(n), Behaviour::Echo.port())
}

fn revoke(config: &Path, entry: &str) -> Result<()> {
    let (file, aside) = (
        config.with_file_name("revoked"),
        config.with_file_name("new"),
    );
    fs::write(&aside, format!("{entry} # by a test\n"))?;
    fs::rename(aside, file).context("revoked")
}

/// The serial number of a certificate, as openssl prints it: `serial=0A1B`.
fn serial(certificate: &Path) -> Result<String> {
    let mut openssl = std::process::Command::new("openssl");
    openssl.args(["x509", "-noout", "-serial", "-in"]);
    let printed = openssl.arg(certificate).output()?.stdout;
    Ok(String::from_utf8(printed)?.trim().to_owned())
}

/// An agent is revoked by its identity: its tunnel and the connection on it end, it is told why when it
/// comes back, and is let in again when the list no longer names it. A list that can't be read changes
/// nothing. The other agent's connection lives through all of it.
#[test]
fn a_revoked_agent_is_cut_off_and_others_go_on() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab_with_lists(2)?;
    let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
    let through = |n| -> Result<_> {
        let stream = connect_through(&proxy, &echo(n))?;
        stream.set_read_timeout(Some(SOON))?;
        round_trips(&stream, 1)?;
        Ok(stream)
    };
    let (doomed, other) = (through(1)?, through(2)?);
    let daemon = &lab.control_plane.servers[0].daemon;
    let config = daemon.config_file();

    let seen = daemon.log().len();
    revoke(&config, "w1")?;
    let unread = ["ERROR", "the old one stays", "revoked", "line 1", "neither"];
    daemon.wait_log(SOON, seen, &unread)?;
    round_trips(&doomed, 1)?;

    let w1 = "spiffe://cluster.local/agent/w1";
    let revoked = format!("{w1} has been revoked");
    revoke(&config, w1)?;
    daemon.wait_log(SOON, seen, &RELOADED)?;
    let cut = ["agent disconnected", "identity_refused", &revoked];
    daemon.wait_log(SOON, seen, &cut)?;
    ensure!(round_trips(&doomed, 1).is_err(), "its connection lives on");
    let agent = lab.workers[0].agent()?;
    agent.wait_log(SOON, 0, &["identity_refused"])?;
    let daemon = &lab.control_plane.servers[0].daemon;
    daemon.wait_log(SOON, seen, &["handshake failed", &revoked])?;
    ensure!(through(1).is_err(), "it is dialled again");
    round_trips(&other, 1).context("the other agent's connection")?;

    // By the serial number of the other agent's certificate, which then is the one that is cut off.
    let certificate = lab.folder().join("w2/agent/agent.crt");
    let seen = daemon.log().len();
    revoke(&config, &serial(&certificate)?)?;
    daemon.wait_log(SOON, seen, &["agent disconnected", "agent/w2", "serial:"])?;
    ensure!(round_trips(&other, 1).is_err(), "its connection lives on");
    eventually(SOON, || through(1).map(drop)).context("the first one is let in again")
}

/// A client of a frontend: what it has open ends, and its next handshake fails.
#[test]
fn a_revoked_client_is_cut_off() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let lab = lab_with_lists(1)?;
    let out = lab.folder().join("revoked-client");
    let folder = out.to_str().context("not UTF-8")?;
    lab.pki()
        .run("client", &["--name", "curl", "--out", folder])?;
    let mut client = wait_for_an_answer(&lab, &out)?;
    let said = client.stderr.take().context("no output")?;
    let connected = BufReader::new(said).lines().map_while(Result::ok);
    ensure!({ connected }.any(|line| line.contains("HTTP/1.1 200")));

    let daemon = &lab.control_plane.servers[0].daemon;
    let seen = daemon.log().len();
    revoke(&daemon.config_file(), "spiffe://cluster.local/client/curl")?;
    daemon.wait_log(SOON, seen, &["client's connection is ended", "revoked"])?;
    daemon.wait_log(SOON, seen, &["cpc::access", "identity_refused"])?;
    let ended = eventually(SOON, || client.try_wait()?.context("it still waits"))?;
    ensure!(!ended.success(), "it had an answer");

    ensure!(!wait_for_an_answer(&lab, &out)?.wait()?.success());
    let refused = ["frontend handshake failed", "has been revoked"];
    daemon.wait_log(SOON, seen, &refused)?;
    Ok(())
}

/// A client of the frontend on TCP that asks a target which never answers.
fn wait_for_an_answer(lab: &Lab, credentials: &Path) -> Result<Child> {
    let control_plane = &lab.control_plane;
    let proxy = control_plane.servers[0].sockets.connect_tcp;
    let mut curl = control_plane.netns.command("curl")?;
    curl.args(["--silent", "--verbose", "--max-time", "60"])
        .args(["--proxytunnel", "--proxy", &format!("https://{proxy}")])
        .arg("--proxy-cacert")
        .arg(credentials.join("ca.crt"))
        .arg("--proxy-cert")
        .arg(credentials.join("client.crt"))
        .arg("--proxy-key")
        .arg(credentials.join("client.key"))
        .arg(format!(
            "http://{}:{}/",
            address::node(1),
            Behaviour::Stuck.port()
        ));
    Ok(curl.stderr(Stdio::piped()).spawn()?)
}

/// An agent holds a list of its own: a server on it loses its tunnel.
#[test]
fn an_agent_leaves_a_revoked_server() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab_with_lists(1)?;
    let agent = lab.workers[0].agent()?;
    let seen = agent.log().len();
    let s1 = "spiffe://cluster.local/server/s1";
    revoke(&agent.config_file(), s1)?;
    agent.wait_log(SOON, seen, &["tunnel ended", "identity_refused", "revoked"])?;
    agent.wait_log(SOON, seen, &["WARN", &format!("{s1} has been revoked")])?;
    Ok(())
}
