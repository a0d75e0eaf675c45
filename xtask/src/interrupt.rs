//! Ctrl-C, SIGTERM and a closed terminal: noted, so that a task ends where it can clean up.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int) {
    if INTERRUPTED.swap(true, Ordering::Relaxed) {
        // SAFETY: _exit(2) may be called in a handler.
        unsafe { libc::_exit(130) }
    }
}

/// From now on a signal ends nothing by itself, but [`check`] tells. A second one ends the process
/// at once; what it leaves is removed by the next task that builds a laboratory.
pub(crate) fn catch() -> Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(note),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler swaps an atomic and may call _exit(2), both of which it may.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Fails once a signal has come.
pub(crate) fn check() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}
