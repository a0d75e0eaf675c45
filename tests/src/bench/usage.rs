//! Resources used by the programs of a path, as the kernel counts them for each process.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// Returns the processor time of `processes` since their start, user and system, of all their
/// threads.
///
/// # Errors
///
/// One has ended.
pub fn processor_time(processes: &[Pid]) -> Result<Duration> {
    let mut sum = Duration::ZERO;
    for pid in processes {
        let clock = clock_getcpuclockid(*pid).with_context(|| format!("process {pid}"))?;
        sum += Duration::from(clock_gettime(clock)?);
    }
    Ok(sum)
}

/// Returns the memory of `processes` that is private and not of a file: resident and anonymous, in
/// bytes (`RssAnon`, proc_pid_status(5)).
///
/// # Errors
///
/// One has ended.
pub fn memory(processes: &[Pid]) -> Result<u64> {
    let mut sum = 0;
    for pid in processes {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        sum += kib(&status, "RssAnon").with_context(|| format!("no RssAnon of process {pid}"))?;
    }
    Ok(sum << 10)
}

/// Returns the kernel's own memory on this machine, such as sockets, in bytes (`Slab`,
/// proc_meminfo(5)).
///
/// # Errors
///
/// The kernel does not tell.
pub fn kernel_memory() -> Result<u64> {
    let info = fs::read_to_string("/proc/meminfo")?;
    Ok(kib(&info, "Slab").context("no Slab in /proc/meminfo")? << 10)
}

fn kib(text: &str, key: &str) -> Option<u64> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    let fields: BTreeMap<_, _> = lines.collect();
    fields.get(key)?.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_uses_time_and_memory() -> Result<()> {
        let this = [Pid::this()];
        let before = processor_time(&this)?;
        let numbers: Vec<u64> = (0..1_000_000).collect();
        assert!(numbers.iter().sum::<u64>() > 0);
        assert!(processor_time(&this)? > before);
        assert!(memory(&this)? > 1_000_000);
        assert!(kernel_memory()? > 0);
        Ok(())
    }
}
