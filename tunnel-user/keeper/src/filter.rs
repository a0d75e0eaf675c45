//! The filter of system calls of a keeper that listens (seccomp(2)).
//!
//! Invariant: no permitted call opens a file, connects a socket, starts a program or a thread, signals another process,
//! maps a descriptor, or makes memory executable. So a client that finds a fault in the keeper gains what the keeper
//! holds already, and nothing else of its user.
//!
//! Any other call fails with EPERM. To end the process instead would close all kept sockets, and libraries attempt
//! calls that they can do without, others in each version: free(3) opens a file below `/proc`, a panic opens the
//! program. An error gives an attacker no more than an end does. A call of another architecture ends the process,
//! because seccompiler has no other answer.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, Error as SeccompError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};

use cpc_host::report::report;

/// The system call of poll(3).
#[cfg(target_arch = "x86_64")]
const POLL: c_long = libc::SYS_poll;
#[cfg(not(target_arch = "x86_64"))]
const POLL: c_long = libc::SYS_ppoll;

/// Calls that are permitted with any argument.
const FREE: &[c_long] = &[
    // Clients, and the sockets that they send.
    POLL,
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    // The user and the process of a client. The pidfd of a number is needed where the socket has none: before Linux
    // 6.5, and for a process that has ended. The keeper can only wait for it: no permitted call signals or inspects it.
    libc::SYS_geteuid,
    libc::SYS_getsockopt,
    libc::SYS_pidfd_open,
    // The allocator, beside mmap and mprotect.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Locks, and the queue of the log. A clock is a call where the vDSO can't read it.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    // The first hash map of a thread panics without it.
    libc::SYS_getrandom,
    // A wait that SIGSTOP, a freezer or a debugger has interrupted.
    libc::SYS_restart_syscall,
    // The start of a thread that was created before and did not run yet, as that of the log may be, beside prctl.
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    // The end of a thread and of the process.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_sigaltstack,
    // abort(3) and the handler of stack overflows, beside tgkill.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
];

/// A condition: the number of an argument, the bits that count, and their value.
type Condition = (u8, u64, u64);

/// Bits of an argument of the type int.
const INT: u64 = 0xffff_ffff;

const EXECUTABLE: u64 = libc::PROT_EXEC as u64;
const ANONYMOUS: u64 = libc::MAP_ANONYMOUS as u64;
const STDERR: u64 = libc::STDERR_FILENO as u64;

/// Calls that are permitted where all conditions of a row hold.
const BOUND: &[(c_long, &[Condition])] = &[
    (
        libc::SYS_mmap,
        &[(2, EXECUTABLE, 0), (3, ANONYMOUS, ANONYMOUS)],
    ),
    (libc::SYS_mprotect, &[(2, EXECUTABLE, 0)]),
    // The log and a panic. The C library's last words.
    (libc::SYS_write, &[(0, INT, STDERR)]),
    (libc::SYS_writev, &[(0, INT, STDERR)]),
    // The name of a thread that starts.
    (libc::SYS_prctl, &[(0, INT, libc::PR_SET_NAME as u64)]),
    // A client that does not block, and the duplicate of its socket for a refusal. Builds with assertions check
    // descriptors before they close them.
    (libc::SYS_fcntl, &[(1, INT, libc::F_GETFL as u64)]),
    (libc::SYS_fcntl, &[(1, INT, libc::F_SETFL as u64)]),
    (libc::SYS_fcntl, &[(1, INT, libc::F_DUPFD_CLOEXEC as u64)]),
    (libc::SYS_fcntl, &[(1, INT, libc::F_GETFD as u64)]),
];

/// Reason why the process is not restricted.
#[derive(Debug, thiserror::Error)]
enum FilterError {
    #[error("this kernel has no seccomp filters: use one with CONFIG_SECCOMP_FILTER")]
    Missing(#[source] io::Error),
    #[error("the system refuses: a seccomp filter around the keeper must allow seccomp")]
    Refused(#[source] io::Error),
    #[error("thread {0} has a filter of its own")]
    Thread(c_long),
    #[error("no filter for this processor")]
    Invalid(#[from] BackendError),
}

/// Restricts all threads of this process, for good, to the calls of a keeper that listens, and sets no_new_privs.
/// Logs a warning where the system can't: the filter protects against faults, and a keeper without it is better than
/// none.
pub(crate) fn confine() {
    if let Err(error) = install() {
        tracing::warn!(
            error = report(&error),
            "the keeper is not restricted to the system calls that it needs"
        );
    }
}

fn install() -> Result<(), FilterError> {
    // Sets no_new_privs first, without which only root may install a filter.
    apply_filter_all_threads(&compile()?).map_err(|error| match error {
        SeccompError::Seccomp(why) => match why.raw_os_error() {
            Some(libc::EINVAL | libc::ENOSYS) => FilterError::Missing(why),
            _ => FilterError::Refused(why),
        },
        SeccompError::ThreadSync(thread) => FilterError::Thread(thread),
        SeccompError::Prctl(why) => FilterError::Refused(why),
        SeccompError::Backend(error) => error.into(),
        error => FilterError::Refused(io::Error::other(error.to_string())),
    })
}

fn compile() -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<_, _> = FREE.iter().map(|call| (*call, Vec::new())).collect();
    let own = u64::from(std::process::id());
    let signals: (c_long, &[Condition]) = (libc::SYS_tgkill, &[(0, INT, own)]);
    for (call, conditions) in BOUND.iter().chain([&signals]) {
        rules.entry(*call).or_default().push(rule(conditions)?);
    }
    SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        TargetArch::try_from(std::env::consts::ARCH)?,
    )?
    .try_into()
}

fn rule(conditions: &[Condition]) -> Result<SeccompRule, BackendError> {
    let conditions = conditions.iter().map(|&(argument, bits, value)| {
        let is_equal = SeccompCmpOp::MaskedEq(bits);
        SeccompCondition::new(argument, SeccompCmpArgLen::Qword, is_equal, value)
    });
    SeccompRule::new(conditions.collect::<Result<_, _>>()?)
}
