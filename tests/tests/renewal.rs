//! Certificates that are replaced on disk while everything runs: from one CA to another without
//! losing a connection, as an administrator would.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use tunnel_tests::client::{connect_through, round_trips};
use tunnel_tests::lab::config::ConnectorPki;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);
const RELOADED: [&str; 2] = ["INFO", "certificates reloaded"];

/// Replaces a file by `text` in one step, as a renewal should.
fn replace(file: &Path, text: &[u8]) -> Result<()> {
    let aside = file.with_extension("new");
    fs::write(&aside, text)?;
    fs::rename(&aside, file).with_context(|| file.display().to_string())
}

/// A second CA for the same trust domain, and certificates of the same names by it.
struct NewAuthority {
    folder: PathBuf,
}

impl NewAuthority {
    fn create(lab: &Lab) -> Result<Self> {
        let folder = lab.folder().join("new");
        let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
        let pki = ConnectorPki::create(&Programs::of_this_test()?.cpc, folder.join("ca"))?;
        let (s1, w1, client) = (path("s1"), path("w1"), path("client"));
        pki.run("agent", &["--node", "w9", "--out", &path("w9")])?;
        pki.run("server", &["--id", "s1", "--ip", "127.0.0.1", "--out", &s1])?;
        let node = address::node(1).to_string();
        pki.run("agent", &["--node", "w1", "--ip", &node, "--out", &w1])?;
        pki.run("client", &["--name", "curl", "--out", &client])?;
        Ok(Self { folder })
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let file = self.folder.join(name);
        fs::read(&file).with_context(|| file.display().to_string())
    }
}

