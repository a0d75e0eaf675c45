//! The `cpc` binary: parses the command line, runs it, and turns errors into an exit code.

use std::process::ExitCode;

use clap::Parser;
use tunnel_user::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cpc: {error:#}");
            ExitCode::FAILURE
        }
    }
}
