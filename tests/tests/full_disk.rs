//! A full file system below what server and agent write: errors say what helps, nothing is lost or
//! half-written, and all goes on when there is room again.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tunnel_tests::client::{connect_through, eventually, round_trips};
use tunnel_tests::lab::small_disk::SmallDisk;
use tunnel_tests::lab::{self, Lab, LabSpec, Programs, address};
use tunnel_tests::target::Behaviour;

const SOON: Duration = Duration::from_secs(15);
const JOIN_PORT: u16 = 8138;
const REMEDY: &str = "make room on its file system";

/// A laboratory whose server has its state and its audit on a small disk, and issues certificates.
/// Nothing is started.
fn lab_with_disk() -> Result<(Lab, SmallDisk)> {
    let spec = LabSpec {
        redirect: false,
        ..LabSpec::new(Programs::of_this_test()?)
    };
    let mut lab = Lab::without_connector(spec)?;
    lab.configure_connector()?;
    let disk = lab.small_disk("disk", 256 << 10)?;
    let (ca, on_disk) = (lab.folder().join("pki"), disk.path().to_owned());
    let server = &mut lab.control_plane.servers[0].daemon;
    server.configure(|config| {
        config["state_dir"] = json!(on_disk.join("state"));
        config["audit"] = json!({"directory": on_disk.join("audit")});
        config["join"] = json!({"listen": desk(), "ca": ca});
    })?;
    Ok((lab, disk))
}

fn desk() -> SocketAddr {
    (address::server(1), JOIN_PORT).into()
}

/// Runs `cpc` and says whether it succeeded, with what it printed.
fn run(mut command: Command) -> Result<(bool, String)> {
    let output = command.output()?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8(said)?))
}

/// `cpc token` on the server's host.
fn token(lab: &Lab, arguments: &[&str]) -> Result<(bool, String)> {
    let mut cpc = Command::new(&lab.programs().cpc);
    let config = lab.control_plane.servers[0].daemon.config_file();
    cpc.arg("token").args(arguments).arg("--config").arg(config);
    run(cpc)
}

fn create(lab: &Lab, node: &str) -> Result<(bool, String)> {
    let desk = desk().to_string();
    let range = ["--ip", "10.99.0.0/16", "--server", &desk];
    token(lab, &[&["create", "--node", node][..], &range].concat())
}

/// Joins as `cpc token create` said, from the first worker, with the address `ip`.
fn join(lab: &Lab, command: &str, ip: &str, out: &Path) -> Result<(bool, String)> {
    let mut cpc = lab.workers[0].netns.command(&lab.programs().cpc)?;
    let arguments = command.trim().strip_prefix("cpc ").context("no command")?;
    cpc.args(arguments.split(' ')).args(["--ip", ip, "--out"]);
    cpc.arg(out);
    run(cpc)
}

fn echo_works(lab: &Lab) -> Result<()> {
    let echo = format!("{}:{}", address::node(1), Behaviour::Echo.port());
    let proxy = &lab.control_plane.servers[0].sockets.connect_unix;
    round_trips(connect_through(proxy, &echo)?, 1).map(drop)
}

/// Every regular file below `folder`, with what stands in it.
fn files(folder: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else if path.is_file() {
            let content = fs::read(&path)?;
            found.insert(path, content);
        }
    }
    Ok(found)
}

/// Returns the number of records in the audit, all of which must be whole.
fn records(disk: &SmallDisk) -> Result<usize> {
    let mut count = 0;
    for (file, content) in files(&disk.path().join("audit"))? {
        let text = String::from_utf8(content)?;
        ensure!(text.is_empty() || text.ends_with('\n'), "{file:?} is cut");
        for line in text.lines() {
            let record: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            ensure!(record.is_object(), "{line}");
            count += 1;
        }
    }
    Ok(count)
}

#[test]
fn a_server_outlives_a_full_disk() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (mut lab, disk) = lab_with_disk()?;
    lab.start_configured()?;
    let (created, command) = create(&lab, "w7")?;
    ensure!(created, "{command}");
    echo_works(&lab)?;
    eventually(SOON, || {
        ensure!(records(&disk)? > 0, "nothing was recorded");
        Ok(())
    })?;

    disk.fill(0)?;
    let state = disk.path().join("state");
    let before = files(&state)?;
    let out = lab.folder().join("w1/joined");
    let (joined, said) = join(&lab, &command, "10.99.7.7", &out)?;
    ensure!(!joined && said.contains("its log says why"), "{said}");
    let server = &lab.control_plane.servers[0].daemon;
    let issuing = ["no certificate could be issued", "join.json", REMEDY];
    server.wait_log(SOON, 0, &issuing)?;
    let (created, said) = create(&lab, "w8")?;
    ensure!(!created && said.contains(REMEDY), "{said}");
    ensure!(files(&state)? == before, "something was written");
    // What goes through it needs no disk. As many records as the last page has room for, and more.
    let lost = "audit records are lost";
    eventually(SOON, || {
        echo_works(&lab)?;
        let log = server.log();
        ensure!(log.contains(lost), "{log}");
        Ok(())
    })?;
    for _ in 0..20 {
        echo_works(&lab)?;
    }
    server.wait_log(SOON, 0, &[lost, REMEDY])?;
    // Connections and events are written apart.
    let lines = server.log().matches(lost).count();
    ensure!(lines <= 2, "{lines} lines");

    disk.empty()?;
    let kept = records(&disk)?;
    let (joined, said) = join(&lab, &command, "10.99.7.7", &out)?;
    ensure!(joined, "{said}");
    let (_, issued) = token(&lab, &["issued"])?;
    ensure!(issued.contains("w7"), "{issued}");
    eventually(SOON, || {
        ensure!(records(&disk)? > kept, "nothing more is recorded");
        Ok(())
    })?;
    lab.control_plane.servers[0].daemon.check()
}

