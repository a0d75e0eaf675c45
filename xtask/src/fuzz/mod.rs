//! Fuzzing the decoders, with the stable compiler.
//!
//! The targets in `tests/fuzz` are laid out for cargo-fuzz, which needs a nightly compiler. What
//! libFuzzer really needs is the coverage that LLVM adds, and the stable compiler can be told to
//! add it. The sanitizers, which it can't be told to, would find little: the decoders have no
//! unsafe code. What is looked for is panics, overflows, hangs and broken invariants.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{sh, workspace};

/// Seconds for each target in `cargo xtask test`: enough to try what the last change touched.
const SHORT: u32 = 5;

/// What LLVM adds: a counter at each edge, where each counter is, and both sides of each
/// comparison.
const COVERAGE: [&str; 6] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Options of `cargo xtask fuzz`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which targets; all of them if none is named.
    targets: Vec<String>,
    /// How long to fuzz each.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Builds and runs the targets.
pub(crate) fn run(args: &Args) -> Result<()> {
    let known = targets()?;
    if let Some(unknown) = args.targets.iter().find(|name| !known.contains(name)) {
        bail!(
            "there is no fuzz target {unknown}; there are {}",
            known.join(", ")
        );
    }
    fuzz(
        if args.targets.is_empty() {
            &known
        } else {
            &args.targets
        },
        args.seconds,
    )
}

/// Every target for a few seconds.
pub(crate) fn briefly() -> Result<()> {
    fuzz(&targets()?, SHORT)
}

/// Formatting and clippy for the targets.
pub(crate) fn lint() -> Result<()> {
    let mut format = workspace::cargo();
    sh::run(
        format
            .args(["fmt", "--check", "--manifest-path"])
            .arg(manifest()),
    )?;
    let mut clippy = cargo("clippy", &host()?);
    sh::run(clippy.args(["--all-targets", "--", "-D", "warnings"]))
}

/// The package of the targets, which is a workspace of its own: its instrumentation must not reach
/// the other crates.
fn manifest() -> PathBuf {
    workspace::root().join("tests/fuzz/Cargo.toml")
}

fn fuzz(targets: &[String], seconds: u32) -> Result<()> {
    sh::heading("Fuzzing");
    let programs = build()?;
    for target in targets {
        fuzz_one(&programs.join(target), target, seconds)?;
    }
    Ok(())
}

fn build() -> Result<PathBuf> {
    let host = host()?;
    let mut cargo = cargo("build", &host);
    sh::run(cargo.env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f")))?;
    Ok(folder().join(host).join("release"))
}

/// `cargo SUBCOMMAND` for the targets. With the host named as the target, flags reach the targets
/// alone, and not the build scripts, which are not linked with libFuzzer.
fn cargo(subcommand: &str, host: &str) -> Command {
    let mut cargo = workspace::cargo();
    cargo.args([
        subcommand,
        "--locked",
        "--release",
        "--target",
        host,
        "--manifest-path",
    ]);
    cargo.arg(manifest()).arg("--target-dir").arg(folder());
    cargo
}

fn folder() -> PathBuf {
    workspace::target().join("fuzz")
}

fn fuzz_one(program: &Path, target: &str, seconds: u32) -> Result<()> {
    let corpus = folder().join("corpus").join(target);
    let findings = folder().join("artifacts").join(target);
    for folder in [&corpus, &findings] {
        fs::create_dir_all(folder)?;
    }
    let output = Command::new(program)
        .arg(format!("-max_total_time={seconds}"))
        .args([
            "-timeout=5",
            "-rss_limit_mb=512",
            "-max_len=16384",
            "-print_final_stats=1",
        ])
        .arg(format!("-artifact_prefix={}/", findings.display()))
        // What is found goes to the first; the second is committed and only read.
        .arg(&corpus)
        .arg(workspace::root().join("tests/fuzz/corpus").join(target))
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let tail: Vec<_> = text.lines().rev().take(30).collect();
        let tail: Vec<_> = tail.into_iter().rev().collect();
        bail!(
            "{target}: {}\n{}\nRun it again with `{} FILE` and the file named above.",
            output.status,
            tail.join("\n"),
            program.display()
        );
    }
    if !text.contains("inline 8-bit counters") {
        bail!("{target} was built without coverage, which makes fuzzing guessing");
    }
    let runs = statistic(&text, "stat::number_of_executed_units:").unwrap_or("0");
    let covered = last_after(&text, " cov: ").unwrap_or("0");
    eprintln!("    {target:<16} {seconds} s, {runs} inputs, {covered} edges covered");
    Ok(())
}

/// The targets' names, from their files.
fn targets() -> Result<Vec<String>> {
    let folder = workspace::root().join("tests/fuzz/fuzz_targets");
    let entries =
        fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut names: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

fn host() -> Result<String> {
    let version = sh::output(
        Command::new("rustc")
            .arg("-vV")
            .current_dir(workspace::root()),
    )?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("`rustc -vV` names no host")?.to_owned())
}

fn statistic<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

fn last_after<'a>(text: &'a str, mark: &str) -> Option<&'a str> {
    text.rsplit_once(mark)?.1.split_whitespace().next()
}