/// Each side first trusts both CAs, then shows a certificate of the new one, then trusts the new
/// one alone; a connection opened before the first step is used after the last. At each step what
/// is new is in force for new connections, and a broken file in between changes nothing.
#[test]
fn a_ca_is_replaced_under_a_living_connection() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let spec = LabSpec::new(Programs::of_this_test()?);
    let mut lab = Lab::up(LabSpec {
        redirect: false,
        ..spec
    })?;
    let new = NewAuthority::create(&lab)?;
    let sockets = lab.control_plane.servers[0].sockets.clone();
    let echo = format!("{}:{}", address::node(1), Behaviour::Echo.port());
    let living = connect_through(&sockets.connect_unix, &echo)?;
    living.set_read_timeout(Some(SOON))?;
    round_trips(&living, 1)?;
    let (server, agent) = (lab.folder().join("s1"), lab.folder().join("w1/agent"));
    let old_ca = fs::read(server.join("ca.crt"))?;
    let new_ca = new.read("ca/ca.crt")?;

    // A client that believes the new CA and is vouched for by it.
    let netns = lab.control_plane.netns.clone();
    let frontend = |trusts: &Path| -> Result<bool> {
        let mut curl = netns.command("curl")?;
        curl.args(["--silent", "--max-time", "5", "--proxytunnel", "--proxy"])
            .arg(format!("https://{}", sockets.connect_tcp))
            .arg("--proxy-cacert")
            .arg(trusts)
            .arg("--proxy-cert")
            .arg(new.folder.join("client/client.crt"))
            .arg("--proxy-key")
            .arg(new.folder.join("client/client.key"))
            .args(["--write-out", "%{http_connect}", "http://10.9.9.9:1/"]);
        // The tunnel is refused, which is an answer.
        Ok(String::from_utf8(curl.output()?.stdout)? == "503")
    };
    let new_ca_file = new.folder.join("ca/ca.crt");
    ensure!(
        !frontend(&new_ca_file)?,
        "the new CA is trusted before its time"
    );

    // A broken file, half a certificate; and on the agent one that is whole, of somebody else.
    let seen = lab.control_plane.servers[0].daemon.log().len();
    let whole = fs::read(server.join("server.crt"))?;
    replace(&server.join("server.crt"), &whole[..whole.len() / 2])?;
    let pieces = [
        "WARN",
        "certificates not reloaded, the old ones stay",
        "server.crt",
    ];
    let own = ["agent.crt", "agent.key"].map(|file| fs::read(agent.join(file)));
    for (file, name) in [("agent.key", "w9/agent.key"), ("agent.crt", "w9/agent.crt")] {
        replace(&agent.join(file), &new.read(name)?)?;
    }
    let daemon = &lab.control_plane.servers[0].daemon;
    daemon.wait_log(SOON, seen, &pieces)?;
    let pieces = [
        "WARN",
        "certificates not reloaded",
        "agent/w9 is not the running spiffe",
    ];
    lab.workers[0].agent()?.wait_log(SOON, 0, &pieces)?;
    for (file, own) in ["agent.crt", "agent.key"].into_iter().zip(own) {
        replace(&agent.join(file), &own?)?;
    }
    round_trips(connect_through(&sockets.connect_unix, &echo)?, 1)?;
    replace(&server.join("server.crt"), &whole)?;

    // Both CAs, on both sides.
    let both = [&old_ca[..], &new_ca].concat();
    let seen = lab.control_plane.servers[0].daemon.log().len();
    replace(&server.join("ca.crt"), &both)?;
    replace(&agent.join("ca.crt"), &both)?;
    lab.control_plane.servers[0]
        .daemon
        .wait_log(SOON, seen, &RELOADED)?;
    lab.workers[0].agent()?.wait_log(SOON, 0, &RELOADED)?;

    // New certificates, on both sides; a reload by SIGHUP is not needed, and does no harm.
    let seen = lab.control_plane.servers[0].daemon.log().len();
    let seen_agent = lab.workers[0].agent()?.log().len();
    for (folder, name) in [(&server, "s1/server"), (&agent, "w1/agent")] {
        let file = folder.join(name.split('/').next_back().unwrap_or_default());
        replace(
            &file.with_extension("key"),
            &new.read(&format!("{name}.key"))?,
        )?;
        replace(
            &file.with_extension("crt"),
            &new.read(&format!("{name}.crt"))?,
        )?;
    }
    lab.control_plane.servers[0]
        .daemon
        .wait_log(SOON, seen, &RELOADED)?;
    lab.workers[0]
        .agent()?
        .wait_log(SOON, seen_agent, &RELOADED)?;
    lab.control_plane.servers[0].daemon.signal(Signal::SIGHUP)?;
    tunnel_tests::client::eventually(SOON, || {
        ensure!(
            frontend(&new_ca_file)?,
            "the frontend shows the old certificate"
        );
        Ok(())
    })?;

    // The new CA alone, on both sides.
    let seen = lab.control_plane.servers[0].daemon.log().len();
    let seen_agent = lab.workers[0].agent()?.log().len();
    replace(&server.join("ca.crt"), &new_ca)?;
    replace(&agent.join("ca.crt"), &new_ca)?;
    lab.control_plane.servers[0]
        .daemon
        .wait_log(SOON, seen, &RELOADED)?;
    lab.workers[0]
        .agent()?
        .wait_log(SOON, seen_agent, &RELOADED)?;

    round_trips(&living, 3).context("the connection from before")?;
    let whole_log = lab.workers[0].agent()?.log();
    ensure!(!whole_log.contains("tunnel ended"), "{whole_log}");

    // The server is started again: it reads the new files. The agent was not, and has to show its
    // new certificate and to trust the new CA for this.
    let seen_agent = whole_log.len();
    drop(living);
    lab.control_plane.servers[0].daemon.restart()?;
    let daemon = &mut lab.control_plane.servers[0].daemon;
    daemon.wait_ready(SOON)?;
    lab.workers[0]
        .agent()?
        .wait_log(SOON, seen_agent, &["tunnel is up", "s1"])?;
    round_trips(connect_through(&sockets.connect_unix, &echo)?, 1)
        .map(drop)
        .context("after the server's restart")
}
