//! Keepers with the filter of system calls. Each is a process of its own, this test binary started again: a filter
//! stays until the process ends.

use std::collections::BTreeMap;
use std::fs;
use std::hash::RandomState;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{ExitStatusExt, parent_id};
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio, exit};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use libc::{c_long, c_ulong};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, alarm, geteuid};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter_all_threads};
use tempfile::TempDir;
use tunnel_proto::keeper::Drop as DropSlot;
use tunnel_proto::keeper::request::Kind;

use super::running::{LONG, Owner, take_all};
use super::survival::{check, write_between};
use crate::connect::{answer, connect, request};
use crate::filter::confine;
use crate::{Keeper, KeeperError, Left, Service};

/// Threads before a restriction: enough for some not to have run yet.
const THREADS: usize = 16;

/// A process that has restricted itself, or tries to.
struct Confined {
    child: Child,
    path: PathBuf,
    _place: TempDir,
    log: BufReader<ChildStderr>,
    read: String,
}

impl Confined {
    fn start(how: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("keeper.sock");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::confined::process", "--nocapture"])
            .env("CPC_KEEPER_CONFINED", how)
            .env("CPC_KEEPER_SOCKET", &path)
            // A panic then looks for debug information.
            .env("RUST_BACKTRACE", "full")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self {
            child,
            path,
            _place: place,
            log,
            read: String::new(),
        }
    }

    /// Starts a keeper, and waits until it listens.
    fn serving(how: &str) -> Self {
        let mut it = Self::start(how);
        while !it.read.contains("the keeper listens") {
            assert_ne!(it.log.read_line(&mut it.read).unwrap(), 0, "{}", it.read);
        }
        it
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    /// Returns the values of a line in the status of each thread (proc_pid_status(5)).
    fn status(&self, key: &str) -> Vec<String> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let values = threads.map(|thread| {
            let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
            let mut lines = status.lines().filter_map(|line| line.split_once(":\t"));
            lines.find(|(name, _)| *name == key).unwrap().1.to_owned()
        });
        values.collect()
    }

