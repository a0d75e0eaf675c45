//! Loading the shortcut's programs.

use std::os::fd::{AsFd, OwnedFd};

use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError, SkMsg, SockOps},
};

use super::super::{Hook, RedirectError, link, maps, object, pin::Pin, program::refused};

/// The program that decides over each write.
const VERDICT: &str = "shortcut_verdict";

/// Loads the programs for an attachment, and puts the one for writes in force: it is the same for
/// all attachments, and sees the clients of those that want it. Returns the one for the cgroup.
pub(in super::super) fn load(pin: &Pin, attachment: u32) -> Result<OwnedFd, RedirectError> {
    let unsupported = |error| RedirectError::Shortcut(Box::new(error));
    let object = object::shortcut().ok_or(RedirectError::NotBuiltIn)?;
    let mut loader = EbpfLoader::new();
    loader
        .btf(None)
        .override_global("ATTACHMENT", &attachment, true);
    for name in maps::SHORTCUT_NAMES {
        loader.map_pin_path(name, pin.map(name));
    }
    let mut ebpf = loader
        .load(object)
        .map_err(|error| unsupported(RedirectError::Prepare(Box::new(error))))?;
    let verdict = program(&mut ebpf, VERDICT).map_err(unsupported)?;
    let writers = maps::shortcut_writers(pin)?;
    // In one step in the place of another version's; sockets that are in the map keep theirs.
    link::attach_to_sockets(verdict.as_fd(), writers.fd().as_fd()).map_err(|source| {
        unsupported(RedirectError::Attach {
            name: VERDICT,
            source,
        })
    })?;
    program(&mut ebpf, Hook::Shortcut.name()).map_err(unsupported)
}

fn program(ebpf: &mut Ebpf, name: &'static str) -> Result<OwnedFd, RedirectError> {
    let program = ebpf
        .program_mut(name)
        .ok_or(RedirectError::Mismatch(name))?;
    let mut load = || -> Result<OwnedFd, ProgramError> {
        match program {
            Program::SkMsg(_) => {
                let program: &mut SkMsg = program.try_into()?;
                program.load()?;
            }
            _ => {
                let program: &mut SockOps = program.try_into()?;
                program.load()?;
            }
        }
        Ok(program.fd()?.as_fd().try_clone_to_owned()?)
    };
    load().map_err(|error| refused(name, &error))
}
