//! Installs missing tools, and nothing else.
//!
//! Each step first looks for its tool, in any version: a second run changes nothing and takes no
//! time. Packages come from the distribution where that is Debian or a relative and this user may
//! install them; elsewhere the step prints their names. Cargo's tools go into the folder of `cargo
//! install`, not below `target/`: the next checkout finds them too, and `cargo clean` does not cost
//! minutes.

mod packages;
mod tools;

use std::process::Command;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::ebpf::Toolchain;
use crate::sh;
use packages::Package;

/// Options of `cargo xtask setup`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install only the tools of this task
    #[arg(long = "for", value_enum, default_value_t = Purpose::Test)]
    purpose: Purpose,
}

/// Purpose of the tools.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Purpose {
    /// `cargo xtask demo` as root: the laboratory and the kernel programs
    Demo,
    /// `cargo xtask demo` without root
    Loopback,
    /// `cargo xtask dist`
    Dist,
    /// All tests
    Test,
    /// `cargo xtask vm`, without qemu
    Vm,
}

/// Installs the tools of the task and prints what it did.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure(args.purpose)
}

/// Installs the tools that a task begins with.
pub(crate) fn ensure(purpose: Purpose) -> Result<()> {
    sh::heading("Tools");
    let mut report = Report::default();
    packages::ensure(
        match purpose {
            Purpose::Loopback | Purpose::Dist => packages::LOOPBACK,
            Purpose::Demo | Purpose::Test | Purpose::Vm => packages::LABORATORY,
        },
        &mut report,
    )?;
    if purpose == Purpose::Vm {
        packages::ensure(packages::VIRTUAL_MACHINE, &mut report)?;
        tools::ensure(&tools::NEXTEST, &mut report)?;
    }
    if purpose != Purpose::Loopback {
        kernel_compiler(&mut report)?;
        tools::bpf_linker(&mut report)?;
    }
    if purpose == Purpose::Test {
        kernel_clippy(&mut report)?;
        for tool in tools::CARGO {
            tools::ensure(tool, &mut report)?;
        }
    }
    if purpose == Purpose::Dist {
        tools::ensure(&tools::CYCLONEDX, &mut report)?;
    }
    report.print();
    Ok(())
}

const KERNEL_COMPILER: &[Package<'_>] = &[
    Package::named("rustc-web", "a compiler that knows bpfel-unknown-none"),
    Package::named(
        "libstd-rust-web-dev-bpf",
        "its core library for that target",
    ),
];

/// Tools that were there, and installed ones.
#[derive(Default)]
struct Report {
    present: Vec<String>,
    installed: Vec<String>,
}

impl Report {
    fn print(&self) {
        eprintln!("    already there: {}", self.present.join(", "));
        if !self.installed.is_empty() {
            eprintln!("    installed now: {}", self.installed.join(", "));
        }
    }
}

/// Installs a compiler for the kernel programs: the distribution's where it has one, because that
/// leaves this user's toolchains alone, otherwise the source of `core` for rustup's nightly.
fn kernel_compiler(report: &mut Report) -> Result<()> {
    if let Some(toolchain) = Toolchain::installed() {
        report.present.push(toolchain.describe().to_owned());
        return Ok(());
    }
    if packages::offered(KERNEL_COMPILER) {
        packages::install(KERNEL_COMPILER)?;
    } else if sh::find("rustup").is_some() {
        eprintln!("    missing: a compiler that knows bpfel-unknown-none");
        let mut rustup = Command::new("rustup");
        rustup.args(["toolchain", "install", "nightly", "--profile", "minimal"]);
        sh::run(rustup.args(["--component", "rust-src", "--component", "clippy"]))?;
    }
    let Some(toolchain) = Toolchain::installed() else {
        bail!(
            "there is no compiler for bpfel-unknown-none; install rustup, then run `rustup \
             toolchain install nightly --component rust-src`"
        );
    };
    report.installed.push(toolchain.describe().to_owned());
    Ok(())
}

/// Installs the linter of that compiler; rustup's comes with it.
fn kernel_clippy(report: &mut Report) -> Result<()> {
    let clippy = Package {
        program: "/usr/bin/cargo-clippy",
        name: "rust-web-clippy",
        why: "lints the kernel programs",
    };
    if Toolchain::installed() == Some(Toolchain::Debian) {
        packages::ensure(&[clippy], report)?;
    }
    Ok(())
}
