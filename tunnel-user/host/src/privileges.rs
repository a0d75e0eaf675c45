//! Capabilities (capabilities(7)): what the start takes goes as soon as it is done, the rest before
//! it begins.
//!
//! They belong to threads, and a thread inherits those of the one that starts it. So [`begin`] comes
//! before there is a second thread, [`finish`] before there are those that serve, and what needs a
//! thread in between starts it [`without`] any.

use std::io;
use std::thread;

pub use rustix::thread::CapabilitySet;
use rustix::thread::{
    CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// Ports below 1024, and rings of io_uring that are not counted as locked memory: what any start
/// may take.
pub const ANY_START: CapabilitySet = CapabilitySet::NET_BIND_SERVICE.union(CapabilitySet::IPC_LOCK);

/// Why capabilities are not dropped.
#[derive(Debug, thiserror::Error)]
#[error("capabilities can't be dropped ({0}); a seccomp filter must allow capset and prctl")]
pub struct PrivilegeError(#[from] io::Error);

/// Keeps of the capabilities that there are those `for_start`, and lets the process gain none ever
/// again (no_new_privs). To be called once, by the only thread.
///
/// What is read later must be readable from now on: CAP_DAC_OVERRIDE has gone, so that a file which
/// is not ours fails at start rather than at its first renewal.
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

/// Keeps of the capabilities that there are those in `kept`, and says so. `why` is for people.
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

/// Runs `work` on a thread without capabilities, so that those which it starts have none.
///
/// # Errors
/// As [`begin`], or when no thread can be had.
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

/// Whether the calling thread has this capability in force.
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

/// As capabilities(7) calls them.
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

    /// What a thread drops its children don't have, and others keep.
    #[test]
    fn threads_of_one_without_have_none_either() {
        let before = held();
        let child = || thread::spawn(held).join().unwrap();
        assert_eq!(without(child).unwrap(), CapabilitySet::empty());
        assert_eq!(held(), before);
    }
}
