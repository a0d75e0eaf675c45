//! `cpc proxy-server`: the flags. [`translate`] converts them to the configuration of our server.

mod translate;

use std::time::Duration;

use super::common::{self, Base, Translated};
use super::go;
use super::unused::{Flag, Kind, Tables, Unused};
use cpc_config::{ConfigError, ServerConfig};
use cpc_konnectivity::server::ServerExtension;

/// Run the server with the flags of Konnectivity's proxy-server
///
/// Replaces proxy-server between the same agents and the same kube-apiserver: flags, defaults and
/// environment are those of proxy-server, also when the program is called by that name. The server
/// trusts the identifiers that agents announce, as Konnectivity does;
/// --cpc-believe-identifiers=false ends that. --cpc-config adds all other features of `cpc server`.
#[derive(Debug, clap::Args)]
#[command(args_override_self = true)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    frontend: Frontend,
    #[command(flatten)]
    agents: Agents,
    #[command(flatten)]
    server: Server,
    #[command(flatten)]
    pages: HttpPorts,
    #[command(flatten)]
    own: Own,
    #[command(flatten)]
    base: Base,
    #[command(flatten)]
    unused: Unused<ProxyServer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    Grpc,
    HttpConnect,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "kube-apiserver")]
struct Frontend {
    /// Protocol of kube-apiserver
    #[arg(long, value_enum, default_value = "grpc")]
    mode: Mode,
    /// Unix socket for kube-apiserver, with --server-port=0; without one the server uses TCP
    #[arg(long, value_name = "FILE")]
    uds_name: Option<String>,
    /// Replace the socket even if another process serves there; a stale one is always replaced
    #[arg(
        long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "true", value_parser = go::boolean, value_name = "BOOL"
    )]
    delete_existing_uds_file: bool,
    /// TCP port for kube-apiserver, 1024 to 49151; 0 with --uds-name
    #[arg(long, default_value = "8090", value_parser = go::integer, value_name = "PORT")]
    server_port: i64,
    /// Address of that port; all addresses when empty
    #[arg(long, value_name = "ADDR")]
    server_bind_address: Option<String>,
    /// PEM certificate chain that kube-apiserver checks
    #[arg(long, value_name = "FILE")]
    server_cert: Option<String>,
    /// PEM private key of that certificate
    #[arg(long, value_name = "FILE")]
    server_key: Option<String>,
    /// PEM roots that vouch for kube-apiserver; required with TCP
    #[arg(long, value_name = "FILE")]
    server_ca_cert: Option<String>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Agents")]
struct Agents {
    /// TCP port for agents, 1024 to 49151
    #[arg(long, default_value = "8091", value_parser = go::integer, value_name = "PORT")]
    agent_port: i64,
    /// Address of that port; all addresses when empty
    #[arg(long, value_name = "ADDR")]
    agent_bind_address: Option<String>,
    /// PEM certificate chain that agents check
    #[arg(long, value_name = "FILE")]
    cluster_cert: Option<String>,
    /// PEM private key of that certificate
    #[arg(long, value_name = "FILE")]
    cluster_key: Option<String>,
    /// PEM roots that vouch for agents; not together with tokens
    #[arg(long, value_name = "FILE")]
    cluster_ca_cert: Option<String>,
    /// Interval of pings to an idle agent, at least 30s
    #[arg(long, default_value = "1h0m0s", value_parser = go::duration, value_name = "DURATION")]
    keepalive_time: Duration,
    /// Namespace of the service account whose tokens admit agents; with the next two
    #[arg(long, value_name = "NAME")]
    agent_namespace: Option<String>,
    /// Name of that service account
    #[arg(long, value_name = "NAME")]
    agent_service_account: Option<String>,
    /// Audience of its tokens
    #[arg(long, value_name = "NAME")]
    authentication_audience: Option<String>,
    /// Kubeconfig for the API server, for tokens and leases; the pod's service account when empty
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<String>,
    /// Requests per second to the API server; unlimited when 0, with --kubeconfig-burst 0 too
    #[arg(
        long,
        default_value = "0",
        value_name = "N",
        allow_hyphen_values = true
    )]
    kubeconfig_qps: f32,
    /// Burst of requests to the API server
    #[arg(long, default_value = "0", value_parser = go::integer, value_name = "N")]
    kubeconfig_burst: i64,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Server")]
