//! Ctrl-C, SIGTERM and a closed terminal: recorded, so that a task ends where it can clean up.

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

/// Makes a signal end nothing by itself; [`check`] reports it. A second signal ends the process at
/// once, and the next task that builds a laboratory removes the remains.
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

/// Fails after a signal.
pub(crate) fn check() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted");
    }
    Ok(())
}
