//! The task runner: everything a person or CI does with this repository, one subcommand each.
//!
//! `cargo xtask` builds this crate and runs it, so that the only tool anybody needs at first is
//! cargo. Each subcommand is a module; what several of them share is in [`sh`] (running other
//! programs) and [`workspace`] (where things are).

mod bench;
mod demo;
mod dist;
mod ebpf;
mod fuzz;
mod hostile;
mod interrupt;
mod lab;
mod lint;
mod miri;
mod programs;
mod setup;
mod sh;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set up, build, run and test Control Plane Connector.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the tools that the other tasks need and that are missing.
    Setup(setup::Args),
    /// Show what the connector does, on this machine; as root with everything.
    Demo,
    /// Measure the connector beside direct TCP, stock quinn, Konnectivity and OpenVPN; needs root.
    Bench(bench::Args),
    /// Build the kernel programs into target/bpf.
    BuildEbpf,
    /// Check formatting, clippy, documentation and its links, licences and advisories.
    Lint,
    /// Build, use and remove the laboratory: control plane, router and workers in namespaces.
    Lab(lab::Args),
    /// Fuzz the decoders for a while.
    Fuzz(fuzz::Args),
    /// Make a release in target/dist: the program, what it is made of (SBOM), checksums.
    Dist,
    /// Interpret the unit tests of tunnel-proto, where the tool chain has Miri.
    Miri,
    /// Run every check: set-up, build, lint, doc tests, a short fuzz run, all tests.
    Test(test::Args),
    /// Run the redirect's tests, the main path and the units on another kernel, in a virtual machine.
    Vm(vm::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Task::Setup(args) => setup::run(&args),
        Task::Demo => demo::run(),
        Task::Bench(args) => bench::run(&args),
        Task::BuildEbpf => ebpf::build(),
        Task::Lint => lint::run(),
        Task::Lab(args) => lab::run(args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Dist => dist::run(),
        Task::Miri => miri::run(),
        Task::Test(args) => test::run(&args),
        Task::Vm(args) => vm::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}
