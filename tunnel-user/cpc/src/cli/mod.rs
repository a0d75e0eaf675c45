//! The command line: one file per subcommand.

mod agent;
mod common;
mod config;
mod join;
mod keeper;
mod konnectivity;
mod log;
mod man;
mod pki;
mod redirect;
mod server;
mod status;
mod token;

use clap::{Parser, Subcommand};

use konnectivity::{proxy_agent, proxy_server};

/// Control Plane Connector: kube-apiserver reaches kubelets, pods and services in a network
/// without inbound access.
///
/// An agent (`cpc agent`) on each worker dials out over QUIC to a server (`cpc server`) on the
/// control plane. An eBPF program redirects connections of programs on the control-plane host into
/// the tunnel; HTTP CONNECT works without eBPF.
#[derive(Debug, Parser)]
#[command(
    name = "cpc",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Server(server::Args),
    Agent(agent::Args),
    Keeper(keeper::Args),
    ProxyServer(Box<proxy_server::Args>),
    ProxyAgent(Box<proxy_agent::Args>),
    Status(status::Args),
    Redirect(redirect::Args),
    Pki(pki::Args),
    Token(token::Args),
    Log(log::Args),
    Config(config::Args),
    Completions(man::CompletionsArgs),
    Man(man::ManArgs),
}

impl Cli {
    /// Reads the command line of this process; prints help and errors, and exits then.
    ///
    /// A program name of Konnectivity selects the command that replaces that program.
    pub(crate) fn from_command_line() -> Self {
        Self::parse_from(konnectivity::by_name(std::env::args_os()))
    }

    /// Runs the subcommand.
    ///
    /// # Errors
    /// The error of the subcommand, for people.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Server(args) => args.run(),
            Command::Agent(args) => args.run(),
            Command::Keeper(args) => args.run(),
            Command::ProxyServer(args) => args.run(),
            Command::ProxyAgent(args) => args.run(),
            Command::Status(args) => args.run(),
            Command::Redirect(args) => args.run(),
            Command::Pki(args) => args.run(),
            Command::Token(args) => args.run(),
            Command::Log(args) => args.run(),
            Command::Config(args) => args.run(),
            Command::Completions(args) => args.run(),
            Command::Man(args) => args.run(),
        }
    }
}

/// Creates the runtime of the control task: one thread, because shards have their own.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}
