//! Many agents' sessions with one server, held by one small process (`tests/benches/crowd.rs`), to
//! see what agents and routes cost that server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::bench::scene::Place;
use crate::client::eventually;
use crate::lab::config::{ConnectorPki, TRUST_DOMAIN};
use crate::lab::process::Process;

/// Prefix of the names of these agents.
pub(super) const CROWD: &str = "crowd";
/// Identities that have routes, at most: each may serve an eighth of 10.0.0.0/8, and the addresses
/// below 10.128.0.0 are the laboratory's.
const SERVING: u8 = 4;
/// Sessions of one identity; the server takes no more than 32.
const SESSIONS: usize = 30;
/// Routes of one session at most; an offer holds 1,024 and a message 64 KiB.
const ROUTES: usize = 1000;
/// Time for the server to accept all of them.
const READY: Duration = Duration::from_secs(60);

/// Returns the server's grants for them. Each serves parts of a range that it alone is granted.
pub(super) fn grants() -> Vec<Value> {
    let grant = |number: u8| {
        json!({
            "identity": format!("spiffe://{TRUST_DOMAIN}/agent/{CROWD}-{number}"),
            "cidrs": [format!("10.{}.0.0/11", 128 + 32 * number)],
        })
    };
    (0..SERVING).map(grant).collect()
}

/// Addresses at which they connect.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) program: PathBuf,
    pub(super) server: SocketAddr,
    pub(super) pki: ConnectorPki,
    pub(super) folder: PathBuf,
    pub(super) place: Place,
}

/// A crowd that is in. Dropping it ends it.
#[derive(Debug)]
pub struct Crowd {
    /// Time from its start until the server had accepted all of it.
    pub admitted: Duration,
    process: Process,
}

impl Gate {
    pub(super) fn open(&self, sessions: usize, routes: usize) -> Result<Crowd> {
        let most = usize::from(SERVING) * SESSIONS * ROUTES;
        ensure!(routes <= most, "{most} routes at most");
        let sessions = sessions.max(routes.div_ceil(ROUTES));
        for number in 0..sessions.div_ceil(SESSIONS) {
            let name = format!("{CROWD}-{number}");
            let out = self.folder.join(&name);
            let out = out.to_str().context("the folder's name is not UTF-8")?;
            self.pki.run("agent", &["--node", &name, "--out", out])?;
        }
        let log = self.folder.join("crowd.log");
        let mut command = Command::new(&self.program);
        command.arg(self.server.to_string()).arg(&self.folder);
        command.args([sessions, SESSIONS, routes].map(|number| number.to_string()));
        self.place.put(&mut command)?;
        let start = Instant::now();
        let mut crowd = Crowd {
            admitted: Duration::ZERO,
            process: Process::start(CROWD, &mut command, &log)?,
        };
        eventually(READY, || {
            if crowd.process.check().is_err() {
                return Ok(Err(crowd.process.log_tail()));
            }
            let text = crowd.process.log_tail();
            match text.lines().any(|line| line == "ready") {
                true => Ok(Ok(())),
                false => bail!("not all {sessions} agents are in: {text}"),
            }
        })?
        .map_err(anyhow::Error::msg)?;
        crowd.admitted = start.elapsed();
        Ok(crowd)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
    }
}
