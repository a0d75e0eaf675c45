//! Paths of the repository, and cargo as the tasks call it.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The one profile that every task builds with, described in the top-level Cargo.toml.
pub(crate) const PROFILE: &str = "lab";

/// Command that runs a task as root with this user's Rust toolchain; the task follows.
pub(crate) const AS_ROOT: &str = r#"sudo env PATH="$PATH" HOME="$HOME" cargo xtask"#;

/// Returns the top of the checkout.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Returns cargo's target directory.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Returns the cargo that runs this task, at the top of the checkout.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Returns the folder of `cargo install`, whether or not it is on the PATH.
pub(crate) fn cargo_bin() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    let home = || Some(var("HOME")?.join(".cargo"));
    var("CARGO_INSTALL_ROOT")
        .or_else(|| var("CARGO_HOME"))
        .or_else(home)
        .map(|it| it.join("bin"))
}
