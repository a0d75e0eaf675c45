//! Installing what is missing, and nothing else.
//!
//! Each step first looks whether what it would install is there, in whatever version: a second run
//! changes nothing and takes no time. Packages come from the distribution where that is Debian or
//! a relative and this user may install them; elsewhere the step says what to install. Cargo's
//! tools go where `cargo install` puts them, not below `target/`: the next checkout finds them
//! too, and `cargo clean` does not cost minutes.

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
    /// Install only what this task needs.
    #[arg(long = "for", value_enum, default_value_t = Purpose::Test)]
    purpose: Purpose,
}

/// What the tools are for.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Purpose {
    /// What `cargo xtask demo` needs as root: the laboratory and the kernel programs.
    Demo,
    /// What `cargo xtask demo` needs without root.
    Loopback,
    /// What `cargo xtask dist` needs.
    Dist,
    /// Everything that the tests need.
    Test,
    /// What `cargo xtask vm` needs, beside qemu.
    Vm,
}

/// Installs what the task needs and says what was done.
pub(crate) fn run(args: &Args) -> Result<()> {
    ensure(args.purpose)
}

/// The same, for the tasks that begin with it.
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

/// What was there and what was installed.
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

/// A compiler for the kernel programs: the distribution's where it has one, because that leaves
/// this user's own toolchains alone, else the source of `core` for rustup's nightly.
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

/// The linter that belongs to that compiler; rustup's comes with it.
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
