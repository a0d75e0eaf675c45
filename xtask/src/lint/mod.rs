//! What reads the code without running it.

use std::process::Command;

use anyhow::Result;

use crate::workspace::{self, PROFILE};
use crate::{ebpf, fuzz, sh};

/// The kernel programs are no host programs: they are linted for their own target.
const HOST: [&str; 3] = ["--workspace", "--exclude", "tunnel-ebpf"];

/// Runs all of it, the quick ones first.
pub(crate) fn run() -> Result<()> {
    sh::heading("Formatting");
    sh::run(workspace::cargo().args(["fmt", "--all", "--check"]))?;

    sh::heading("Licences, sources and advisories of the dependencies");
    dependencies()?;

    sh::heading("Clippy");
    let mut clippy = workspace::cargo();
    clippy
        .args(["clippy", "--profile", PROFILE, "--all-targets"])
        .args(HOST);
    sh::run(clippy.args(["--", "-D", "warnings"]))?;
    kernel_programs()?;
    fuzz::lint()?;

    sh::heading("Documentation");
    let mut doc = workspace::cargo();
    doc.args([
        "doc",
        "--no-deps",
        "--document-private-items",
        "--profile",
        PROFILE,
    ]);
    sh::run(doc.args(HOST).env("RUSTDOCFLAGS", "-D warnings"))
}

fn kernel_programs() -> Result<()> {
    let (toolchain, linker) = ebpf::tools()?;
    match toolchain.clippy(&linker) {
        Some(mut clippy) => sh::run(clippy.args(["--", "-D", "warnings"])),
        None => {
            eprintln!(
                "    kernel programs: not linted, {} has no clippy",
                toolchain.describe()
            );
            Ok(())
        }
    }
}

/// The advisory database is the one check that needs the network; where it can't be had, that is
/// said, and what does not need it is checked all the same.
fn dependencies() -> Result<()> {
    sh::run(deny().args([
        "check",
        "--hide-inclusion-graph",
        "bans",
        "licenses",
        "sources",
    ]))?;
    if sh::succeeds(deny().args(["fetch", "db"])) {
        sh::run(deny().args(["check", "--disable-fetch", "advisories"]))
    } else {
        eprintln!("    advisories: NOT checked, the RustSec database can't be fetched from here");
        Ok(())
    }
}

fn deny() -> Command {
    let mut cargo = workspace::cargo();
    cargo.arg("deny");
    cargo
}
