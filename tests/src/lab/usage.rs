//! Resources of a process, as the kernel counts them.

use std::fs;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

/// Returns the resident memory of `process`, in bytes (`VmRSS`, proc_pid_status(5)).
///
/// # Errors
///
/// It has ended.
pub fn memory(process: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Ok(kib.context("no VmRSS in its status")? << 10)
}

/// Returns the number of open file descriptors of `process`.
///
/// # Errors
///
/// It has ended.
pub fn open_files(process: Pid) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{process}/fd"))?.count())
}

/// Raises the limit of open files of this process, and of its children, as far as the machine
/// permits.
///
/// # Errors
///
/// The kernel's.
pub fn allow_many_files() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}
