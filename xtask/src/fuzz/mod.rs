//! Fuzzes the decoders, with the stable compiler.
//!
//! The targets in `tests/fuzz` have the layout of cargo-fuzz, which needs a nightly compiler.
//! libFuzzer itself needs only the coverage that LLVM adds, which the stable compiler can add too.
//! The sanitizers, which need nightly, would find little: the decoders have no unsafe code. Fuzzing
//! looks for panics, overflows, hangs and broken invariants.

mod record;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bench::machine::Machine;
use crate::{sh, workspace};

/// Seconds for each target in `cargo xtask test`: enough to try the last change.
const SHORT: u32 = 3;

/// Instrumentation by LLVM: a counter at each edge, the location of each counter, and both operands
/// of each comparison.
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
    /// Targets [default: all]
    targets: Vec<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Minimum number of executions of each target, in any time
    #[arg(long, conflicts_with = "seconds")]
    runs: Option<u64>,
    /// Write the result to docs/fuzzing.md
    #[arg(long)]
    record: bool,
}

/// End condition of a run.
#[derive(Clone, Copy)]
enum Until {
    Seconds(u32),
    Runs(u64),
}

/// Result of a target without a finding.
struct Outcome {
    target: String,
    executions: u64,
    elapsed: Duration,
    /// Reached edges of the control flow.
    edges: u64,
    /// Inputs in the corpus, each of which reaches a new edge.
    corpus: u64,
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
    let chosen = if args.targets.is_empty() {
        &known
    } else {
        &args.targets
    };
    let until = args.runs.map_or(Until::Seconds(args.seconds), Until::Runs);
    let machine = Machine::look(true);
    fuzz(chosen, until, |outcome| match args.record {
        true => record::write(outcome, &machine, &known),
        false => Ok(()),
    })
}

/// Fuzzes every target for some seconds.
pub(crate) fn briefly() -> Result<()> {
    fuzz(&targets()?, Until::Seconds(SHORT), |_| Ok(()))
}

/// Checks format and clippy of the targets.
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

/// Returns the manifest of the targets, a workspace of its own: its instrumentation must not reach
/// the other crates.
fn manifest() -> PathBuf {
    workspace::root().join("tests/fuzz/Cargo.toml")
}

/// Fuzzes one after the other; each outcome is handed on as soon as it is there.
fn fuzz(targets: &[String], until: Until, then: impl Fn(&Outcome) -> Result<()>) -> Result<()> {
    sh::heading("Fuzzing");
    let programs = build()?;
    let width = targets.iter().map(String::len).max().unwrap_or_default();
    for target in targets {
        let outcome = fuzz_one(&programs.join(target), target, until)?;
        eprintln!(
            "    {target:<width$}  {:.0} s, {} inputs, {} edges covered",
            outcome.elapsed.as_secs_f64(),
            outcome.executions,
            outcome.edges,
        );
        then(&outcome)?;
    }
    Ok(())
}

fn build() -> Result<PathBuf> {
    let host = host()?;
    let mut cargo = cargo("build", &host);
    sh::run(cargo.env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f")))?;
    Ok(folder().join(host).join("release"))
}

/// Returns `cargo SUBCOMMAND` for the targets. With the host named as the target, flags reach the
/// targets alone, and not the build scripts, which are not linked with libFuzzer.
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

fn fuzz_one(program: &Path, target: &str, until: Until) -> Result<Outcome> {
    let corpus = folder().join("corpus").join(target);
    let findings = folder().join("artifacts").join(target);
    for folder in [&corpus, &findings] {
        fs::create_dir_all(folder)?;
    }
    let start = Instant::now();
    let output = Command::new(program)
        .arg(match until {
            Until::Seconds(seconds) => format!("-max_total_time={seconds}"),
            Until::Runs(runs) => format!("-runs={runs}"),
        })
        .args([
            "-timeout=5",
            "-rss_limit_mb=512",
            &format!("-max_len={}", longest(target)),
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
    let number = |text: Option<&str>| text.and_then(|text| text.parse().ok()).unwrap_or_default();
    let corpus = last_after(&text, " corp: ").and_then(|text| text.split('/').next());
    Ok(Outcome {
        target: target.to_owned(),
        executions: number(statistic(&text, "stat::number_of_executed_units:")),
        elapsed: start.elapsed(),
        edges: number(last_after(&text, " cov: ")),
        corpus: number(corpus),
    })
}

/// Returns the maximum length of an input, in bytes: longer ones take longer and reach nothing new.
fn longest(target: &str) -> usize {
    match target {
        // A head may have 8 KiB.
        "http_connect" => 16 << 10,
        _ => 4 << 10,
    }
}

/// Returns the names of the targets, from their files.
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
