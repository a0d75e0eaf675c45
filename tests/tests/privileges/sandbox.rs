//! Rights that a unit or a container's manifest takes from a process before its start.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Pid, Uid, setgid, setgroups, setuid};
use seccompiler::{BpfProgram, apply_filter};
use tunnel_tests::lab::Lab;

/// User id without an account.
pub(crate) const ID: u32 = 61_234;

/// Capabilities by number (capabilities(7)).
pub(crate) const ATTACHING: [libc::c_int; 3] = [12, 38, 39]; // NET_ADMIN, PERFMON, BPF

/// A user of its own without capabilities, a file system that can be read alone, a seccomp filter.
pub(crate) struct Sandbox {
    /// Writable folder.
    writable: CString,
    /// A BPF file system of which it is to see this directory alone, and where that is in between.
    pins: Option<[CString; 3]>,
    filters: Vec<BpfProgram>,
}

impl Sandbox {
    /// For a process whose files are in `folder`, which it may read and write.
    pub(crate) fn new(folder: &Path, filters: Vec<BpfProgram>) -> Result<Self> {
        Ok(Self {
            writable: c_path(folder)?,
            pins: None,
            filters,
        })
    }

    /// Shows it the laboratory's pins, in the way of the server's unit: `TemporaryFileSystem=` over
    /// the BPF file system, whose root only root may enter, and `BindPaths=` in it.
    pub(crate) fn with_pins_of(mut self, lab: &Lab) -> Result<Self> {
        let bpffs = lab.folder().join("bpf");
        let between = lab.folder().join("between");
        std::fs::create_dir_all(&between)?;
        self.pins = Some([
            c_path(&bpffs)?,
            c_path(&bpffs.join("cpc"))?,
            c_path(&between)?,
        ]);
        Ok(self)
    }

    /// Lets `command` start in it.
    pub(crate) fn place(self, command: &mut Command) {
        // SAFETY: bare system calls on what the closure owns; paths this short are copied to the
        // stack, and nothing is allocated between fork and exec.
        unsafe { command.pre_exec(move || self.enter()) };
    }

    fn enter(&self) -> io::Result<()> {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        let bind = |from: &CString, to: &CString| {
            mount(Some(&**from), &**to, none, MsFlags::MS_BIND, none)
        };
        if let Some([bpffs, pins, between]) = &self.pins {
            bind(pins, between)?;
            mount(none, &**bpffs, Some("tmpfs"), MsFlags::empty(), none)?;
            nix::unistd::mkdir(&**pins, nix::sys::stat::Mode::S_IRWXU)?;
            bind(between, pins)?;
        }
        bind(&self.writable, &self.writable)?;
        read_only(c"/", true)?;
        read_only(&self.writable, false)?;
        keep_of_bounding_set(&[])?;
        setgroups(&[])?;
        setgid(Gid::from_raw(ID))?;
        setuid(Uid::from_raw(ID))?;
        for filter in &self.filters {
            apply_filter(filter).map_err(|_| io::Error::from(io::ErrorKind::Other))?;
        }
        Ok(())
    }
}

/// Makes all mounts at and below `path` read-only, or that at `path` writable (Linux 5.12).
fn read_only(path: &std::ffi::CStr, yes: bool) -> io::Result<()> {
    // SAFETY: a mount_attr of zeroes changes nothing.
    let mut change: libc::mount_attr = unsafe { std::mem::zeroed() };
    let (field, flags) = match yes {
        true => (&mut change.attr_set, libc::AT_RECURSIVE),
        false => (&mut change.attr_clr, 0),
    };
    *field = libc::MOUNT_ATTR_RDONLY;
    // SAFETY: path and attributes live through the call, and the size is that of the latter.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the capabilities that a program started by root has at most.
pub(crate) fn keep_of_bounding_set(kept: &[libc::c_int]) -> io::Result<()> {
    for capability in 0.. {
        // SAFETY: prctl(2) with numbers.
        let there = unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) };
        if there < 0 {
            // Beyond the kernel's last.
            break;
        }
        if kept.contains(&capability) {
            continue;
        }
        // SAFETY: as above.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if dropped < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Checks the privileges of each thread: no capability in any set, none to be gained, and what
/// `expected` has of its status.
pub(crate) fn check(pid: Option<Pid>, expected: &[(&str, &str)]) -> Result<()> {
    let pid = pid.context("it does not run")?;
    let none = "0000000000000000";
    let mut wanted = vec![("NoNewPrivs", "1")];
    wanted.extend(["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|set| (set, none)));
    wanted.extend(expected);
    let mut threads = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        for (key, value) in &wanted {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let line = line.with_context(|| format!("no {key}"))?;
            let found = line.trim_start_matches(':').split_whitespace().next();
            ensure!(found == Some(value), "not {key} {value}:\n{status}");
        }
        threads += 1;
    }
    // main, the log's
    ensure!(threads >= 2, "{threads} threads");
    Ok(())
}

fn c_path(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}