struct Server {
    /// Name of the server, random when empty
    #[arg(long, env = "PROXY_SERVER_ID", value_name = "NAME")]
    server_id: Option<String>,
    /// Number of servers that an agent must find
    #[arg(long, default_value = "1", value_parser = go::integer, value_name = "N")]
    server_count: i64,
    /// Strategies to choose an agent, in this order: default, destHost, defaultRoute
    #[arg(long, default_value = "default", value_name = "LIST")]
    proxy_strategies: String,
    /// Timeout of a dial; 0 means 10s, because every dial must end
    #[arg(long, default_value = "0s", value_parser = go::duration, value_name = "DURATION")]
    backend_dial_timeout: Duration,
    /// Time that connections may go on after the first SIGTERM; 0 ends them at once
    #[arg(long, default_value = "0s", value_parser = go::duration, value_name = "DURATION")]
    graceful_shutdown_timeout: Duration,
    /// Oldest TLS of both ports: VersionTLS12, VersionTLS13; an older one counts as the first
    #[arg(long, value_name = "VERSION")]
    tls_min_version: Option<String>,
    /// Cipher suites of TLS 1.2, joined by commas or repeated; all safe ones when empty
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    cipher_suites: Vec<String>,
    /// Hold a lease, by which agents count servers
    #[arg(
        long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "false", value_parser = go::boolean, value_name = "BOOL"
    )]
    enable_lease_controller: bool,
    /// Namespace of the leases
    #[arg(long, default_value = "kube-system", value_name = "NAME")]
    lease_namespace: String,
    /// Labels of the leases
    #[arg(
        long,
        default_value = "k8s-app=konnectivity-server",
        value_name = "KEY=VALUE"
    )]
    lease_label: String,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Health and metrics")]
struct HttpPorts {
    /// Port of /healthz, /readyz, /ready and /metrics, 1024 to 49151
    #[arg(long, default_value = "8092", value_parser = go::integer, value_name = "PORT")]
    health_port: i64,
    /// Address of that port; all addresses when empty
    #[arg(long, value_name = "ADDR")]
    health_bind_address: Option<String>,
    /// Port of metrics, status and log filter, 1024 to 49151
    #[arg(long, default_value = "8095", value_parser = go::integer, value_name = "PORT")]
    admin_port: i64,
    /// Address of that port, which has no access control; loopback when empty
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDR")]
    admin_bind_address: String,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Beyond Konnectivity")]
struct Own {
    /// Trust the identifiers that agents announce; otherwise policy.grants in the file decides
    #[arg(
        long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "true", value_parser = go::boolean, value_name = "BOOL"
    )]
    cpc_believe_identifiers: bool,
    /// Server ids to present, 1 to 8: an agent opens a stream to each, and connections on different
    /// streams can't stop each other [default: 3, but 1 with --server-count above 1 and no leases,
    /// where agents would count the ids as servers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    cpc_server_ids: Option<u32>,
}

#[derive(Debug)]
struct ProxyServer;

impl Tables for ProxyServer {
    const OWN: &'static [Flag] = &[(
        "frontend-keepalive-time",
        Kind::Duration,
        "Pings to kube-apiserver",
    )];
}

impl Args {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        self.check_files()?;
        let Translated { config, notes } = self.translate()?;
        let for_start = cpc_server::for_start(&config);
        let log = crate::cli::common::begin(for_start, &config.log, &config.audit)?;
        for note in notes {
            tracing::warn!("{note}");
        }
        let start = crate::cli::common::take_over(Some(&config.state_dir), "server", false)?;
        let reread = || self.translate().map(|translated| translated.config);
        let extension = Some(Box::new(ServerExtension::default()) as _);
        let served = cpc_server::run(config, log, start, &reread, extension);
        crate::cli::common::finish(crate::cli::runtime()?.block_on(served)?)
    }

    fn check_files(&self) -> Result<(), ConfigError> {
        common::exist(&[
            ("--server-cert", &self.frontend.server_cert),
            ("--server-key", &self.frontend.server_key),
            ("--server-ca-cert", &self.frontend.server_ca_cert),
            ("--cluster-cert", &self.agents.cluster_cert),
            ("--cluster-key", &self.agents.cluster_key),
            ("--cluster-ca-cert", &self.agents.cluster_ca_cert),
            ("--kubeconfig", &self.agents.kubeconfig),
        ])
    }

    fn translate(&self) -> Result<Translated<ServerConfig>, ConfigError> {
        let mut notes = Vec::new();
        let mut config = ServerConfig::load(self.base.file())?;
        self.lay_over(&mut config, &mut notes)?;
        self.base.apply_log(&mut config.log);
        notes.extend(self.base.unused_note(self.unused.given()));
        config
            .check()
            .map_err(|error| error.within(self.base.file()))?;
        Ok(Translated { config, notes })
    }
}
