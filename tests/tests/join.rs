//! Workers that join with a token, and certificates that are renewed over the tunnel.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tunnel_tests::client::{connect_through, eventually, round_trips};
use tunnel_tests::lab::config::ConnectorPki;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);
const JOIN_PORT: u16 = 8138;

/// A laboratory whose server issues certificates. Nothing is started.
fn lab_with_desk() -> Result<Lab> {
    let spec = LabSpec {
        redirect: false,
        ..LabSpec::new(Programs::of_this_test()?)
    };
    let mut lab = Lab::without_connector(spec)?;
    lab.configure_connector()?;
    let ca = lab.folder().join("pki");
    let server = &mut lab.control_plane.servers[0].daemon;
    fs::write(server.config_file().with_file_name("revoked"), "")?;
    server.configure(|config| {
        config["join"] = json!({"listen": desk(), "ca": ca});
        config["audit"] = json!({"directory": "audit"});
        config["tls"]["revoked"] = json!("revoked");
    })?;
    Ok(lab)
}

fn desk() -> SocketAddr {
    (address::server(1), JOIN_PORT).into()
}

fn output(command: &mut Command) -> Result<(bool, String)> {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output()?;
    let said = [stdout, stderr].concat();
    Ok((status.success(), String::from_utf8(said)?))
}

/// `cpc token` on the server's host; what it prints.
fn token(lab: &Lab, arguments: &[&str]) -> Result<String> {
    let mut cpc = Command::new(&Programs::of_this_test()?.cpc);
    let config = lab.control_plane.servers[0].daemon.config_file();
    cpc.arg("token").args(arguments).arg("--config").arg(config);
    let (done, said) = output(&mut cpc)?;
    ensure!(done, "{said}");
    Ok(said)
}

/// Joins as `cpc token create` said, on the first worker; `more` goes behind it.
fn join(lab: &Lab, command: &str, more: &[&str]) -> Result<(bool, String)> {
    let mut cpc = lab.workers[0]
        .netns
        .command(&Programs::of_this_test()?.cpc)?;
    let arguments = command.trim().strip_prefix("cpc ").context("no command")?;
    cpc.args(arguments.split(' ')).args(more);
    output(&mut cpc)
}

fn echo_works(lab: &Lab) -> Result<()> {
    let echo = format!("{}:{}", address::node(1), Behaviour::Echo.port());
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    round_trips(connect_through(proxy, &echo)?, 1).map(drop)
}

fn use_joined(config: &mut Value) {
    config["tls"] = json!({
        "cert": "joined/agent.pem", "key": "joined/agent.pem", "ca": "joined/ca.crt", "renew": true,
    });
}

