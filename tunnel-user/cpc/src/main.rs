//! The `cpc` binary: parses the command line, runs it, and turns errors into an exit code.

use std::process::ExitCode;

mod cli;

use cli::Cli;
use cpc_host::report::report;

fn main() -> ExitCode {
    match Cli::from_command_line().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cpc: {}", report(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
