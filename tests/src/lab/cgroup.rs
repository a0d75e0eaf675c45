//! Control groups (version 2): they decide which sockets are redirected, and end processes
//! reliably.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::unistd::Pid;

use crate::client::eventually;

/// Usual mount points of version 2: alone, or beside version 1.
const USUAL: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// Mount point of the laboratory, where the host has none.
const OWN: &str = "/run/cpc-lab-cgroup2";

/// A group. Dropping the value leaves the group alone.
#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Returns the group at `path`, which may not exist yet.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Returns the root of the hierarchy, mounted if needed.
    ///
    /// # Errors
    ///
    /// It is not mounted and this process may not mount it.
    pub fn root() -> Result<Self> {
        let is_version_2 = |path: &&str| {
            statfs(*path).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC)
        };
        if let Some(path) = USUAL.iter().chain(&[OWN]).find(|path| is_version_2(path)) {
            return Ok(Self::at(*path));
        }
        fs::create_dir_all(OWN)?;
        mount(
            Some("cgroup2"),
            OWN,
            Some("cgroup2"),
            MsFlags::empty(),
            None::<&str>,
        )
        .context("no cgroup v2 hierarchy is mounted, and mounting one failed")?;
        Ok(Self::at(OWN))
    }

    /// Returns the group `name` below this one, created if needed.
    ///
    /// # Errors
    ///
    /// The hierarchy is read-only, or this process may not write to it.
    pub fn child(&self, name: &str) -> Result<Self> {
        let path = self.path.join(name);
        fs::create_dir_all(&path)
            .with_context(|| format!("cannot make the control group {}", path.display()))?;
        Ok(Self { path })
    }

    /// Returns its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets `command` start as a member.
    ///
    /// # Errors
    ///
    /// The group does not exist.
    pub fn place(&self, command: &mut Command) -> Result<()> {
        let file = self.members()?;
        // SAFETY: one write(2) on a descriptor that the closure owns; nothing is allocated between
        // fork and exec.
        unsafe {
            command.pre_exec(move || (&file).write_all(b"0"));
        }
        Ok(())
    }

    /// Makes this process a member while `work` runs, as [`Self::enter`] does.
    ///
    /// # Errors
    ///
    /// The group can't be joined, or `work` fails.
    pub fn join<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let _member = self.enter()?;
        work()
    }

    /// Makes this process a member until the guard is dropped: sockets created meanwhile belong to
    /// the group. Drop guards in the reverse order of their creation.
    ///
    /// It moves the whole process with all its threads. Tests run in a process each (nextest), so
    /// nothing else is moved along.
    ///
    /// # Errors
    ///
    /// The group can't be joined.
    pub fn enter(&self) -> Result<Membership> {
        let before = Self::current()?;
        self.add_this_process()
            .with_context(|| format!("cannot join {self:?}"))?;
        Ok(Membership { before })
    }

    /// Kills every process in it and below it, then removes it.
    ///
    /// # Errors
    ///
    /// A process does not end, which only the kernel can cause.
    pub fn remove(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        // Children first: a group with children can't be removed.
        for entry in fs::read_dir(&self.path)?.filter_map(Result::ok) {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                Self::at(entry.path()).remove()?;
            }
        }
        eventually(Duration::from_secs(5), || {
            for pid in self.processes()? {
                // It may have ended since it was listed.
                let _ = kill(pid, Signal::SIGKILL);
            }
            fs::remove_dir(&self.path)
                .with_context(|| format!("cannot remove the control group {}", self.path.display()))
        })
    }

    fn processes(&self) -> Result<Vec<Pid>> {
        let list = fs::read_to_string(self.path.join("cgroup.procs"))?;
        let own = Pid::this();
        let pids = list
            .lines()
            .filter_map(|line| line.parse().ok())
            .map(Pid::from_raw);
        let pids: Vec<_> = pids.collect();
        if pids.contains(&own) {
            bail!("this process is still a member of {}", self.path.display());
        }
        Ok(pids)
    }

    /// Returns the group of this process.
    fn current() -> Result<Self> {
        let list = fs::read_to_string("/proc/self/cgroup")?;
        let path = list.lines().find_map(|line| line.strip_prefix("0::"));
        let path = path.context("this process is in no cgroup v2 group")?;
        Ok(Self::at(
            Self::root()?.path.join(path.trim_start_matches('/')),
        ))
    }

    fn add_this_process(&self) -> io::Result<()> {
        self.members()?.write_all(b"0")
    }

    fn members(&self) -> io::Result<File> {
        OpenOptions::new()
            .write(true)
            .open(self.path.join("cgroup.procs"))
    }
}

/// A group whose processes may use a limited amount of memory. Dropping it removes it and ends its
/// processes.
#[derive(Debug)]
pub struct MemoryGroup(Cgroup);

impl MemoryGroup {
    /// Creates the group, in the hierarchy that has the memory controller. `None`: there is none.
    ///
    /// # Errors
    ///
    /// The group can't be made, or this is CI (the variable `CI` is set), where there has to be one.
    pub fn new(name: &str, bytes: u64) -> Result<Option<Self>> {
        let version_1 = Path::new("/sys/fs/cgroup/memory");
        let (group, bound) = if version_1.join("cgroup.procs").exists() {
            (Cgroup::at(version_1).child(name)?, "memory.limit_in_bytes")
        } else {
            let root = Cgroup::root()?;
            let controllers = fs::read_to_string(root.path.join("cgroup.controllers"))?;
            if !controllers.split_whitespace().any(|name| name == "memory") {
                if std::env::var_os("CI").is_some() {
                    bail!("no control group bounds memory here, and CI needs one that does");
                }
                eprintln!("skipped: no control group bounds memory here");
                return Ok(None);
            }
            fs::write(root.path.join("cgroup.subtree_control"), "+memory")?;
            (root.child(name)?, "memory.max")
        };
        let group = Self(group);
        fs::write(group.0.path.join(bound), bytes.to_string())
            .with_context(|| format!("{bound} of {}", group.0.path.display()))?;
        Ok(Some(group))
    }
}

impl std::ops::Deref for MemoryGroup {
    type Target = Cgroup;

    fn deref(&self) -> &Cgroup {
        &self.0
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove() {
            eprintln!("{error:#}");
        }
    }
}

/// Membership of this process in a group, until dropped, also by a test that fails: a group with
/// members can't be removed.
#[derive(Debug)]
pub struct Membership {
    before: Cgroup,
}

impl Drop for Membership {
    fn drop(&mut self) {
        if let Err(error) = self.before.add_this_process() {
            eprintln!("cannot return to {:?}: {error}", self.before);
        }
    }
}
