//! A hosts file for one program.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Lets `command` start with `file` as its `/etc/hosts`, in a mount namespace of its own.
pub(super) fn place(command: &mut Command, file: PathBuf) {
    let start = move || {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS)?;
        // Nothing of what follows is to spread to the machine.
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some(&file), "/etc/hosts", none, MsFlags::MS_BIND, none)?;
        Ok(())
    };
    // SAFETY: bare system calls; paths this short are copied to the stack, and nothing is
    // allocated between fork and exec.
    unsafe {
        command.pre_exec(move || start().map_err(|error: nix::Error| io::Error::from(error)));
    }
}
