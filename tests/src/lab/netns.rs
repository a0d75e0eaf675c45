//! Named network namespaces.
//!
//! A program enters one between fork and exec, a piece of this process by a short-lived thread.
//! `ip netns exec` is not used: it mounts a new `/sys`, which hides cgroups and the BPF file
//! system.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{fs, io, thread};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

/// A namespace below `/run/netns`. Dropping the value leaves the namespace alone.
#[derive(Clone, Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Returns the namespace called `name`, which may not exist yet.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Makes it, with its loopback interface up.
    ///
    /// # Errors
    ///
    /// No root, or there is one of that name.
    pub fn create(name: impl Into<String>) -> Result<Self> {
        let netns = Self::named(name);
        run(Command::new("ip").args(["netns", "add", &netns.name]), "")?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Removes it if it is there. It lives on while a process or a socket is in it.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn delete(&self) -> Result<()> {
        if !self.path().exists() {
            return Ok(());
        }
        run(Command::new("ip").args(["netns", "delete", &self.name]), "")
    }

    /// Returns the name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the file for `nsenter --net=` and setns(2).
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Returns a program that will run inside.
    ///
    /// # Errors
    ///
    /// The namespace does not exist.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        self.place(&mut command)?;
        Ok(command)
    }

    /// Lets `command` start inside.
    ///
    /// # Errors
    ///
    /// The namespace does not exist.
    pub fn place(&self, command: &mut Command) -> Result<()> {
        let file = self.open()?;
        // SAFETY: setns(2) is a bare system call on a descriptor that the closure owns; nothing is
        // allocated between fork and exec.
        unsafe {
            command
                .pre_exec(move || setns(&file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
        }
        Ok(())
    }

    /// Runs `work` inside, on a thread of its own: sockets that it makes stay in the namespace.
    ///
    /// # Errors
    ///
    /// The namespace can't be entered, or `work` fails or panics.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = self.open()?;
        thread::scope(|scope| {
            let worker = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("cannot enter namespace {}", self.name))?;
                work()
            });
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `ip` commands, one a line, inside.
    ///
    /// # Errors
    ///
    /// What `ip` says of the first line that fails.
    pub fn ip(&self, lines: &str) -> Result<()> {
        run(self.command("ip")?.args(["-batch", "-"]), lines)
    }

    /// Applies an nftables script inside, in one transaction.
    ///
    /// # Errors
    ///
    /// What `nft` says of the script.
    pub fn nft(&self, script: &str) -> Result<()> {
        run(self.command("nft")?.args(["-f", "-"]), script)
    }

    /// Writes a network sysctl, for example `("ipv4/ip_forward", "1")`.
    ///
    /// # Errors
    ///
    /// There is no such setting in this kernel.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let file = Path::new("/proc/sys/net").join(name);
        self.enter(|| fs::write(&file, value).with_context(|| format!("cannot set {name}")))
    }

    fn open(&self) -> Result<File> {
        let path = self.path();
        File::open(&path).with_context(|| format!("no network namespace {}", path.display()))
    }
}

/// Runs `command` to its end with `input` as its standard input.
pub(super) fn run(command: &mut Command, input: &str) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends early closes the pipe; its exit code says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let args: Vec<_> = command
            .get_args()
            .map(|arg| arg.to_string_lossy())
            .collect();
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "`{program} {}` failed ({}): {}",
            args.join(" "),
            output.status,
            said.trim()
        );
    }
    Ok(())
}
