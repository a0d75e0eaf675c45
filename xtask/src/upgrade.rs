//! Tests the upgrade from another release, and the way back.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::workspace::{self, AS_ROOT, PROFILE};
use crate::{ebpf, setup, sh, test};

/// Options of `cargo xtask upgrade`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Other release: a commit, a tag or a branch
    #[arg(long, value_name = "REVISION", default_value = "HEAD~1")]
    from: String,
}

/// Name of the variable for the tests: `cpc` of the other release.
const OTHER: &str = "CPC_OTHER_RELEASE";

/// Builds the other release in a worktree of its own, and has processes of both take over from each other.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the laboratory needs root: `{AS_ROOT} upgrade`"
    );
    setup::ensure(setup::Purpose::Test)?;
    ebpf::build()?;
    let other = other(&args.from)?;
    test::build()?;
    sh::heading("Takeovers between both releases");
    let mut nextest = workspace::cargo();
    nextest.args(["nextest", "run", "--cargo-profile", PROFILE]);
    nextest.args(["--run-ignored", "only", "--no-capture"]);
    nextest.args(["--package", "tunnel-tests", "--test", "upgrade"]);
    sh::run(nextest.env(OTHER, other))
}

fn git() -> Command {
    let mut git = Command::new("git");
    git.current_dir(workspace::root());
    git
}

/// Builds `revision`, and returns its program. The worktree stays, so that the next build is short.
fn other(revision: &str) -> Result<PathBuf> {
    sh::heading(&format!("The other release, {revision}"));
    let commit = sh::output(git().args(["rev-parse", "--verify", revision]))?;
    let tree = workspace::target().join("other-release");
    if tree.join(".git").exists() {
        let mut checkout = git();
        checkout.arg("-C").arg(&tree);
        sh::run(checkout.args(["checkout", "--quiet", "--detach", &commit]))?;
    } else {
        let mut add = git();
        add.args(["worktree", "add", "--force", "--detach"]);
        sh::run(add.arg(&tree).arg(&commit))?;
    }
    for task in [
        &["xtask", "build-ebpf"][..],
        &["build", "--profile", PROFILE, "--package", "cpc"],
    ] {
        let mut cargo = workspace::cargo();
        cargo.current_dir(&tree).env_remove("CARGO_TARGET_DIR");
        sh::run(cargo.args(task))?;
    }
    Ok(tree.join("target").join(PROFILE).join("cpc"))
}
