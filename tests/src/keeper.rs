//! A running `cpc keeper`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use serde_json::json;

use crate::client::eventually;
use crate::lab::daemon::Daemon;
use crate::lab::process::{Process, end_with_parent};
use crate::lab::{Lab, LabSpec, Programs};
use crate::side::Side;

/// Time for a keeper to listen.
const SOON: Duration = Duration::from_secs(10);

/// Brings up a laboratory with one server and so many agents, each with a place for handovers. The server and the
/// first agent have a keeper.
///
/// # Errors
///
/// As [`Lab::up`] and [`Keeper::start`].
pub fn lab(programs: Programs, workers: u8) -> Result<(Lab, [Keeper; 2])> {
    let cpc = programs.cpc.clone();
    let spec = LabSpec {
        workers,
        servers: 1,
        ..LabSpec::new(programs)
    };
    Lab::up_with(spec, |lab| {
        lab.keep_state()?;
        let mut keeper = |side: Side| Keeper::start(&cpc, side.daemon(lab)?);
        Ok([keeper(Side::Server)?, keeper(Side::Agent)?])
    })
}

/// A keeper of one daemon. Ends when the value is dropped.
#[derive(Debug)]
pub struct Keeper {
    process: Process,
    socket: PathBuf,
}

impl Keeper {
    /// Starts a keeper beside the configuration of `daemon`, which uses it from its next start on.
    ///
    /// # Errors
    ///
    /// It can't be started, or does not listen.
    pub fn start(cpc: &Path, daemon: &mut Daemon) -> Result<Self> {
        Self::start_with(cpc, daemon, |_| ())
    }

    /// Does the same, after `prepare` has changed its privileges.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn start_with(
        cpc: &Path,
        daemon: &mut Daemon,
        prepare: impl FnOnce(&mut Command),
    ) -> Result<Self> {
        let folder = daemon.config_file();
        let folder = folder.parent().context("a file has a folder")?;
        let socket = folder.join("keeper.sock");
        let mut command = Command::new(cpc);
        command.arg("keeper").arg("--socket").arg(&socket);
        end_with_parent(&mut command);
        prepare(&mut command);
        let process = Process::start("keeper", &mut command, &folder.join("keeper.log"))?;
        daemon.configure(|config| config["keeper"] = json!(socket))?;
        eventually(SOON, || {
            ensure!(socket.exists(), "no {}", socket.display());
            Ok(())
        })?;
        Ok(Self { process, socket })
    }

    /// Returns the path of its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns its process id.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Ends it with SIGKILL.
    ///
    /// # Errors
    ///
    /// It was not running.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // It may have been killed before.
        let _ = self.process.kill();
    }
}
