//! The task runner: one subcommand for each task of people and CI in this repository.
//!
//! `cargo xtask` builds this crate and runs it, so that cargo is the only tool needed at first.
//! Each subcommand is a module; [`sh`] (running other programs) and [`workspace`] (paths) have the
//! common parts.

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
mod simulate;
mod test;
mod upgrade;
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
    /// Demonstrate the connector on this machine; as root with the kernel part
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
    /// Run many seeds of the simulation.
    Simulate(simulate::Args),
    /// Build a release in target/dist: the program, its components (SBOM), checksums
    Dist,
    /// Interpret the unit tests of tunnel-proto, where the tool chain has Miri.
    Miri,
    /// Run every check: set-up, build, lint, doc tests, a short fuzz run, all tests.
    Test(test::Args),
    /// Build another release, and test that it and this one take over from each other; needs root.
    Upgrade(upgrade::Args),
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
        Task::Simulate(args) => simulate::run(&args),
        Task::Dist => dist::run(),
        Task::Miri => miri::run(),
        Task::Test(args) => test::run(&args),
        Task::Upgrade(args) => upgrade::run(&args),
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
