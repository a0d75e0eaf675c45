//! Work inside another network namespace.
//!
//! A namespace belongs to a thread, so that a short-lived one enters it; sockets made there stay there,
//! in the hands of any thread.

use std::{fs::File, io, os::fd::AsRawFd, panic, path::Path, thread};

use nix::sched::{CloneFlags, setns};

/// Runs `work` inside a network namespace, given as a file (`/run/netns/x`, `/proc/N/ns/net`); `None`
/// is the calling thread's own.
///
/// # Errors
/// The file can't be opened, the namespace can't be entered (CAP_SYS_ADMIN), or `work` fails.
pub fn within<T: Send>(
    netns: Option<&Path>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let Some(path) = netns else {
        return work();
    };
    let namespace = File::open(path)?;
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, || {
                setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                work()
            })?;
        worker
            .join()
            .unwrap_or_else(|panicked| panic::resume_unwind(panicked))
    })
}

/// Returns the kernel's number of the calling thread's network namespace; unlike its inode number it is
/// never reused (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn cookie() -> io::Result<u64> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `length` live through the call, and `length` is the size of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(cookie)
    }
}

/// Number of the socket option (asm-generic/socket.h).
const SO_NETNS_COOKIE: libc::c_int = 71;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_namespace_has_one_cookie() {
        let there = within(None, cookie).unwrap();
        assert_ne!(there, 0);
        assert_eq!(there, cookie().unwrap());
    }

    #[test]
    fn a_missing_namespace_is_an_error() {
        let error = within(Some(Path::new("/nonexistent")), cookie).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
