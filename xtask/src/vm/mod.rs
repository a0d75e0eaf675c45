//! `cargo xtask vm`: the redirect, the main path and the units on another kernel, under a systemd
//! that is process 1.
//!
//! A virtual machine by software emulation: no KVM, and nothing of it is installed on the host.
//! [`archive`] fetches a kernel's package from whichever Debian release has it, [`image`] makes a
//! small root file system of a release and a second disk of what is tested, [`machine`] runs them
//! under qemu, [`results`] reads what the scripts in `guest/` wrote to the second serial port, and
//! [`record`] puts it into docs/kernels.md. All files are in target/vm.

mod archive;
mod image;
mod machine;
mod payload;
mod record;
mod results;

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::bench::machine::Machine;
use crate::setup::{self, Purpose};
use crate::workspace::{self, AS_ROOT};
use crate::{ebpf, sh};

use archive::{Archive, Series};
use results::Outcome;

/// Options of `cargo xtask vm`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Series of the kernel, for example 5.10, 6.1, 6.12, or `newest`. May be repeated.
    #[arg(long, value_name = "SERIES", required = true)]
    kernel: Vec<Series>,
    /// Debian release of the root file system, and so systemd's: bookworm has 252, trixie 257. By
    /// default the kernel's.
    #[arg(long)]
    release: Option<Release>,
    /// Run only this part.
    #[arg(long)]
    only: Option<Part>,
    /// The test programs to run. May be repeated.
    #[arg(long = "test", value_name = "NAME", default_values = ["redirect", "connector"])]
    tests: Vec<String>,
    /// Write what came of it to docs/kernels.md.
    #[arg(long)]
    record: bool,
    /// Minutes after which a machine that has not finished is ended.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
}

/// A Debian release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Release {
    /// Debian 12, systemd 252
    Bookworm,
    /// Debian 13, systemd 257
    Trixie,
}

impl Release {
    fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }
}

/// What is run in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The redirect's tests and the main path's.
    Tests,
    /// The units, over three boots.
    Units,
}

/// Runs each kernel, and fails where anything failed.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the file systems are made as root: run `{AS_ROOT} vm --kernel 6.1`");
    }
    if std::env::consts::ARCH != "x86_64" {
        bail!("the virtual machine is an x86-64 one, and runs this machine's programs");
    }
    setup::ensure(Purpose::Vm)?;
    ebpf::build()?;
    let folder = workspace::target().join("vm");
    let archive = Archive::update(&folder.join("apt"))?;
    let wants = |part| args.only.is_none_or(|only| only == part);
    let tests = if wants(Part::Tests) {
        args.tests.as_slice()
    } else {
        &[]
    };
    let payload = payload::build(&folder.join("payload"), tests, wants(Part::Units))?;
    let mut failed = Vec::new();
    for series in &args.kernel {
        let before = Machine::look(false);
        let outcome = one(args, *series, &folder, &archive, &payload)?;
        outcome.print();
        if args.record {
            record::write(&outcome, &before)?;
        }
        if !outcome.succeeded() {
            failed.push(outcome.title());
        }
    }
    if !failed.is_empty() {
        bail!("not everything holds: {}", failed.join("; "));
    }
    Ok(())
}

fn one(
    args: &Args,
    series: Series,
    folder: &Path,
    archive: &Archive,
    payload: &Path,
) -> Result<Outcome> {
    let kernel = archive.kernel(series)?;
    let release = args.release.unwrap_or(kernel.release);
    sh::heading(&format!("Linux {} on {}", kernel.version, release.name()));
    let kernel = archive.unpack(&kernel, &folder.join("kernels"))?;
    let qemu = machine::Qemu::find(archive, &folder.join("qemu"))?;
    let root = image::root(archive, release, folder)?;
    let name = format!("{}-{}", kernel.version, release.name());
    let work = folder.join("runs").join(name);
    std::fs::create_dir_all(&work)?;
    let initrd = image::initrd(archive, &kernel, &work)?;
    let disk = image::payload(payload, &kernel, &work)?;
    let machine = machine::Machine {
        kernel: kernel.image,
        initrd,
        disks: [root, disk],
        work,
    };
    let time = Duration::from_secs(60 * args.minutes);
    let text = machine.run(&qemu, time)?;
    Outcome::read(&text)
}