    /// Tells a keeper to stop, and waits for its end. Returns its log.
    fn end(mut self) -> (ExitStatus, String) {
        drop(self.child.stdin.take());
        self.log.read_to_string(&mut self.read).unwrap();
        (self.child.wait().unwrap(), std::mem::take(&mut self.read))
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process, where [`Confined::start`] has started this binary. Does nothing otherwise.
#[test]
fn process() {
    let Ok(how) = std::env::var("CPC_KEEPER_CONFINED") else {
        return;
    };
    // One that hangs fails its test.
    alarm::set(60);
    // The test harness would write to standard output.
    exit(catch_unwind(|| act(&how)).map_or(1, |()| 0));
}

fn act(how: &str) {
    match how {
        "attempts" => attempts(),
        "aborts" => {
            confine();
            std::process::abort();
        }
        _ => {
            let (writer, guard) = tracing_appender::non_blocking(io::stderr());
            tracing_subscriber::fmt()
                .with_ansi(false)
                .with_writer(writer)
                .init();
            if how == "without filters" {
                take_filters_away();
            }
            let path = std::env::var_os("CPC_KEEPER_SOCKET").unwrap();
            let service = Service::open(Path::new(&path)).unwrap();
            service.run(io::stdin().as_fd()).unwrap();
            drop(guard);
        }
    }
}

/// Has seccomp(2) fail as on a kernel that lacks it.
fn take_filters_away() {
    let filter = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_seccomp, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        TargetArch::try_from(std::env::consts::ARCH).unwrap(),
    );
    let program = BpfProgram::try_from(filter.unwrap()).unwrap();
    apply_filter_all_threads(&program).unwrap();
}

/// Makes forbidden calls before and after the restriction, and permitted ones after it.
fn attempts() {
    // A confined process can't ask.
    let parent = parent_id();
    for (call, errno) in forbidden_calls(parent) {
        assert_ne!(errno, libc::EPERM, "{call} tells nothing");
    }
    let is_confined = Arc::new(Barrier::new(THREADS + 1));
    let earlier: Vec<_> = (0..THREADS)
        .map(|_| {
            let is_confined = Arc::clone(&is_confined);
            let name = "earlier".to_owned();
            let task = move || {
                is_confined.wait();
                work();
                forbidden_calls(parent)
            };
            thread::Builder::new().name(name).spawn(task).unwrap()
        })
        .collect();
    confine();
    is_confined.wait();
    work();
    let earlier = earlier.into_iter().map(|it| it.join().unwrap());
    for (call, errno) in earlier.flatten().chain(forbidden_calls(parent)) {
        assert_eq!(errno, libc::EPERM, "{call}");
    }
    assert!(thread::Builder::new().spawn(|| ()).is_err());
    assert!(Command::new("true").spawn().is_err());
    assert!(catch_unwind(|| panic!("a panic that ends nothing")).is_err());
}

/// Makes calls that the keeper and its libraries need, some of them seldom.
fn work() {
    let mut blocks: Vec<_> = (0..1000).map(|n| vec![1_u8; 1000 + n % 5000]).collect();
    blocks.truncate(10);
    let mut large = Vec::new();
    for number in 0..1_u64 << 20 {
        large.push(number);
    }
    drop((blocks, large));
    let _ = RandomState::new();
    // Where a socket has no pidfd, and for a process that is not root.
    pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    assert_ne!(geteuid().as_raw(), u32::MAX);
    thread::sleep(Duration::from_millis(1));
    io::stderr().write_all(b"written\n").unwrap();
}

/// Makes calls that a keeper must not make, none of which does harm. Returns their names and errors.
fn forbidden_calls(parent: u32) -> Vec<(&'static str, i32)> {
    // Numbers of descriptors, addresses and sizes that can't be.
    const NONE: c_ulong = c_ulong::MAX;
    let parent = c_ulong::from(parent);
    let own = c_ulong::from(std::process::id());
    let path = c"/dev/null".as_ptr() as c_ulong;
    let here = libc::AT_FDCWD as c_ulong;
    let shared = libc::MAP_SHARED as c_ulong;
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as c_ulong;
    let readable = libc::PROT_READ as c_ulong;
    let executable = libc::PROT_EXEC as c_ulong;
    let calls: [(&str, c_long, [c_ulong; 6]); 22] = [
        ("socket", libc::SYS_socket, [1, 1, 0, 0, 0, 0]),
        ("socket", libc::SYS_socket, [2, 1, 0, 0, 0, 0]),
        ("connect", libc::SYS_connect, [NONE, 0, 0, 0, 0, 0]),
        ("bind", libc::SYS_bind, [NONE, 0, 0, 0, 0, 0]),
        ("openat", libc::SYS_openat, [here, path, 0, 0, 0, 0]),
        ("openat", libc::SYS_openat, [here, path, 1, 0, 0, 0]),
        ("unlinkat", libc::SYS_unlinkat, [NONE, 0, 0, 0, 0, 0]),
        ("execve", libc::SYS_execve, [0, 0, 0, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0, 0, 0, 0, 0, 0]),
        ("kill", libc::SYS_kill, [own, 0, 0, 0, 0, 0]),
        ("tgkill", libc::SYS_tgkill, [parent, parent, 0, 0, 0, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [NONE, 0, 0, 0, 0, 0]),
        (
            "pidfd_send_signal",
            libc::SYS_pidfd_send_signal,
            [NONE, 0, 0, 0, 0, 0],
        ),
        ("seccomp", libc::SYS_seccomp, [NONE, 0, 0, 0, 0, 0]),
        ("setns", libc::SYS_setns, [NONE, 0, 0, 0, 0, 0]),
        ("read", libc::SYS_read, [NONE, 0, 0, 0, 0, 0]),
        ("write", libc::SYS_write, [1, path, 0, 0, 0, 0]),
        ("pwrite64", libc::SYS_pwrite64, [NONE, 0, 0, 0, 0, 0]),
        (
            "mmap of a descriptor",
            libc::SYS_mmap,
            [0, 4096, readable, shared, NONE, 0],
        ),
        (
            "mmap of a program",
            libc::SYS_mmap,
            [0, 4096, executable, anonymous, NONE, 0],
        ),
        (
            "mprotect of a program",
            libc::SYS_mprotect,
            [0, 0, executable, 0, 0, 0],
        ),
        (
            "fcntl of an owner",
            libc::SYS_fcntl,
            [0, libc::F_GETOWN as c_ulong, 0, 0, 0, 0],
        ),
    ];
    let made = calls.map(|(name, number, [a, b, c, d, e, f])| {
        // SAFETY: no call writes to memory of this process: their addresses are none, or that of a constant to read.
        let done = unsafe { libc::syscall(number, a, b, c, d, e, f) };
        let error = io::Error::last_os_error().raw_os_error();
        (name, if done < 0 { error.unwrap() } else { 0 })
    });
    made.into()
}

/// Takes a socket of a dead process, and some of what a keeper does less often.
fn use_everything(keeper: &Path) {
    assert!(take_all(keeper, "server").unwrap().is_empty());
    let mut owner = Owner::start(keeper, 100, LONG * 10, "");
    owner.kill();
    write_between(&mut owner);
    let left = take_all(keeper, "server").unwrap();
    let [left] = <[Left; 1]>::try_from(left).unwrap();
    check(&mut owner, left);
    // Two megabytes, which the keeper frees together.
    let (near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(LONG)).unwrap();
    let large = Keeper::open(keeper, "agent", b"large", LONG).unwrap();
    let slots: Vec<_> = (0..500)
        .map(|_| large.keep(vec![1; 4096], 0, far.as_fd()).unwrap())
        .collect();
    large.flush();
    drop(far);
    assert!(large.discard());
    assert_eq!((&near).read(&mut [0]).unwrap(), 0);
    drop(slots);
    let hostile = connect(keeper).unwrap();
    request(&hostile, Kind::Drop(DropSlot { slot: 0 }), None).unwrap();
    let refused = answer(&hostile);
    assert!(
        matches!(refused, Err(KeeperError::Refused(_))),
        "{refused:?}"
    );
}

#[test]
fn a_confined_keeper_serves() {
    let keeper = Confined::serving("serves");
    use_everything(&keeper.path);
    for (key, value) in [("Seccomp", "2"), ("NoNewPrivs", "1")] {
        let values = keeper.status(key);
        // The keeper and its log.
        assert!(values.len() >= 2, "{values:?}");
        assert!(values.iter().all(|it| it == value), "{key}: {values:?}");
    }
    let (status, log) = keeper.end();
    assert!(status.success(), "{log}");
    for line in [
        "a process has died",
        "the next process has taken the sockets",
        "a client is refused",
        "the keeper ends",
    ] {
        assert!(log.contains(line), "no {line}: {log}");
    }
    assert!(!log.contains("not restricted"), "{log}");
}

#[test]
fn no_thread_makes_other_calls() {
    let (status, said) = Confined::start("attempts").end();
    assert!(status.success(), "{said}");
    assert_eq!(said.matches("written\n").count(), THREADS + 1, "{said}");
    assert!(said.contains("a panic that ends nothing"), "{said}");
}

/// The kernel goes on with an interrupted poll(2) by a call of its own.
#[test]
fn a_confined_keeper_outlives_a_stop() {
    let keeper = Confined::serving("serves");
    // A connection without a request, for which the keeper waits with a timeout.
    let client = connect(&keeper.path).unwrap();
    let owner = Keeper::open(&keeper.path, "server", b"", LONG).unwrap();
    let end = Instant::now() + LONG;
    while !keeper.status("State").iter().all(|it| it.starts_with('S')) {
        assert!(Instant::now() < end, "the keeper is never idle");
        thread::sleep(Duration::from_millis(1));
    }
    kill(keeper.pid(), Signal::SIGSTOP).unwrap();
    let stopped = waitpid(keeper.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
    assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
    kill(keeper.pid(), Signal::SIGCONT).unwrap();
    assert!(owner.discard());
    drop(client);
    let (status, log) = keeper.end();
    assert!(status.success(), "{log}");
}

#[test]
fn a_confined_process_aborts() {
    let (status, said) = Confined::start("aborts").end();
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{said}");
}

#[test]
fn a_keeper_serves_without_filters() {
    let keeper = Confined::serving("without filters");
    use_everything(&keeper.path);
    let (status, log) = keeper.end();
    assert!(status.success(), "{log}");
    let warnings = log.matches("CONFIG_SECCOMP_FILTER").count();
    assert_eq!(warnings, 1, "{log}");
    assert!(log.contains("not restricted"), "{log}");
}
