//! Loading the programs for one attachment.

use std::os::fd::{AsFd, OwnedFd};

use aya::{
    Ebpf, EbpfLoader,
    programs::{CgroupSockAddr, Program, ProgramError, SockOps},
};
use serde::Serialize;

use super::{Hook, RedirectError, maps, object::object, pin::Pin};

/// Form of a refusal for the caller of connect(2); depends on the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Refusal {
    /// An errno with the reason (`bpf_set_retval` in connect hooks, Linux 6.1).
    Errno,
    /// A reset by the accepting side, or EPERM without an accepting side.
    Reset,
}

/// The loaded programs, not attached to anything by themselves.
#[derive(Debug)]
pub(super) struct Programs {
    fds: Vec<(Hook, OwnedFd)>,
    refusal: Refusal,
}

impl Programs {
    /// Loads the built-in programs for an attachment. They use the given kind of refusal, or the best
    /// one that the kernel has.
    pub(super) fn load(
        pin: &Pin,
        attachment: u32,
        refusal: Option<Refusal>,
    ) -> Result<Self, RedirectError> {
        match refusal {
            Some(refusal) => Self::load_as(pin, attachment, refusal),
            // Whether the helper may be called shows only when a program that does is loaded.
            None => Self::load_as(pin, attachment, Refusal::Errno)
                .or_else(|_| Self::load_as(pin, attachment, Refusal::Reset)),
        }
    }

    fn load_as(pin: &Pin, attachment: u32, refusal: Refusal) -> Result<Self, RedirectError> {
        let object = object().ok_or(RedirectError::NotBuiltIn)?;
        let choose_errno = u8::from(refusal == Refusal::Errno);
        let mut loader = EbpfLoader::new();
        loader
            .btf(None)
            .override_global("ATTACHMENT", &attachment, true)
            .override_global("CHOOSE_ERRNO", &choose_errno, true);
        for name in maps::NAMES {
            loader.map_pin_path(name, pin.map(name));
        }
        let mut ebpf = loader
            .load(object)
            .map_err(|error| RedirectError::Prepare(Box::new(error)))?;
        let fds = Hook::ALL
            .into_iter()
            .map(|hook| Ok((hook, load(&mut ebpf, hook)?)))
            .collect::<Result<_, RedirectError>>()?;
        Ok(Self { fds, refusal })
    }

    /// Iterates over the programs in the order of attaching.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Hook, &OwnedFd)> {
        self.fds.iter().map(|(hook, fd)| (*hook, fd))
    }

    /// Returns the kind of refusal.
    pub(super) fn refusal(&self) -> Refusal {
        self.refusal
    }
}

/// Loads one program, and keeps it beyond aya's handle.
fn load(ebpf: &mut Ebpf, hook: Hook) -> Result<OwnedFd, RedirectError> {
    let name = hook.name();
    let program = ebpf
        .program_mut(name)
        .ok_or(RedirectError::Mismatch(name))?;
    load_program(program).map_err(|error| refused(name, &error))
}

/// Returns an error about a program that was not loaded. The verifier's log can be 50 KB long; its end
/// has the reason.
fn refused(name: &'static str, error: &ProgramError) -> RedirectError {
    let why = match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            let log = verifier_log.to_string();
            tracing::debug!(program = name, log, "the verifier's log");
            match last_words(&log) {
                Some(words) => format!("{io_error}; the verifier: {words}"),
                None => io_error.to_string(),
            }
        }
        error => error.to_string(),
    };
    RedirectError::Load { name, why }
}

/// Returns the last line of a verifier's log that is about the program.
fn last_words(log: &str) -> Option<&str> {
    let mut lines = log.lines().map(str::trim).filter(|line| !line.is_empty());
    let is_summary =
        |line: &&str| line.starts_with("processed ") || line.starts_with("verification time");
    let last = lines.rfind(|line| !is_summary(line))?;
    let end = last
        .char_indices()
        .nth(200)
        .map_or(last.len(), |(end, _)| end);
    Some(&last[..end])
}

fn load_program(program: &mut Program) -> Result<OwnedFd, ProgramError> {
    match program {
        Program::CgroupSockAddr(_) => {
            let program: &mut CgroupSockAddr = program.try_into()?;
            program.load()?;
        }
        _ => {
            let program: &mut SockOps = program.try_into()?;
            program.load()?;
        }
    }
    Ok(program.fd()?.as_fd().try_clone_to_owned()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_verifiers_log_its_last_words_are_shown() {
        let log = "0: R1=ctx() R10=fp0\n; if a < b\n17: (2d) if r1 > r2 goto pc+3\n\
            R1 pointer comparison prohibited\nprocessed 18 insns (limit 1000000)\n\n";
        assert_eq!(last_words(log), Some("R1 pointer comparison prohibited"));
        assert_eq!(last_words("\n"), None);
        assert_eq!(last_words(&"x".repeat(50_000)).map(str::len), Some(200));
    }
}
