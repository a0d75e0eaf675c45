//! Calls on any descriptor: close(2), fcntl(2), ioctl(2).

use std::ffi::c_int;

use super::{answer_int, is_ours, kernel, real};

/// close(2)
#[unsafe(no_mangle)]
pub extern "C" fn close(fd: c_int) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_close, fd) as c_int;
    }
    answer_int(kernel(|kernel| kernel.close(fd)))
}

/// fcntl(2). Every command that is used has at most one argument of the size of a register.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl(fd: c_int, command: c_int, argument: usize) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_fcntl, fd, command, argument) as c_int;
    }
    match command {
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => answer_int(kernel(|kernel| kernel.dup(fd))),
        libc::F_GETFL => libc::O_RDWR | libc::O_NONBLOCK,
        libc::F_GETFD => libc::FD_CLOEXEC,
        libc::F_SETFL | libc::F_SETFD => 0,
        _ => unknown(format!("fcntl {command}")),
    }
}

/// ioctl(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: libc::c_ulong, argument: usize) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_ioctl, fd, request, argument) as c_int;
    }
    match request {
        libc::FIONBIO => 0,
        libc::TIOCOUTQ => {
            let unsent = kernel(|kernel| kernel.unsent(fd));
            // SAFETY: the caller gives the address of an int.
            unsafe { *(argument as *mut c_int) = unsent as c_int };
            0
        }
        _ => unknown(format!("ioctl {request}")),
    }
}

/// Notes a call that the kernel does not know, which a test finds.
pub(super) fn unknown(call: String) -> c_int {
    kernel(|kernel| kernel.unknown.push(call));
    answer_int::<usize>(Err(libc::ENOSYS))
}
