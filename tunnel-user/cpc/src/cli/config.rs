//! `cpc config`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

use super::{agent, server};
use cpc_config::role::Role;
use cpc_config::{AgentConfig, ServerConfig, to_yaml};

/// Check a configuration file, or print the configuration of a start
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check a configuration file as a start does
    ///
    /// Prints `FILE: ok`, or the first error with its line and then exits with 1. Only the file counts:
    /// CPC_* in the environment and flags of a start do not. The check opens none of the files that the
    /// configuration names, so it also works on another host.
    Check {
        /// Program that reads the file [default: the one whose keys the file has]
        #[arg(long, value_enum)]
        role: Option<Role>,
        /// Configuration file (YAML, version 1)
        file: PathBuf,
    },
    /// Print the configuration of a start, as YAML
    ///
    /// The command combines the file, CPC_* in the environment and the flags behind `--`, and
    /// checks the result as a start does. The output has every default and absolute paths, and is
    /// itself a configuration file. It contains no secret, only the paths of files that hold
    /// secrets.
    Show {
        /// Program whose configuration is shown [default: the one whose keys the file has]
        #[arg(long, value_enum)]
        role: Option<Role>,
        /// Configuration file (YAML, version 1) [default: that of CPC_CONFIG]
        file: Option<PathBuf>,
        /// Flags of `cpc server` or `cpc agent`
        #[arg(last = true)]
        flags: Vec<OsString>,
    },
}

/// The command line of a start, which `cpc config show` takes as well.
#[derive(Debug, Parser)]
#[command(name = "cpc config show --")]
struct Start<A: clap::Args> {
    #[command(flatten)]
    args: A,
}

impl Args {
    pub(super) fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Check { role, file } => check(role, &file),
            Command::Show { role, file, flags } => show(role, file.as_deref(), flags),
        }
    }
}

fn check(role: Option<Role>, file: &Path) -> anyhow::Result<()> {
    let checked = match role_of(role, Some(file))? {
        Role::Server => server::check(&ServerConfig::load(Some(file))?),
        Role::Agent => agent::check(&AgentConfig::load(Some(file))?),
    };
    checked.map_err(|error| error.within(Some(file)))?;
    println!("{}: ok", file.display());
    Ok(())
}

fn show(role: Option<Role>, file: Option<&Path>, flags: Vec<OsString>) -> anyhow::Result<()> {
    // A start finds this one by itself, unless a flag names another.
    let of_environment = std::env::var_os("CPC_CONFIG").map(PathBuf::from);
    let role = role_of(role, file.or(of_environment.as_deref()))?;
    let file = file.map(|file| ["--config".into(), file.into()]);
    let arguments: Vec<OsString> = ["cpc".into()]
        .into_iter()
        .chain(file.into_iter().flatten())
        .chain(flags)
        .collect();
    let here = std::env::current_dir().context("the working directory")?;
    let text = match role {
        Role::Server => {
            let start = Start::<server::Args>::parse_from(arguments);
            let mut config = start.args.for_start()?;
            config.make_absolute(&here);
            to_yaml(&config)?
        }
        Role::Agent => {
            let start = Start::<agent::Args>::parse_from(arguments);
            let mut config = start.args.for_start()?;
            config.make_absolute(&here);
            to_yaml(&config)?
        }
    };
    print!("{text}");
    Ok(())
}

/// Returns the role that the command names, or that of the file's keys.
fn role_of(role: Option<Role>, file: Option<&Path>) -> anyhow::Result<Role> {
    if let Some(role) = role {
        return Ok(role);
    }
    let Some(file) = file else {
        bail!("without a file --role is needed: --role server or --role agent");
    };
    Role::of_file(file)?.with_context(|| {
        format!(
            "{}: its keys do not show which program reads the file: add --role server or --role agent",
            file.display()
        )
    })
}
