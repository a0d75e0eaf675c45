//! `cargo xtask demo`: a demonstration of the connector on this machine, for newcomers.
//!
//! As root it runs in the laboratory, with the redirect; otherwise over HTTP CONNECT on loopback.
//! It removes everything at its end, also after an error.

mod laboratory;
mod loopback;
mod measure;
mod story;

use anyhow::Result;

/// Runs the demonstration that is possible here.
pub(crate) fn run() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        laboratory::run()
    } else {
        loopback::run()
    }
}

/// Returns the connector's line in the access log for a connection to `destination`.
fn access_log_line(log: &str, destination: &str) -> Option<String> {
    let is_it = |line: &&str| line.contains("access") && line.contains(destination);
    log.lines().rev().find(is_it).map(str::to_owned)
}
