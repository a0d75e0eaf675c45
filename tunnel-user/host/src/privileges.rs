//! Capabilities (capabilities(7)): those of the start are dropped when the start is done, all others
//! before it begins.
//!
//! Capabilities belong to threads, and a thread inherits those of its parent. So [`begin`] comes before
//! the second thread, and [`finish`] before the threads that serve. Work that needs a thread in between
//! runs [`without`] capabilities.

use std::io;
use std::thread;

pub use rustix::thread::CapabilitySet;
use rustix::thread::{
    CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Capabilities that any start may use: ports below 1024, and rings of io_uring that do not count as
/// locked memory.
pub const ANY_START: CapabilitySet = CapabilitySet::NET_BIND_SERVICE.union(CapabilitySet::IPC_LOCK);

/// Failure to drop capabilities.
#[derive(Debug, thiserror::Error)]
#[error("capabilities can't be dropped ({0}); a seccomp filter must allow capset and prctl")]
pub struct PrivilegeError(#[from] io::Error);

/// Drops all capabilities except those in `for_start`, and sets no_new_privs. Called once, by the only
/// thread.
///
/// Files that are read later must be readable from now on. CAP_DAC_OVERRIDE is gone, so that a file of
/// another owner fails at start and not at its first renewal.
///
/// # Errors
/// [`PrivilegeError`] when the system refuses, which only a seccomp filter makes it do.
pub fn begin(for_start: CapabilitySet) -> Result<(), PrivilegeError> {
    set_no_new_privs(true).map_err(io::Error::from)?;
    clear_ambient_capability_set().map_err(io::Error::from)?;
    if have(CapabilitySet::SETPCAP) {
        empty_bounding_set()?;
    }
    keep(for_start)
}

/// Drops all capabilities except those in `kept`, and logs them with `why`.
///
/// # Errors
/// As [`begin`].
pub fn finish(kept: CapabilitySet, why: &str) -> Result<(), PrivilegeError> {
    keep(kept)?;
    let uid = nix::unistd::geteuid().as_raw();
    let kept = held();
    if kept.is_empty() {
        tracing::info!(uid, "serves without capabilities");
    } else {
        tracing::info!(uid, capabilities = names(kept), why, "keeps capabilities");
    }
    Ok(())
}

/// Runs `work` on a thread without capabilities, so that the threads that it starts have none.
///
/// # Errors
/// As [`begin`], or the thread can't be started.
pub fn without<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, PrivilegeError> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().spawn_scoped(scope, || {
            keep(CapabilitySet::empty())?;
            Ok(work())
        })?;
        worker
            .join()
            .unwrap_or_else(|panicked| std::panic::resume_unwind(panicked))
    })
}

/// Whether the calling thread has this capability in its effective set.
pub fn have(capability: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

fn held() -> CapabilitySet {
    capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.permitted)
}

fn keep(kept: CapabilitySet) -> Result<(), PrivilegeError> {
    let kept = held() & kept;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets).map_err(io::Error::from)?)
}

fn empty_bounding_set() -> Result<(), PrivilegeError> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match capability_is_in_bounding_set(capability) {
            Ok(true) => remove_capability_from_bounding_set(capability).map_err(io::Error::from)?,
            Ok(false) => {}
            // Beyond the kernel's last.
            Err(_) => break,
        }
    }
    Ok(())
}

/// Returns the names of capabilities(7).
fn names(set: CapabilitySet) -> String {
    let names = set.iter_names().map(|(name, _)| format!("CAP_{name}"));
    names.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_their_names() {
        let set = CapabilitySet::BPF | CapabilitySet::SYS_ADMIN;
        let mut names: Vec<_> = names(set).split(' ').map(str::to_owned).collect();
        names.sort();
        assert_eq!(names, ["CAP_BPF", "CAP_SYS_ADMIN"]);
        assert_eq!(super::names(CapabilitySet::empty()), "");
    }

    /// Children of a thread lack the capabilities that it dropped; other threads keep them.
    #[test]
    fn threads_of_one_without_have_none_either() {
        let before = held();
        let child = || thread::spawn(held).join().unwrap();
        assert_eq!(without(child).unwrap(), CapabilitySet::empty());
        assert_eq!(held(), before);
    }
}
