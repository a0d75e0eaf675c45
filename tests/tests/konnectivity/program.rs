//! `cpc proxy-server` and `cpc proxy-agent`, and the peer's programs of these names: the same
//! command line, the same places, so that one test runs each beside the other.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;
use tunnel_tests::client::eventually;
use tunnel_tests::lab::daemon::get;
use tunnel_tests::lab::netns::Netns;
use tunnel_tests::lab::process::Process;
use tunnel_tests::lab::{Lab, Programs};

/// Names the folder of the peer's programs.
const FOLDER: &str = "CPC_KONNECTIVITY_BIN";

/// Maker of the programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Maker {
    Ours(PathBuf),
    Peer(PathBuf),
}

impl Maker {
    pub(crate) fn ours() -> Result<Self> {
        Ok(Self::Ours(Programs::of_this_test()?.cpc))
    }

    /// The peer's where there are any, and ours.
    pub(crate) fn all() -> Result<Vec<Self>> {
        Ok(Self::peer().into_iter().chain([Self::ours()?]).collect())
    }

    /// The peer's, if the environment says where they are.
    pub(crate) fn peer() -> Option<Self> {
        match std::env::var_os(FOLDER) {
            Some(folder) => Some(Self::Peer(folder.into())),
            None => {
                println!("skipped: {FOLDER} does not name the folder of Konnectivity's programs");
                None
            }
        }
    }

    fn command(&self, netns: &Netns, program: &str) -> Result<Command> {
        match self {
            Self::Ours(cpc) => {
                let mut command = netns.command(cpc)?;
                command.arg(program);
                Ok(command)
            }
            Self::Peer(folder) => netns.command(folder.join(program)),
        }
    }
}

/// A running program. The laboratory ends it if the test does not.
#[derive(Debug)]
pub(crate) struct Program {
    name: String,
    process: Process,
    netns: Netns,
    health: SocketAddr,
    log: PathBuf,
}

impl Program {
    /// Starts `program` of `maker` in `netns`. `health` is where its pages will be.
    pub(crate) fn start(
        lab: &Lab,
        netns: &Netns,
        maker: &Maker,
        (program, name): (&str, &str),
        health: SocketAddr,
        flags: &[String],
    ) -> Result<Self> {
        let mut command = maker.command(netns, program)?;
        command.args(flags);
        lab.cgroup("konnectivity")?.place(&mut command)?;
        let log = lab.folder().join(format!("{name}.log"));
        let process = Process::start(name, &mut command, &log)?;
        let (name, netns) = (name.to_owned(), netns.clone());
        Ok(Self {
            name,
            process,
            netns,
            health,
            log,
        })
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Ends it with SIGKILL.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<()> {
        self.process.wait(limit).map(drop)
    }

    /// Returns its log.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks one of its pages; gives the status and the body.
    pub(crate) fn get(&self, path: &str) -> Result<(u16, String)> {
        self.netns.enter(|| get(self.health, path))
    }

    /// Returns `/status` of its admin port, which only ours have.
    pub(crate) fn status(&self, admin: u16) -> Result<Value> {
        let admin = SocketAddr::new(self.health.ip(), admin);
        let (_, body) = self.netns.enter(|| get(admin, "/status"))?;
        Ok(serde_json::from_str(&body)?)
    }

    /// Waits until it knows a server or an agent.
    pub(crate) fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.wait_page("/readyz", limit)
    }

    /// Waits until it runs.
    pub(crate) fn wait_healthy(&mut self, limit: Duration) -> Result<()> {
        self.wait_page("/healthz", limit)
    }

    fn wait_page(&mut self, path: &str, limit: Duration) -> Result<()> {
        let answered = eventually(limit, || {
            // Who has ended will never answer.
            if let Err(error) = self.process.check() {
                return Ok(Err(error));
            }
            match self.get(path)? {
                (200, _) => Ok(Ok(())),
                other => bail!("{path}: {other:?}"),
            }
        });
        answered
            .flatten()
            .with_context(|| format!("{}: {}", self.name, self.process.log_tail()))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // One that has ended already is no error.
        let _ = self.process.kill();
    }
}
