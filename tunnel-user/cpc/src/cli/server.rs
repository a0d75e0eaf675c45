//! `cpc server`.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::common::{LogArgs, Overlay, TlsArgs, begin, check_log, finish, take_over};

use cpc_config::datapath::EngineChoice;
use cpc_config::{ConfigError, ServerConfig};
use cpc_konnectivity::server::ServerExtension;

/// Run the server, on the control plane
///
/// Agents dial `listen` over QUIC. Programs on this host reach the destinations of agents through
/// the frontends: the eBPF redirect, and HTTP CONNECT. The configuration file can hold every
/// setting; the environment overrides the file, and flags override both.
///
/// SIGTERM drains: open connections may go on for limits.drain; a second signal ends the process at
/// once. SIGHUP reloads policy, allow-lists, capture sets and log filter. Certificates reload when
/// their files change.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Configuration file (YAML, version 1)
    #[arg(long, short, env = "CPC_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// UDP address of the tunnel [default: 0.0.0.0:8132]
    #[arg(long, env = "CPC_LISTEN", value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Number of servers that an agent must find [default: 1]
    #[arg(long, env = "CPC_SERVER_COUNT", value_name = "N")]
    server_count: Option<u32>,
    /// Threads that carry tunnels [default: one per core]
    #[arg(long, env = "CPC_SHARDS", value_name = "N")]
    shards: Option<usize>,
    /// Directory of the persisted secret [default: /var/lib/cpc]
    #[arg(long, env = "CPC_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Socket of the keeper (`cpc keeper`), which holds copies of connections over a crash of this server
    #[arg(long, env = "CPC_KEEPER", value_name = "PATH")]
    keeper: Option<PathBuf>,
    /// Address of health, metrics and status [default: 127.0.0.1:8135]
    #[arg(long, env = "CPC_ADMIN", value_name = "ADDR:PORT")]
    admin: Option<SocketAddr>,
    /// Engine that moves bytes [default: auto]
    #[arg(long, env = "CPC_ENGINE", value_enum)]
    engine: Option<EngineChoice>,
    /// Take the place of the running server with the same state_dir, if there is one, and go on with its
    /// connections
    #[arg(long, env = "CPC_REPLACE")]
    replace: bool,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    log: LogArgs,
}

/// Checks the configuration as a start does before it opens anything.
///
/// # Errors
/// [`ConfigError::Value`] naming the key.
pub(super) fn check(config: &ServerConfig) -> Result<(), ConfigError> {
    cpc_server::check(config)?;
    check_log(&config.log)
}

impl Args {
    fn config(&self) -> Result<ServerConfig, ConfigError> {
        self.checked_by(ServerConfig::check)
    }

    /// Returns the configuration of a start. A reload checks less, so that one wrong value does not
    /// block the others.
    ///
    /// # Errors
    /// [`ConfigError`], with the place of the wrong value.
    pub(super) fn for_start(&self) -> Result<ServerConfig, ConfigError> {
        self.checked_by(check)
    }

    fn checked_by(
        &self,
        check: impl Fn(&ServerConfig) -> Result<(), ConfigError>,
    ) -> Result<ServerConfig, ConfigError> {
        let file = self.config.as_deref();
        let mut config = ServerConfig::load(file)?;
        let mut overlay = Overlay::default();
        overlay.put("listen", &mut config.listen, self.listen);
        overlay.put("server_count", &mut config.server_count, self.server_count);
        overlay.put("shards", &mut config.shards, self.shards);
        overlay.put("state_dir", &mut config.state_dir, self.state_dir.clone());
        let keeper = self.keeper.clone().map(Some);
        overlay.put("keeper", &mut config.keeper, keeper);
        overlay.put("admin", &mut config.admin, self.admin);
        overlay.put("datapath.engine", &mut config.datapath.engine, self.engine);
        self.tls.apply(&mut overlay, &mut config.tls);
        self.log.apply(&mut overlay, &mut config.log);
        check(&config).map_err(|error| overlay.locate(error, file))?;
        Ok(config)
    }

    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = self.for_start()?;
        let for_start = cpc_server::for_start(&config);
        let log = begin(for_start, &config.log, &config.audit)?;
        let start = take_over(Some(&config.state_dir), "server", self.replace)?;
        let extension = Some(Box::new(ServerExtension::default()) as _);
        let reread = || self.config();
        let served = cpc_server::run(config, log, start, &reread, extension);
        finish(super::runtime()?.block_on(served)?)
    }
}