/// A server that has no secret yet, on a full disk.
#[test]
fn a_server_that_cannot_start_leaves_nothing_in_its_way() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (mut lab, disk) = lab_with_disk()?;
    disk.fill(0)?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.start()?;
    let ended = server.wait_ended(SOON).err().context("it runs")?;
    ensure!(format!("{ended:#}").contains(REMEDY), "{ended:#}");
    let secret = disk.path().join("state/secret");
    ensure!(!secret.exists(), "half a secret is left");
    disk.empty()?;
    lab.start_configured()?;
    echo_works(&lab)
}

/// A worker whose disk has room for the key that it joins with, and not for what is issued: the token's use
/// is not lost.
#[test]
fn a_worker_whose_disk_is_full_joins_later() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (mut lab, disk) = lab_with_disk()?;
    let out = lab.small_disk("worker", 64 << 10)?;
    let server = &mut lab.control_plane.servers[0].daemon;
    server.start()?;
    server.wait_log(SOON, 0, &["server is up"])?;
    let (created, command) = create(&lab, "w7")?;
    ensure!(created, "{command}");
    // No room for the key; for the key alone; for the CA; for nothing more.
    for pages in [0, 1, 1, 0] {
        out.fill(pages)?;
        let folder = out.path().join("agent");
        let (joined, said) = join(&lab, &command, "10.99.7.7", &folder)?;
        ensure!(!joined && said.contains(REMEDY), "{pages} pages: {said}");
        ensure!(!folder.join("agent.pem").exists(), "{pages} pages");
        for (file, content) in files(&folder)? {
            ensure!(content.ends_with(b"-----\n"), "{file:?} is cut");
        }
    }
    out.empty()?;
    let (joined, said) = join(&lab, &command, "10.99.7.7", &out.path().join("agent"))?;
    ensure!(joined, "{said}");
    let book = fs::read_to_string(disk.path().join("state/join/join.json"))?;
    let book: Value = serde_json::from_str(&book)?;
    let issued = book["issued"]["w7"].as_array().context("nothing issued")?;
    assert_eq!(issued.len(), 1, "{book}");
    Ok(())
}

/// `cpc pki` writes the record of what it issues first, and leaves no key without its certificate.
#[test]
fn nothing_is_issued_where_it_cannot_be_recorded() -> Result<()> {
    if !lab::available()? {
        return Ok(());
    }
    let (lab, disk) = lab_with_disk()?;
    let pki = |arguments: &[&str], folders: [(&str, &Path); 2]| {
        let mut cpc = Command::new(&lab.programs().cpc);
        cpc.arg("pki").args(arguments);
        for (flag, folder) in folders {
            cpc.arg(flag).arg(folder);
        }
        run(cpc)
    };
    let (ca, out) = (disk.path().join("pki"), lab.folder().join("issued"));
    let init = |pages| {
        disk.fill(pages)?;
        let mut cpc = Command::new(&lab.programs().cpc);
        cpc.args(["pki", "init", "--dir"]).arg(&ca);
        run(cpc)
    };
    for pages in 0..2 {
        let (made, said) = init(pages)?;
        ensure!(!made && said.contains(REMEDY), "{pages} pages: {said}");
        assert_eq!(files(&ca)?, BTreeMap::new());
    }
    let (made, said) = init(2)?;
    ensure!(made, "{said}");

    let agent = ["agent", "--node", "w7", "--ip", "10.99.7.7"];
    let (made, said) = pki(&agent, [("--dir", &ca), ("--out", &out)])?;
    ensure!(!made && said.contains(REMEDY), "{said}");
    assert_eq!(files(&out)?, BTreeMap::new());
    disk.empty()?;
    let (made, said) = pki(&agent, [("--dir", &ca), ("--out", &out)])?;
    ensure!(made, "{said}");

    // Key and certificate, and no room for the copy of the CA.
    for pages in 0..3 {
        disk.fill(pages)?;
        let full = disk.path().join("w8");
        let client = ["client", "--name", "c"];
        let (made, said) = pki(&client, [("--dir", &ca), ("--out", &full)])?;
        ensure!(!made && said.contains(REMEDY), "{pages} pages: {said}");
        assert_eq!(files(&full)?, BTreeMap::new());
    }
    Ok(())
}