/// A worker with nothing but a token becomes an agent, and the holder of the token then becomes no
/// other agent.
#[test]
fn a_worker_joins_with_a_token() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab_with_desk()?;
    lab.control_plane.servers[0].daemon.start()?;
    lab.control_plane.servers[0]
        .daemon
        .wait_log(SOON, 0, &["server is up"])?;
    let beside = lab.workers[0].agent()?.config_file();
    let folder = |name: &str| {
        let folder = beside.with_file_name(name);
        folder.to_string_lossy().into_owned()
    };
    let (node, desk) = (address::node(1).to_string(), desk().to_string());
    let create = |lab: &Lab, node_name, uses| {
        let range = ["--ip", "10.99.0.0/16", "--server", &desk, "--uses", uses];
        token(
            lab,
            &[&["create", "--node", node_name][..], &range].concat(),
        )
    };
    // The address is named, so that the command which is printed asks for it.
    let exact = ["create", "--node", "w1", "--ip", &node, "--server", &desk];
    let command = token(&lab, &exact)?;
    let secret = command.split("--token ").nth(1).context("no token")?;
    let (id, secret) = secret.split_once('.').context("no secret")?;
    let secret = &secret[..32];

    // What comes first is not a join: garbage, half a handshake, silence.
    let mut strangers = Vec::new();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[22, 3, 1, 2, 0, 1], b""] {
        strangers.push(lab.workers[0].netns.enter(|| {
            let mut stream = TcpStream::connect((address::server(1), JOIN_PORT))?;
            stream.write_all(bytes)?;
            Ok(stream)
        })?);
    }

    let pin = command.split("--ca-hash ").nth(1).context("no hash")?;
    let pin = pin.split(' ').next().context("no hash")?;
    let other = command.replace(pin, &format!("sha256:{}", "0".repeat(64)));
    let (joined, said) = join(&lab, &other, &["--out", &folder("no")])?;
    ensure!(!joined && said.contains("no CA that it shows"), "{said}");

    let (joined, said) = join(&lab, &command, &["--out", &folder("joined")])?;
    ensure!(
        joined && said.contains("spiffe://cluster.local/agent/w1 until"),
        "{said}"
    );
    ensure!(said.contains("--renew"), "{said}");
    lab.workers[0].agent()?.configure(use_joined)?;
    lab.workers[0].agent()?.start()?;
    eventually(SOON, || echo_works(&lab))?;

    // The same token for another key, and for another node.
    let (joined, said) = join(&lab, &command, &["--out", &folder("no")])?;
    ensure!(!joined && said.contains("used up"), "{said}");
    let as_w2 = command.replace("--node w1", "--node w2");
    let (joined, said) = join(&lab, &as_w2, &["--out", &folder("no2")])?;
    ensure!(
        !joined && said.contains("nodes called w1, not for w2"),
        "{said}"
    );
    let (joined, said) = join(&lab, &command, &["--out", &folder("joined")])?;
    ensure!(!joined && said.contains("is there already"), "{said}");

    // A token for many does not make anybody w1, and is not for other addresses.
    let many = create(&lab, "w*", "5")?;
    let (joined, said) = join(&lab, &many, &["--node", "w1", "--out", &folder("no3")])?;
    ensure!(
        !joined && said.contains("certificate of another key"),
        "{said}"
    );
    let w5 = ["--node", "w5", "--out", &folder("no4")];
    let (joined, said) = join(&lab, &many, &[&w5[..], &["--ip", &node]].concat())?;
    ensure!(
        !joined && said.contains("in the certificate of w1"),
        "{said}"
    );
    let (joined, said) = join(&lab, &many, &[&w5[..], &["--ip", "10.1.1.1"]].concat())?;
    ensure!(!joined && said.contains("not for a node with"), "{said}");

    // Revoked, both kinds.
    let list = token(&lab, &["list"])?;
    ensure!(list.contains(id) && list.contains("w1"), "{list}");
    let many_id = many.split("--token ").nth(1).context("no token")?;
    token(&lab, &["revoke", &many_id[..8]])?;
    let (joined, said) = join(&lab, &many, &[&w5[..], &["--ip", "10.99.9.9"]].concat())?;
    ensure!(!joined && said.contains("was revoked"), "{said}");
    let server = &lab.control_plane.servers[0].daemon;
    let seen = server.log().len();
    let revoked = server.config_file().with_file_name("revoked");
    fs::write(&revoked, "spiffe://cluster.local/agent/w1\n")?;
    server.wait_log(SOON, seen, &["agent disconnected", "has been revoked"])?;
    let again = create(&lab, "w1", "1")?;
    let (joined, said) = join(&lab, &again, &["--out", &folder("no5")])?;
    ensure!(
        !joined && said.contains("agent/w1 has been revoked"),
        "{said}"
    );

    // Recorded and counted; the secret is nowhere.
    let (_, metrics) = server.get("/metrics")?;
    let issued = r#"cpc_certificate_requests_total{kind="join",outcome="issued"} 1"#;
    ensure!(metrics.contains(issued), "{metrics}");
    let audit = server.config_file().with_file_name("audit");
    let joined = eventually(SOON, || {
        let mut records = String::new();
        for file in fs::read_dir(&audit)? {
            records += &fs::read_to_string(file?.path())?;
        }
        let event = { records.lines() }.find(|line| line.contains(r#""event":"joined""#));
        let event = event.context("not recorded")?.to_owned();
        Ok((event, records))
    })?;
    ensure!(
        joined.0.contains(id) && joined.0.contains("agent/w1"),
        "{}",
        joined.0
    );
    let book = fs::read_to_string(server.config_file().with_file_name("state/join/join.json"))?;
    for text in [&joined.1, &server.log(), &list, &book] {
        ensure!(!text.contains(secret), "{text}");
    }
    Ok(())
}

/// A certificate near its end, which the log announces, is replaced over the tunnel, while a connection
/// goes on; with what was issued the agent comes back after a restart. It is another CA that issues: the
/// agent takes it, since the old one has signed it.
#[test]
fn a_certificate_is_renewed_over_the_tunnel() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let mut lab = lab_with_desk()?;
    let new_ca = lab.folder().join("new-pki");
    ConnectorPki::create(&Programs::of_this_test()?.cpc, new_ca.clone())?;
    let server = lab.control_plane.servers[0].daemon.config_file();
    let (both, new) = (server.with_file_name("both.crt"), new_ca.join("ca.crt"));
    let [both, new] = [both, new].map(|file| file.to_string_lossy().into_owned());
    lab.pki()
        .run("cross-sign", &["--ca", &new, "--out", &both])?;
    lab.control_plane.servers[0].daemon.configure(|config| {
        config["tls"]["ca"] = json!(both);
        config["join"]["ca"] = json!(new_ca);
    })?;
    // Two thirds of its life are over: it counts from five minutes ago.
    let folder = lab.workers[0]
        .agent()?
        .config_file()
        .with_file_name("joined");
    let out = folder.to_str().context("not UTF-8")?.to_owned();
    let end = humantime::format_rfc3339_seconds(SystemTime::now() + Duration::from_secs(60));
    let (node, end) = (address::node(1).to_string(), end.to_string());
    let request = [
        "--node",
        "w1",
        "--ip",
        &node,
        "--not-after",
        &end,
        "--out",
        &out,
    ];
    lab.pki().run("agent", &request)?;
    let both = ["agent.key", "agent.crt"].map(|file| fs::read(folder.join(file)));
    let [key, certificate] = both;
    let first = [key?, certificate?].concat();
    fs::write(folder.join("agent.pem"), &first)?;
    lab.workers[0].agent()?.configure(use_joined)?;
    lab.start_configured()?;

    let echo = format!("{}:{}", address::node(1), Behaviour::Echo.port());
    let proxy = lab.control_plane.servers[0].sockets.connect_unix.clone();
    let living = connect_through(&proxy, &echo)?;
    living.set_read_timeout(Some(SOON))?;
    round_trips(&living, 1)?;
    let agent = lab.workers[0].agent()?;
    agent.wait_log(SOON, 0, &["WARN", "certificate expires soon", "agent/w1"])?;
    agent.wait_log(SOON, 0, &["INFO", "certificate renewed"])?;
    agent.wait_log(SOON, 0, &["INFO", "certificates reloaded"])?;
    agent.wait_log(SOON, 0, &["INFO", "CA added", "sha256:"])?;
    // The new CA, and its certificate by the old one.
    let (_, metrics) = agent.get("/metrics")?;
    ensure!(metrics.contains("cpc_ca_changes_total 2"), "{metrics}");
    let ends = r#"cpc_certificate_not_after_timestamp_seconds{purpose="tunnel",kind="own"}"#;
    ensure!(metrics.contains(ends), "{metrics}");
    let server = &lab.control_plane.servers[0].daemon;
    server.wait_log(SOON, 0, &["certificate renewed", "agent/w1"])?;
    ensure!(
        fs::read(folder.join("agent.pem"))? != first,
        "it is the old one"
    );
    round_trips(&living, 3).context("the connection from before")?;
    let (_, metrics) = server.get("/metrics")?;
    let issued = r#"cpc_certificate_requests_total{kind="renewal",outcome="issued"} 1"#;
    ensure!(metrics.contains(issued), "{metrics}");
    drop(living);
    lab.workers[0].agent()?.restart()?;
    lab.workers[0].agent()?.wait_ready(SOON)?;
    echo_works(&lab)?;
    let log = lab.workers[0].agent()?.log();
    let renewed = log.matches("certificate renewed").count();
    ensure!(renewed == 1, "the new one is renewed at once: {log}");
    Ok(())
}
