//! The checks that read the code and the documentation without running them.

mod links;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::workspace::{self, PROFILE};
use crate::{ebpf, fuzz, sh};

/// The kernel programs are no host programs: they are linted for their own target.
const HOST: [&str; 3] = ["--workspace", "--exclude", "tunnel-ebpf"];

/// Runs all checks, the quick ones first.
pub(crate) fn run() -> Result<()> {
    sh::heading("Formatting");
    sh::run(workspace::cargo().args(["fmt", "--all", "--check"]))?;

    sh::heading("Links of the documentation");
    documentation()?;

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

/// Checks that every relative link and anchor in the tracked Markdown files resolves.
fn documentation() -> Result<()> {
    let mut list = Command::new("git");
    list.current_dir(workspace::root()).args(["ls-files", "-z"]);
    let files: BTreeSet<String> = sh::output(&mut list)?
        .split_terminator('\0')
        .map(str::to_owned)
        .collect();
    let mut pages = BTreeMap::new();
    for file in files.iter().filter(|file| file.ends_with(".md")) {
        let text = fs::read_to_string(workspace::root().join(file))
            .with_context(|| format!("cannot read {file}"))?;
        pages.insert(file.clone(), text);
    }
    let broken = links::broken(&pages, &files);
    for link in &broken {
        eprintln!("    {link}");
    }
    if !broken.is_empty() {
        bail!("{} links of the documentation do not resolve", broken.len());
    }
    eprintln!("    {} pages", pages.len());
    Ok(())
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
