//! The commands of `deploy/README.md`, run with another root folder: uninstalling leaves no file of what
//! installing has made.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::profile::deploy;

/// Programs that would change the machine.
const STUBS: [&str; 6] = [
    "cpc",
    "sysctl",
    "systemctl",
    "systemd-sysusers",
    "systemd-tmpfiles",
    "userdel",
];
/// Folders that a machine has.
const FOLDERS: [&str; 7] = [
    "etc/bash_completion.d",
    "etc/kubernetes/manifests",
    "etc/systemd/system",
    "etc/tmpfiles.d",
    "run/cpc",
    "usr/local/bin",
    "usr/local/share/man/man1",
];
/// Files that units and tmpfiles.d make while everything runs, and files that README.md installs.
const MADE: [&str; 8] = [
    "etc/bash_completion.d/cpc",
    "run/cpc/connect.sock",
    "usr/local/share/man/man1/cpc-server.1",
    "usr/local/share/man/man1/cpc.1",
    "var/lib/cpc-agent/lock",
    "var/lib/cpc/secret",
    "var/log/cpc-agent/audit.2026-01-01.jsonl",
    "var/log/cpc/audit.2026-01-01.jsonl",
];

/// The shell commands below a heading of the document.
fn blocks(heading: &str) -> Result<Vec<String>> {
    let text = fs::read_to_string(deploy().join("README.md"))?;
    let (_, below) = text
        .split_once(&format!("\n{heading}\n"))
        .with_context(|| format!("no {heading}"))?;
    let section = below.split("\n## ").next().unwrap_or_default();
    let blocks = section.split("```sh\n").skip(1);
    let blocks = blocks.filter_map(|block| Some(block.split_once("```")?.0.to_owned()));
    Ok(blocks.collect())
}

/// A root folder, and the folder in which the commands are run.
struct Machine {
    root: PathBuf,
    work: PathBuf,
}

impl Machine {
    fn new(place: &Path) -> Result<Self> {
        let [root, work, stubs] = ["root", "work", "stubs"].map(|it| place.join(it));
        for folder in FOLDERS {
            fs::create_dir_all(root.join(folder))?;
        }
        fs::create_dir_all(&stubs)?;
        for stub in STUBS {
            let file = stubs.join(stub);
            fs::write(&file, "#!/bin/sh\n")?;
            fs::set_permissions(&file, Permissions::from_mode(0o755))?;
        }
        fs::create_dir_all(work.join("target/release"))?;
        symlink(deploy(), work.join("deploy"))?;
        for file in ["target/release/cpc", "server.crt", "server.key", "ca.crt"] {
            fs::write(work.join(file), "")?;
        }
        Ok(Self { root, work })
    }

    /// Runs commands in which each absolute path lies below the root folder, without the groups that this
    /// machine may lack.
    fn run(&self, commands: &str) -> Result<()> {
        let mut commands = commands.replace("-g cpc ", "");
        for top in ["etc", "run", "usr", "var"] {
            let there = format!(" {}/{top}/", self.root.display());
            commands = commands.replace(&format!(" /{top}/"), &there);
        }
        let stubs = self.work.with_file_name("stubs");
        let path = std::env::var("PATH").unwrap_or_default();
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &commands])
            .current_dir(&self.work)
            .env("PATH", format!("{}:{path}", stubs.display()))
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{said}{commands}");
        Ok(())
    }

    fn put(&self, name: &str) -> Result<()> {
        let file = self.root.join(name);
        fs::create_dir_all(file.parent().context("no folder")?)?;
        Ok(fs::write(file, "")?)
    }
}

/// The files below `folder`.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    Ok(found)
}

#[test]
fn uninstalling_leaves_no_file() -> Result<()> {
    if !tunnel_tests::lab::available()? {
        return Ok(());
    }
    let place = tempfile::tempdir()?;
    let machine = Machine::new(place.path())?;
    let by_commands = ["## systemd", "## Kubernetes: server"];
    for heading in by_commands {
        for commands in blocks(heading)? {
            // What is to be tried out there takes capabilities, and makes no file.
            if !commands.contains("setpriv") {
                machine.run(&commands)?;
            }
        }
    }
    let installed = files(&machine.root)?;
    for name in ["cpc-redirect.service", "cpc-guard.conf", "cpc-server.yaml"] {
        let is_there = installed.iter().any(|file| file.ends_with(name));
        ensure!(is_there, "{name} is not installed: {installed:?}");
    }
    // Those that are optional, too.
    let units = deploy().join("systemd");
    for file in files(&units)? {
        let name = file.strip_prefix(&units)?.display().to_string();
        if name.contains(".service") || name.contains(".socket") {
            machine.put(&format!("etc/systemd/system/{name}"))?;
        }
    }
    for name in MADE {
        machine.put(name)?;
    }

    let [control_plane, worker] = &blocks("## Uninstall")?[..] else {
        anyhow::bail!("a block for the control plane and one for workers");
    };
    machine.run(control_plane)?;
    machine.run(worker)?;
    assert_eq!(files(&machine.root)?, Vec::<PathBuf>::new());
    Ok(())
}
