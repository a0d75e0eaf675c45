//! `cpc agent`.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::common::{LogArgs, Overlay, TlsArgs, begin, check_log, finish, take_over};
use super::join;
use cpc_config::address;
use cpc_config::datapath::EngineChoice;
use cpc_config::{AgentConfig, AllowRule, ConfigError};
use cpc_host::privileges::ANY_START;
use cpc_konnectivity::agent::AgentExtension;

/// Run an agent, on a worker
///
/// The agent dials out to every server and holds a tunnel to each. Servers request connections to
/// targets; the agent dials those that its allow-list names, by default the kubelet of its own
/// node: the addresses in its certificate, port 10250.
///
/// SIGTERM drains, a second signal ends the process at once. SIGHUP reloads allow-list, offer and log
/// filter. Certificates reload when their files change.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Configuration file (YAML, version 1)
    #[arg(long, short, env = "CPC_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// A server to hold a tunnel to; may be repeated
    #[arg(
        long = "server",
        env = "CPC_SERVERS",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        value_parser = server
    )]
    servers: Vec<String>,
    /// Threads that carry tunnels [default: one per core]
    #[arg(long, env = "CPC_SHARDS", value_name = "N")]
    shards: Option<usize>,
    /// Tunnels to each server [default: 1]
    #[arg(long, env = "CPC_TUNNELS", value_name = "N")]
    tunnels: Option<u8>,
    /// Directory of a lock that proves to servers that an earlier process of this agent has ended
    #[arg(long, env = "CPC_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Socket of the keeper (`cpc keeper`), which holds copies of connections over a crash of this agent
    #[arg(long, env = "CPC_KEEPER", value_name = "PATH")]
    keeper: Option<PathBuf>,
    /// Destination that the agent may dial, such as 10.99.1.2:10250 or 10.244.1.0/24; may be repeated
    #[arg(long, env = "CPC_ALLOW", value_name = "CIDR[:PORTS]")]
    allow: Vec<AllowRule>,
    /// Address of health, metrics and status [default: 127.0.0.1:8136]
    #[arg(long, env = "CPC_ADMIN", value_name = "ADDR:PORT")]
    admin: Option<SocketAddr>,
    /// Engine that moves bytes [default: auto]
    #[arg(long, env = "CPC_ENGINE", value_enum)]
    engine: Option<EngineChoice>,
    /// Take the place of the running agent with the same state_dir, if there is one, and go on with its
    /// connections
    #[arg(long, env = "CPC_REPLACE")]
    replace: bool,
    #[command(flatten)]
    tls: TlsArgs,
    /// Request the next certificate from a server in time; --cert and --key must name one file
    #[arg(long, env = "CPC_TLS_RENEW", help_heading = "TLS")]
    renew: bool,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Join(join::Args),
}

/// Parses a server's address, with or without blanks around it: lists have them behind their commas.
fn server(text: &str) -> Result<String, String> {
    let text = text.trim();
    match address::split(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err(format!("{text:?} is not host:port")),
    }
}

/// Checks the configuration as a start does before it opens anything.
///
/// # Errors
/// [`ConfigError::Value`] naming the key.
pub(super) fn check(config: &AgentConfig) -> Result<(), ConfigError> {
    cpc_agent::check(config)?;
    check_log(&config.log)
}

impl Args {
    fn config(&self) -> Result<AgentConfig, ConfigError> {
        self.checked_by(AgentConfig::check)
    }

    /// Returns the configuration of a start. A reload checks less, so that one wrong value does not
    /// block the others.
    ///
    /// # Errors
    /// [`ConfigError`], with the place of the wrong value.
    pub(super) fn for_start(&self) -> Result<AgentConfig, ConfigError> {
        self.checked_by(check)
    }

    fn checked_by(
        &self,
        check: impl Fn(&AgentConfig) -> Result<(), ConfigError>,
    ) -> Result<AgentConfig, ConfigError> {
        let file = self.config.as_deref();
        let mut config = AgentConfig::load(file)?;
        let mut overlay = Overlay::default();
        let servers = self.servers.iter().cloned().map(Into::into);
        let servers = (!self.servers.is_empty()).then(|| servers.collect());
        overlay.put("servers", &mut config.servers, servers);
        let allow = (!self.allow.is_empty()).then(|| Some(self.allow.clone()));
        overlay.put("allow", &mut config.allow, allow);
        overlay.put("shards", &mut config.shards, self.shards);
        overlay.put("tunnels", &mut config.tunnels, self.tunnels);
        let state_dir = self.state_dir.clone().map(Some);
        overlay.put("state_dir", &mut config.state_dir, state_dir);
        let keeper = self.keeper.clone().map(Some);
        overlay.put("keeper", &mut config.keeper, keeper);
        overlay.put("admin", &mut config.admin, self.admin);
        overlay.put("datapath.engine", &mut config.datapath.engine, self.engine);
        self.tls.apply(&mut overlay, &mut config.tls);
        overlay.put(
            "tls.renew",
            &mut config.tls.renew,
            self.renew.then_some(true),
        );
        self.log.apply(&mut overlay, &mut config.log);
        check(&config).map_err(|error| overlay.locate(error, file))?;
        Ok(config)
    }

    pub(super) fn run(mut self) -> anyhow::Result<()> {
        if let Some(Command::Join(args)) = self.command.take() {
            return args.run();
        }
        let config = self.for_start()?;
        let log = begin(ANY_START, &config.log, &config.audit)?;
        let start = take_over(config.state_dir.as_deref(), "agent", self.replace)?;
        let reread = || self.config();
        let ran = cpc_agent::run(config, log, start, AgentExtension::extend, &reread);
        finish(super::runtime()?.block_on(ran)?)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::Args;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn servers(list: &str) -> Result<Vec<String>, clap::Error> {
        let cli = Cli::try_parse_from(["cpc", "--server", list])?;
        Ok(cli.args.servers)
    }

    #[test]
    fn a_list_of_servers_may_have_blanks() {
        for list in ["a:1,b:2", "a:1, b:2", " a:1 ,\tb:2\n"] {
            assert_eq!(servers(list).unwrap(), ["a:1", "b:2"], "{list:?}");
        }
        for list in ["a:1,,b:2", "a:1,", "a:1 b:2", "a:1,b", "a:1;b:2", ""] {
            let error = servers(list).unwrap_err().to_string();
            assert!(error.contains("is not host:port"), "{list:?}: {error}");
        }
    }
}
