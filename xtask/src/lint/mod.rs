//! The checks that read the code and the documentation without running them.

mod language;
mod links;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace::{self, PROFILE};
use crate::{ebpf, fuzz, sh};

/// The kernel programs are no host programs: they are linted for their own target.
const HOST: [&str; 3] = ["--workspace", "--exclude", "tunnel-ebpf"];

/// Runs all checks, the quick ones first.
pub(crate) fn run() -> Result<()> {
    sh::heading("Formatting");
    sh::run(workspace::cargo().args(["fmt", "--all", "--check"]))?;

    sh::heading("Links and language of the documentation");
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

/// Checks that every relative link and anchor in the tracked Markdown files resolves, and the words
/// of these files and of doc comments.
fn documentation() -> Result<()> {
    let mut list = Command::new("git");
    list.current_dir(workspace::root()).args(["ls-files", "-z"]);
    let files: BTreeSet<String> = sh::output(&mut list)?
        .split_terminator('\0')
        .map(str::to_owned)
        .collect();
    let pages = texts(&files, ".md")?;
    let broken = links::broken(&pages, &files);
    for link in &broken {
        eprintln!("    {link}");
    }
    let mut faults = language::in_pages(&pages);
    faults.extend(language::in_comments(&texts(&files, ".rs")?));
    for fault in &faults {
        eprintln!("    {fault}");
    }
    ensure!(
        broken.is_empty(),
        "{} links of the documentation do not resolve",
        broken.len()
    );
    ensure!(
        faults.is_empty(),
        "{} words of the documentation break the rules of CONTRIBUTING.md, \"Language\"",
        faults.len()
    );
    eprintln!("    {} pages", pages.len());
    Ok(())
}

/// Reads the files with this suffix.
fn texts(files: &BTreeSet<String>, suffix: &str) -> Result<BTreeMap<String, String>> {
    let matching = files.iter().filter(|file| file.ends_with(suffix));
    let read = matching.map(|file| {
        let text = fs::read_to_string(workspace::root().join(file))
            .with_context(|| format!("cannot read {file}"))?;
        Ok((file.clone(), text))
    });
    read.collect()
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

/// Checks the dependencies. Only the advisory database needs the network: without it the check says
/// so, and runs the rest.
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
