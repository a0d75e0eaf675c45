//! The machine of a run: figures mean nothing without it.

use std::fs;
use std::process::Command;

use serde::Serialize;

use crate::{sh, workspace};

/// Properties of a machine that affect figures.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    /// Release of the kernel.
    pub(super) kernel: String,
    /// Model of the processor.
    pub(super) processor: String,
    /// Processors that there are.
    pub(super) processors: usize,
    /// Memory, in GiB.
    pub(super) memory: u64,
    /// Processes that were ready to run in the minute before (proc_loadavg(5)): other work on the
    /// machine.
    pub(crate) load_before: String,
    /// Measured commit, as git names it.
    pub(crate) commit: String,
    /// Cargo's profile of everything that is built here.
    pub(super) profile: &'static str,
    /// Time of the run, in seconds since 1970.
    pub(super) time: u64,
}

impl Machine {
    /// Returns this machine, before the run.
    pub(crate) fn look(release: bool) -> Self {
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        let value = |text: String, key: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once(':'));
            let found = lines.find(|(name, _)| name.trim() == key);
            found.map(|(_, value)| value.trim().to_owned())
        };
        let memory = value(read("/proc/meminfo"), "MemTotal").unwrap_or_default();
        let memory = memory.trim_end_matches(" kB").parse().unwrap_or(0_u64);
        let load = read("/proc/loadavg");
        let mut git = Command::new("git");
        git.args(["describe", "--always", "--dirty"]);
        let commit = sh::output(git.current_dir(workspace::root()));
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed();
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: value(read("/proc/cpuinfo"), "model name")
                .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            memory: memory.div_ceil(1 << 20),
            load_before: load.split(' ').next().unwrap_or_default().to_owned(),
            commit: commit.unwrap_or_else(|_| "unknown".to_owned()),
            profile: if release {
                "release"
            } else {
                workspace::PROFILE
            },
            time: now.map_or(0, |since| since.as_secs()),
        }
    }

    /// Returns one sentence for people.
    pub(crate) fn sentence(&self) -> String {
        format!(
            "Linux {}, {} ({} processors), {} GiB; load before the run {}; commit {}, profile {}.",
            self.kernel,
            self.processor,
            self.processors,
            self.memory,
            self.load_before,
            self.commit,
            self.profile,
        )
    }
}
