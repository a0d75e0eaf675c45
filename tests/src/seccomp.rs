//! A kernel that refuses a system call, as an older one or one with a filter does.

use std::ffi::{c_int, c_long};
use std::io;

/// A system call that the kernel refuses.
#[derive(Clone, Copy, Debug)]
pub struct Refusal {
    /// Number of the call.
    pub call: c_long,
    /// Number of an argument, and the only value with which the call is refused.
    pub argument: Option<(u32, u32)>,
    /// Error of the call.
    pub errno: c_int,
}

impl Refusal {
    /// Puts the refusal in force for this process and its children. Allocates nothing, so it may run between fork and
    /// exec.
    ///
    /// # Errors
    ///
    /// The error of the system call.
    pub fn install(self) -> io::Result<()> {
        let step = |code: u32, k: u32, no| libc::sock_filter {
            code: code as u16,
            jt: 0,
            jf: no,
            k,
        };
        let load = |at| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, 0);
        let is = |value, otherwise| {
            let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
            step(equal, value, otherwise)
        };
        let answer = |value| step(libc::BPF_RET | libc::BPF_K, value, 0);
        // In struct seccomp_data the number is at 0, and arguments of 8 bytes begin at 16. Without an argument, the
        // number is compared twice.
        let call = self.call as u32;
        let (at, value) = self
            .argument
            .map_or((0, call), |(number, value)| (16 + 8 * number, value));
        let mut filter = [
            load(0),
            is(call, 3),
            load(at),
            is(value, 1),
            answer(libc::SECCOMP_RET_ERRNO | self.errno as u32),
            answer(libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog {
            len: filter.len() as u16,
            filter: filter.as_mut_ptr(),
        };
        // SAFETY: the program lives through the calls.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            )
        };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
