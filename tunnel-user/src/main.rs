//! The `cpc` binary: parses the command line, runs it, and turns errors into an exit code.

use std::process::ExitCode;

use tunnel_user::cli::Cli;

fn main() -> ExitCode {
    match Cli::from_command_line().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cpc: {error:#}");
            ExitCode::FAILURE
        }
    }
}
