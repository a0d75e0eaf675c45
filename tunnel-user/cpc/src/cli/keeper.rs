//! `cpc keeper`.

use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::common::{LogArgs, Overlay, begin};
use cpc_config::{AuditConfig, LogConfig};
use cpc_host::host;
use cpc_host::privileges::CapabilitySet;
use cpc_keeper::Service;

/// Keep the connections of a server or agent over its crash
///
/// The keeper holds copies of the sockets of a server or agent that names it (`keeper` in its configuration).
/// When that process is killed, its connections wait for the next one, at most for limits.resume. The keeper
/// reads and writes none of them, and needs no network, capability or configuration. It serves processes of its
/// own user only. Its end closes nothing that another process uses.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Socket at which servers and agents ask, in an existing directory
    #[arg(long, env = "CPC_KEEPER_SOCKET", value_name = "PATH")]
    socket: PathBuf,
    #[command(flatten)]
    log: LogArgs,
}

impl Args {
    pub(super) fn run(self) -> anyhow::Result<()> {
        // Before there is a second thread, which would get the signals instead.
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGTERM);
        signals.add(Signal::SIGINT);
        signals.thread_block()?;
        let mut log = LogConfig::default();
        self.log.apply(&mut Overlay::default(), &mut log);
        let _log = begin(CapabilitySet::empty(), &log, &AuditConfig::default())?;
        host::raise_file_limit();
        let stop = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
        Ok(Service::open(&self.socket)?.run(stop.as_fd())?)
    }
}
