//! Probe of the kernel's io_uring, with the remedy where it can't be used.

use std::io;

use super::ring::Ring;

/// Reason why io_uring can't be used, for people.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error("the kernel lacks io_uring (ENOSYS); it needs Linux 6.12, built with CONFIG_IO_URING")]
    Absent,
    #[error(
        "it is forbidden (EPERM): by a seccomp filter, which must allow io_uring_setup, \
         io_uring_enter and io_uring_register (systemd: SystemCallFilter=@aio), or by \
         `sysctl kernel.io_uring_disabled`, which must be 0, or 1 with our group in \
         kernel.io_uring_group"
    )]
    Forbidden,
    #[error("the kernel lacks a feature ({0}); it needs Linux 6.12")]
    TooOld(io::Error),
    #[error("it got no memory ({0}); raise RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=64M)")]
    NoMemory(io::Error),
    #[error("{0}")]
    Other(io::Error),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSYS) => Self::Absent,
            Some(libc::EPERM | libc::EACCES) => Self::Forbidden,
            Some(libc::EINVAL | libc::EOPNOTSUPP) => Self::TooOld(error),
            Some(libc::ENOMEM) => Self::NoMemory(error),
            _ => Self::Other(error),
        }
    }
}

/// Creates rings for `shards` shards, with all resources: later requests can't be refused any more.
pub(super) fn rings(shards: usize) -> Result<Vec<Ring>, Refused> {
    let rings = (0..shards).map(|_| Ring::new());
    Ok(rings.collect::<io::Result<_>>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_names_its_remedy() {
        for (code, remedy) in [
            (libc::ENOSYS, "CONFIG_IO_URING"),
            (libc::EPERM, "io_uring_disabled"),
            (libc::EINVAL, "6.12"),
            (libc::ENOMEM, "MEMLOCK"),
        ] {
            let refused = Refused::from(io::Error::from_raw_os_error(code));
            assert!(refused.to_string().contains(remedy), "{refused}");
        }
    }
}
