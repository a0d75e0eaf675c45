//! The payload on the machine's second disk: the checkout at the path of the host, `cpc`, tests,
//! and the scripts that run them.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::image;
use crate::workspace::{self, PROFILE};
use crate::{programs, sh};

/// Unit that starts the scripts at each boot; their output are the results. It does not wait for
/// multi-user.target, which a guard delays.
const SERVICE: &str = "[Unit]
Description=Checks of the Control Plane Connector
After=basic.target network-online.target

[Service]
Type=exec
ExecStart=/bin/bash /payload/guest/run.sh
StandardOutput=file:/dev/ttyS1
StandardError=inherit
";

/// Builds the payload in `folder`: the test programs of these names, and the units if `units`.
pub(super) fn build(folder: &Path, tests: &[String], units: bool) -> Result<PathBuf> {
    let programs = programs::build()?;
    sh::heading("Payload");
    image::remove(folder)?;
    let checkout = folder.join("checkout");
    copy_checkout(&checkout)?;
    let guest = workspace::root().join("xtask/src/vm/guest");
    sh::run(Command::new("cp").arg("-a").arg(guest).arg(folder))?;
    stripped(&programs.cpc, &folder.join("cpc"))?;
    if !tests.is_empty() {
        copy_tests(folder, &checkout, tests)?;
        for program in [&programs.cpc, &programs.target] {
            stripped(program, &place(folder, &checkout, program))?;
        }
    }
    let flag = |yes: bool| if yes { "yes" } else { "" };
    let settings = format!(
        "CHECKOUT='{}'\nTARGET='{}'\nTESTS={}\nUNITS={}\n",
        workspace::root().display(),
        workspace::target().display(),
        flag(!tests.is_empty()),
        flag(units)
    );
    fs::write(folder.join("settings"), settings)?;
    let system = folder.join("overlay/etc/systemd/system");
    fs::create_dir_all(system.join("multi-user.target.wants"))?;
    fs::write(system.join("cpc-vm.service"), SERVICE)?;
    std::os::unix::fs::symlink(
        "../cpc-vm.service",
        system.join("multi-user.target.wants/cpc-vm.service"),
    )?;
    Ok(folder.to_owned())
}

fn copy_checkout(to: &Path) -> Result<()> {
    let root = workspace::root();
    let mut git = Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard"]);
    for file in sh::output(git.current_dir(root))?.lines() {
        let from = root.join(file);
        // Deleted and not yet committed.
        if from.exists() {
            copy(&from, &to.join(file))?;
        }
    }
    Ok(())
}

/// Copies the test programs, and the files that cargo-nextest needs to run them without cargo.
fn copy_tests(folder: &Path, checkout: &Path, tests: &[String]) -> Result<()> {
    let mut list = workspace::cargo();
    list.args(["nextest", "list", "--cargo-profile", PROFILE]);
    list.args(["--package", "cpc-redirect", "--package", "tunnel-tests"]);
    for test in tests {
        list.args(["--test", test]);
    }
    let binaries =
        sh::output(list.args(["--list-type", "binaries-only", "--message-format", "json"]))?;
    fs::write(folder.join("binaries.json"), &binaries)?;
    let binaries: Value = serde_json::from_str(&binaries)?;
    let each = binaries["rust-binaries"]
        .as_object()
        .context("no test programs")?;
    for binary in each.values() {
        let path = binary["binary-path"]
            .as_str()
            .context("a program without a path")?;
        stripped(Path::new(path), &place(folder, checkout, Path::new(path)))?;
    }
    let mut metadata = workspace::cargo();
    metadata.args([
        "metadata",
        "--format-version",
        "1",
        "--all-features",
        "--no-deps",
    ]);
    fs::write(folder.join("cargo.json"), sh::output(&mut metadata)?)?;
    let nextest = sh::find("cargo-nextest").context("cargo-nextest is not installed")?;
    copy(&nextest, &folder.join("cargo-nextest"))
}

/// Returns the destination of a file of the target folder, which may be in the checkout or beside
/// it.
fn place(folder: &Path, checkout: &Path, file: &Path) -> PathBuf {
    let root = workspace::root();
    match (
        file.strip_prefix(root),
        file.strip_prefix(workspace::target()),
    ) {
        (Ok(inside), _) => checkout.join(inside),
        (_, Ok(inside)) => folder.join("target").join(inside),
        _ => folder.join(file.file_name().unwrap_or(OsStr::new("program"))),
    }
}

/// Copies a program without its debug information, which is most of it.
fn stripped(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("no folder")?)?;
    let mut strip = Command::new("strip");
    sh::run(strip.arg("--strip-debug").arg("-o").arg(to).arg(from))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("no folder")?)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}
