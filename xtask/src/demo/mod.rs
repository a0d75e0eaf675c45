//! `cargo xtask demo`: what the connector does, shown on this machine, for somebody who has never
//! seen it.
//!
//! As root it runs in the laboratory, with the redirect; otherwise the same goes over HTTP CONNECT
//! on loopback. Whatever happens, nothing is left behind.

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

/// The connector's own line in the access log for a connection to `destination`.
fn access_log_line(log: &str, destination: &str) -> Option<String> {
    let is_it = |line: &&str| line.contains("access") && line.contains(destination);
    log.lines().rev().find(is_it).map(str::to_owned)
}
