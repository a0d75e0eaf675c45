//! The units of `deploy/systemd`, without a systemd that runs them: what each says, and that
//! systemd takes every line. `cargo xtask vm` runs them.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::profile::deploy;

/// Units of an installed system that the unit files refer to.
const TARGETS: [&str; 6] = [
    "basic",
    "multi-user",
    "network-online",
    "shutdown",
    "sockets",
    "sysinit",
];

/// A unit file or drop-in.
struct Unit {
    name: String,
    /// Section, key, value.
    lines: Vec<(String, String, String)>,
}

impl Unit {
    fn read(file: &Path) -> Result<Self> {
        let mut section = String::new();
        let mut lines = Vec::new();
        for line in fs::read_to_string(file)?.lines() {
            if let Some(name) = line.strip_prefix('[') {
                section = name.trim_end_matches(']').to_owned();
            } else if let Some((key, value)) = line.split_once('=')
                && !line.starts_with('#')
            {
                lines.push((section.clone(), key.to_owned(), value.to_owned()));
            }
        }
        let name = file.file_name().context("no name")?;
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            lines,
        })
    }

    /// The words of all lines of `section` and `key`.
    fn words(&self, section: &str, key: &str) -> Vec<&str> {
        let here = self
            .lines
            .iter()
            .filter(|it| it.0 == section && it.1 == key);
        here.flat_map(|it| it.2.split_whitespace()).collect()
    }
}

