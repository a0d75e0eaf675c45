//! `cargo xtask miri`: the unit tests of tunnel-proto, interpreted.
//!
//! tunnel-proto forbids unsafe code, so Miri checks its dependencies, above all `bytes`. Miri is a
//! component of rustup's nightly that some machines can't have, and takes most of an hour: so it
//! runs by hand, and not with the tests.

use std::process::Command;

use anyhow::Result;

use crate::{sh, workspace};

/// Cases of each property test: an interpreter takes a thousand times as long.
const CASES: &str = "2";

/// Runs the tests, or prints why it can't.
pub(crate) fn run() -> Result<()> {
    sh::heading("Miri on tunnel-proto");
    if !has_miri() {
        eprintln!(
            "    skipped: rustup's nightly has no Miri here; \
             `rustup +nightly component add miri rust-src` adds it"
        );
        return Ok(());
    }
    let mut miri = nightly();
    miri.args([
        "miri",
        "test",
        "--locked",
        "--package",
        "tunnel-proto",
        "--lib",
    ])
    .arg("--target-dir")
    .arg(workspace::target().join("miri"))
    .env("PROPTEST_CASES", CASES)
    // The tests ask for the time, and proptest looks for earlier failures in files.
    .env("MIRIFLAGS", "-Zmiri-disable-isolation");
    sh::run(&mut miri)
}

/// Whether both components are installed. cargo-miri would fetch a missing one, and a toolchain
/// with rust-src is another one to `build-ebpf`.
fn has_miri() -> bool {
    let mut components = Command::new("rustup");
    components.args(["component", "list", "--toolchain", "nightly", "--installed"]);
    let listed = components.output().map(|output| output.stdout);
    let listed = String::from_utf8(listed.unwrap_or_default()).unwrap_or_default();
    ["miri", "rust-src"]
        .iter()
        .all(|name| listed.lines().any(|line| line.starts_with(name)))
}

/// Returns a command of rustup's nightly, whichever toolchain runs this task.
fn nightly() -> Command {
    let mut cargo = Command::new("rustup");
    cargo
        .args(["run", "nightly", "cargo"])
        .current_dir(workspace::root())
        .env_remove("RUSTUP_TOOLCHAIN");
    cargo
}
