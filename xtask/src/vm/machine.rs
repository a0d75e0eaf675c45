//! The virtual machine: qemu with software emulation.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::archive::Archive;
use super::{Release, image};
use crate::{interrupt, sh};

/// Memory, in MiB.
const MEMORY: &str = "3072";
/// The kernel's command line.
const COMMAND_LINE: &str =
    "console=ttyS0 root=/dev/vda rw quiet systemd.show_status=false panic=-1";
const POLL: Duration = Duration::from_millis(500);

/// An installed qemu, or one in a tree of its own, which runs with its own libraries.
pub(super) enum Qemu {
    Installed(PathBuf),
    Tree(PathBuf),
}

impl Qemu {
    /// Finds qemu, or puts it into `tree`: Debian's package may conflict with installed ones.
    pub(super) fn find(archive: &Archive, tree: &Path) -> Result<Self> {
        if let Some(program) = sh::find("qemu-system-x86_64") {
            return Ok(Self::Installed(program));
        }
        if !tree.join("usr/bin/qemu-system-x86_64").exists() {
            image::remove(tree)?;
            archive.tree("extract", Release::Trixie, &["qemu-system-x86"], tree)?;
        }
        Ok(Self::Tree(tree.to_owned()))
    }

    fn command(&self) -> Command {
        let mut command = Command::new("nice");
        match self {
            Self::Installed(program) => {
                command.arg(program);
            }
            Self::Tree(tree) => {
                let libraries = tree.join("usr/lib/x86_64-linux-gnu");
                command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
                command.arg(tree.join("usr/lib64/ld-linux-x86-64.so.2"));
                command.arg("--library-path").arg(libraries);
                command.arg(tree.join("usr/bin/qemu-system-x86_64"));
                for data in ["usr/share/qemu", "usr/share/seabios"] {
                    command.arg("-L").arg(tree.join(data));
                }
            }
        }
        command
    }
}

/// Files of a boot.
pub(super) struct Machine {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    /// The root file system and the payload; both stay unchanged.
    pub(super) disks: [PathBuf; 2],
    /// Folder for the output of the serial ports.
    pub(super) work: PathBuf,
}

/// A child process that ends with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine {
    /// Runs the machine until it powers off, and returns the output of its second serial port,
    /// which is printed meanwhile.
    pub(super) fn run(&self, qemu: &Qemu, longest: Duration) -> Result<String> {
        let [console, results] = ["console", "results"].map(|it| self.work.join(it));
        let mut command = qemu.command();
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2"]);
        command.args([
            "-m",
            MEMORY,
            "-nodefaults",
            "-display",
            "none",
            "-nic",
            "none",
        ]);
        command.arg("-kernel").arg(&self.kernel);
        command.arg("-initrd").arg(&self.initrd);
        command.args(["-append", COMMAND_LINE]);
        for disk in &self.disks {
            let file = disk.display();
            command.arg("-drive");
            command.arg(format!("file={file},format=raw,if=virtio,snapshot=on"));
        }
        for port in [&console, &results] {
            image::remove(port)?;
            fs::write(port, "")?;
            command
                .arg("-serial")
                .arg(format!("file:{}", port.display()));
        }
        interrupt::catch()?;
        eprintln!("    $ {}", sh::text(&command));
        let child = command.spawn().context("cannot start qemu")?;
        let mut child = Running(child);
        let mut printed = 0;
        let deadline = Instant::now() + longest;
        loop {
            let ended = child.0.try_wait()?;
            printed += follow(&results, printed)?;
            interrupt::check()?;
            if ended.is_some() {
                break;
            }
            if Instant::now() > deadline {
                bail!(
                    "the machine has not finished in {} minutes; {} is its console",
                    longest.as_secs() / 60,
                    console.display()
                );
            }
            thread::sleep(POLL);
        }
        let text = String::from_utf8_lossy(&fs::read(&results)?).replace('\r', "");
        if !text.lines().any(|line| line == "finished") {
            bail!(
                "the machine ended before its checks; {} is its console",
                console.display()
            );
        }
        Ok(text)
    }
}

/// Prints the part of the file beyond `from` bytes, and returns its length.
fn follow(file: &Path, from: u64) -> Result<u64> {
    let mut file = fs::File::open(file)?;
    file.seek(SeekFrom::Start(from))?;
    let mut new = Vec::new();
    file.read_to_end(&mut new)?;
    std::io::stderr().write_all(&new)?;
    Ok(new.len() as u64)
}