/// The files with this extension, drop-ins as well.
fn files(extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![deploy().join("systemd")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|it| it == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn services() -> Result<Vec<Unit>> {
    let files = files("service")?;
    ensure!(!files.is_empty(), "no service");
    files.iter().map(|file| Unit::read(file)).collect()
}

/// The system call filters are made for `cpc`: another program in the sandbox lacks calls, as kill(1)
/// does.
#[test]
fn the_sandbox_holds_cpc_alone() -> Result<()> {
    for unit in services()? {
        for (_, key, value) in unit.lines.iter().filter(|it| it.1.starts_with("Exec")) {
            ensure!(
                value.starts_with("/usr/local/bin/cpc ")
                    || value.trim_start_matches('-').starts_with('+'),
                "{}: {key}={value}",
                unit.name
            );
        }
    }
    Ok(())
}

/// systemd gives a directory to the user of the unit that starts, and takes it from another unit's.
#[test]
fn a_directory_belongs_to_one_unit() -> Result<()> {
    let mut owners = BTreeMap::new();
    for unit in services()? {
        for key in [
            "StateDirectory",
            "CacheDirectory",
            "LogsDirectory",
            "RuntimeDirectory",
        ] {
            for directory in unit.words("Service", key) {
                let before = owners.insert((key, directory.to_owned()), unit.name.clone());
                ensure!(
                    before.is_none(),
                    "{key}={directory}: {before:?}, {}",
                    unit.name
                );
            }
        }
    }
    ensure!(owners.len() >= 4, "{owners:?}");
    Ok(())
}

/// Missing parts at boot (a certificate, a cgroup) may come later: no start is the last one.
#[test]
fn a_failed_start_is_tried_without_end() -> Result<()> {
    for unit in services()? {
        let restart = unit.words("Service", "Restart");
        ensure!(
            restart == ["always"] || restart == ["on-failure"],
            "{}: Restart={restart:?}",
            unit.name
        );
        let limit = unit.words("Unit", "StartLimitIntervalSec");
        assert_eq!(limit, ["0"], "{}", unit.name);
    }
    Ok(())
}

/// The redirect is attached before anything connects, and after the host has its addresses.
#[test]
fn the_redirect_comes_before_the_api_server() -> Result<()> {
    let folder = deploy().join("systemd");
    let redirect = Unit::read(&folder.join("cpc-redirect.service"))?;
    for unit in [
        "kube-apiserver.service",
        "kubelet.service",
        "cpc-server.service",
    ] {
        ensure!(redirect.words("Unit", "Before").contains(&unit), "{unit}");
    }
    for key in ["Wants", "After"] {
        assert_eq!(
            redirect.words("Unit", key),
            ["network-online.target"],
            "{key}"
        );
    }
    // Active when it has attached, not when it was started.
    assert_eq!(redirect.words("Service", "Type"), ["notify"]);
    for (file, key, before) in [
        ("cpc-order.conf", "Wants", "cpc-redirect.service"),
        (
            "cpc-guard.conf",
            "Requires",
            "cpc-redirect-attached.service",
        ),
    ] {
        let unit = Unit::read(&folder.join("kube-apiserver.service.d").join(file))?;
        for key in [key, "After"] {
            assert_eq!(unit.words("Unit", key), [before], "{file} {key}");
        }
    }
    Ok(())
}

/// systemd restarts what requires a unit along with it, after a crash too. So the API server requires one
/// that stays active, which requires nothing.
#[test]
fn no_restart_of_the_redirect_reaches_the_api_server() -> Result<()> {
    let guard = Unit::read(&deploy().join("systemd/cpc-redirect-attached.service"))?;
    for key in ["Requires", "BindsTo", "PartOf", "Requisite"] {
        assert_eq!(guard.words("Unit", key), Vec::<&str>::new(), "{key}");
    }
    assert_eq!(guard.words("Unit", "After"), ["cpc-redirect.service"]);
    assert_eq!(guard.words("Service", "Type"), ["oneshot"]);
    assert_eq!(guard.words("Service", "RemainAfterExit"), ["yes"]);
    for unit in services()? {
        for key in ["Requires", "BindsTo", "PartOf", "Requisite"] {
            let needed = unit.words("Unit", key);
            ensure!(
                !needed.contains(&"cpc-redirect.service"),
                "{}: {key}",
                unit.name
            );
        }
    }
    Ok(())
}

/// In the pod one container attaches before the server starts, and one like it stays beside the server.
#[test]
fn the_pod_attaches_and_stays() -> Result<()> {
    let manifest = fs::read_to_string(deploy().join("kubernetes/server/cpc-server.yaml"))?;
    let pod: Value = serde_saphyr::from_str(&manifest)?;
    let attach = &pod["spec"]["initContainers"][0];
    let [stay, server] = ["redirect", "server"].map(|name| {
        let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
        let mut named = containers.filter(|it| it["name"] == name);
        named.next().with_context(|| format!("no container {name}"))
    });
    let (stay, server) = (stay?, server?);
    let config = "/etc/cpc/server.yaml";
    assert_eq!(
        attach["args"],
        json!(["redirect", "attach", "--config", config])
    );
    assert_eq!(
        stay["args"],
        json!(["redirect", "attach", "--stay", "--config", config])
    );
    for key in ["securityContext", "volumeMounts", "image"] {
        assert_eq!(attach[key], stay[key], "{key}");
    }
    let none = json!({"drop": ["ALL"]});
    assert_eq!(server["securityContext"]["capabilities"], none);
    Ok(())
}

/// `systemd-analyze verify` has nothing to say, of the units and of each drop-in.
#[test]
fn systemd_takes_every_line() -> Result<()> {
    if Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_err()
    {
        eprintln!("skipped: there is no systemd-analyze here");
        return Ok(());
    }
    let root = tempfile::tempdir()?;
    let system = root.path().join("usr/lib/systemd/system");
    fs::create_dir_all(&system)?;
    for target in TARGETS {
        fs::write(system.join(format!("{target}.target")), "[Unit]\n")?;
    }
    // Programs that the units name have to be there.
    for program in ["usr/local/bin/cpc", "bin/kill", "usr/bin/systemctl"] {
        let file = root.path().join(program);
        fs::create_dir_all(file.parent().context("no folder")?)?;
        fs::write(&file, "#!/bin/sh\n")?;
        fs::set_permissions(&file, Permissions::from_mode(0o755))?;
    }
    fs::write(
        system.join("kube-apiserver.service"),
        "[Service]\nExecStart=/usr/local/bin/cpc\n",
    )?;
    let mut units = vec!["kube-apiserver.service".to_owned()];
    let source = deploy().join("systemd");
    for file in ["service", "socket", "conf"]
        .map(files)
        .into_iter()
        .collect::<Result<Vec<_>>>()?
        .concat()
    {
        let relative = file.strip_prefix(&source)?;
        let drop_in = relative.parent().is_some_and(|it| it != Path::new(""));
        if drop_in {
            fs::create_dir_all(system.join(relative).parent().context("no folder")?)?;
        } else if file.extension().is_some_and(|it| it == "conf") {
            continue; // sysctl's and sysusers'
        } else {
            units.push(relative.display().to_string());
        }
        fs::copy(&file, system.join(relative))?;
    }
    let output = Command::new("systemd-analyze")
        .arg(format!("--root={}", root.path().display()))
        .args(["--man=no", "verify"])
        .args(&units)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && said.is_empty(),
        "{units:?}: {said}"
    );
    Ok(())
}
