//! `cargo xtask vm`: the tests of the redirect, the main path and the units on another kernel,
//! under a systemd that is process 1.
//!
//! The virtual machine runs by software emulation, without KVM and without installing anything.
//! [`archive`] fetches a kernel's package from a Debian release, [`image`] creates a small root
//! file system and a second disk with the payload, [`machine`] runs them under qemu, [`results`]
//! reads the output of the scripts in `guest/`, and [`record`] writes docs/kernels.md. All files
//! are in target/vm.

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
    /// Series of the kernel, for example 5.10, 6.1, 6.12, or `newest`; may be repeated
    #[arg(long, value_name = "SERIES", required = true)]
    kernel: Vec<Series>,
    /// Debian release of the root file system, and so of systemd: bookworm has 252, trixie 257
    /// [default: that of the kernel]
    #[arg(long)]
    release: Option<Release>,
    /// Run only this part
    #[arg(long)]
    only: Option<Part>,
    /// Test programs to run; may be repeated
    #[arg(long = "test", value_name = "NAME", default_values = ["redirect", "connector"])]
    tests: Vec<String>,
    /// Write the result to docs/kernels.md
    #[arg(long)]
    record: bool,
    /// Minutes after which an unfinished machine is ended
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

/// Part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The tests of the redirect and of the main path
    Tests,
    /// The units, over three boots
    Units,
}

/// Runs each kernel, and fails if anything failed.
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
        bail!("failed: {}", failed.join("; "));
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
