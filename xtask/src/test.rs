//! Runs every check, the cheapest first.

use std::env;
use std::num::NonZero;
use std::thread;

use anyhow::Result;

use crate::setup::{self, Purpose};
use crate::workspace::{self, PROFILE};
use crate::{ebpf, fuzz, lint, sh};

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run only the tests whose names contain one of these, and nothing but tests.
    filters: Vec<String>,
}

/// Runs the checks; the test runner comes last, so that its summary ends the output.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::ensure(Purpose::Test)?;
    ebpf::build()?;
    if args.filters.is_empty() {
        lint::run()?;
    }
    build()?;
    if args.filters.is_empty() {
        sh::heading("Documentation tests");
        let mut doc = workspace::cargo();
        sh::run(doc.args(["test", "--doc", "--profile", PROFILE]))?;
        fuzz::briefly()?;
    }
    sh::heading("Tests");
    let mut nextest = workspace::cargo();
    nextest
        .args(["nextest", "run", "--cargo-profile", PROFILE])
        .args(["--test-threads", &threads().to_string()])
        .args(&args.filters);
    if env::var_os("CI").is_some() {
        nextest.args(["--show-progress", "none"]);
    }
    sh::run(&mut nextest)
}

/// Returns the number of tests at once: two more than there are processors, for those that mostly wait.
fn threads() -> usize {
    thread::available_parallelism().map_or(2, NonZero::get) + 2
}

/// Builds `cpc`, the programs of the laboratory and all tests in one call: in separate calls cargo
/// would choose other features for their common dependencies and compile these twice.
pub(crate) fn build() -> Result<()> {
    sh::heading("Programs and tests");
    sh::run(workspace::cargo().args(["build", "--all-targets", "--profile", PROFILE]))
}
