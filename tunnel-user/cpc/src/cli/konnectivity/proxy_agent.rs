//! `cpc proxy-agent`: the flags. [`translate`] converts them to the configuration of our agent.

mod translate;

use std::time::Duration;

use super::common::{self, Base, Translated};
use super::go;
use super::unused::{Flag, Kind, Tables, Unused};
use cpc_config::agent::Protocol;
use cpc_config::{AgentConfig, AllowRule, ConfigError};
use cpc_host::privileges::ANY_START;
use cpc_konnectivity::agent::AgentExtension;

/// Run an agent with the flags of Konnectivity's proxy-agent
///
/// Replaces proxy-agent towards the same proxy-servers: flags, defaults and environment are those of
/// proxy-agent, also when the program is called by that name. The agent dials every requested
/// destination, as Konnectivity does; --cpc-allow restricts that. --cpc-config adds all other features
/// of `cpc agent`.
///
/// The first SIGTERM asks servers to prefer other agents; a second one ends the process.
#[derive(Debug, clap::Args)]
#[command(args_override_self = true)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    server: Server,
    #[command(flatten)]
    agent: Agent,
    #[command(flatten)]
    counting: Counting,
    #[command(flatten)]
    pages: HttpPorts,
    #[command(flatten)]
    own: Own,
    #[command(flatten)]
    base: Base,
    #[command(flatten)]
    unused: Unused<ProxyAgent>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Proxy-server")]
struct Server {
    /// Name or address of the proxy-servers
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    proxy_server_host: String,
    /// Port of the proxy-servers
    #[arg(long, default_value = "8091", value_parser = go::integer, value_name = "PORT")]
    proxy_server_port: i64,
    /// PEM roots that vouch for the proxy-servers; required
    #[arg(long, value_name = "FILE")]
    ca_cert: Option<String>,
    /// Names offered in ALPN beside h2, joined by commas or repeated
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    alpn_proto: Vec<String>,
    /// Interval of pings to an idle proxy-server, at least 30s
    #[arg(long, default_value = "1h0m0s", value_parser = go::duration, value_name = "DURATION")]
    keepalive_time: Duration,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Agent")]
struct Agent {
    /// PEM certificate chain of the agent, if proxy-servers request one
    #[arg(long, value_name = "FILE")]
    agent_cert: Option<String>,
    /// PEM private key of the certificate
    #[arg(long, value_name = "FILE")]
    agent_key: Option<String>,
    /// File of a service account's token, read for each connection
    #[arg(long, value_name = "FILE")]
    service_account_token_path: Option<String>,
    /// Name of the agent, random when empty
    #[arg(long, env = "PROXY_AGENT_ID", value_name = "NAME")]
    agent_id: Option<String>,
    /// Served destinations: ipv4, ipv6, host, cidr and default-route, as in ipv4=10.0.0.1&host=w1
    #[arg(
        long,
        default_value = "",
        hide_default_value = true,
        value_name = "QUERY"
    )]
    agent_identifiers: String,
    /// Interval of dials while proxy-servers are missing. Only 1s is supported; other values are
    /// ignored
    #[arg(long, default_value = "1s", value_parser = go::duration, value_name = "DURATION")]
    sync_interval: Duration,
    /// Maximum interval between attempts. Only 10s is supported; other values are ignored
    #[arg(long, default_value = "10s", value_parser = go::duration, value_name = "DURATION")]
    sync_interval_cap: Duration,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Counting proxy-servers")]
struct Counting {
    /// Count proxy-servers by their leases instead of their reports
    #[arg(
        long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "false", value_parser = go::boolean, value_name = "BOOL"
    )]
    count_server_leases: bool,
    /// Namespace of the leases
    #[arg(long, default_value = "kube-system", value_name = "NAME")]
    lease_namespace: String,
    /// Label selector of the leases
    #[arg(
        long,
        alias = "lease-label",
        default_value = "k8s-app=konnectivity-server",
        value_name = "SELECTOR"
    )]
    lease_label_selector: String,
    /// default: leases alone, where they count; max: the larger number of leases and of the
    /// proxy-servers' reports
    #[arg(long, default_value = "default", value_name = "SOURCE")]
    server_count_source: String,
    /// Kubeconfig for the API server; the pod's service account when empty
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<String>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Health and metrics")]
struct HttpPorts {
    /// Port of /healthz, /readyz, /ready and /metrics
    #[arg(long, default_value = "8093", value_parser = go::integer, value_name = "PORT")]
    health_server_port: i64,
    /// Address of that port; all addresses when empty
    #[arg(long, value_name = "ADDR")]
    health_server_host: Option<String>,
    /// Port of metrics, status and log filter
    #[arg(long, default_value = "8094", value_parser = go::integer, value_name = "PORT")]
    admin_server_port: i64,
    /// Address of that port, which has no access control; all addresses when empty
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDR")]
    admin_bind_address: String,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Beyond Konnectivity")]
struct Own {
    /// Destination that the agent may dial, such as 10.99.1.2:10250 or 10.244.1.0/24; may be repeated
    /// [default: all]
    #[arg(long, value_name = "CIDR[:PORTS]")]
    cpc_allow: Vec<AllowRule>,
    /// Protocol towards --proxy-server-host; auto prefers QUIC, which needs certificates in
    /// --cpc-config
    #[arg(long, value_enum, default_value = "konnectivity")]
    cpc_protocol: Protocol,
}

#[derive(Debug)]
struct ProxyAgent;

impl Tables for ProxyAgent {
    const OWN: &'static [Flag] = &[
        (
            "probe-interval",
            Kind::Duration,
            "Interval of checks of connections",
        ),
        (
            "sync-forever",
            Kind::Switch,
            "Keep looking for servers; always on here",
        ),
    ];
}

impl Args {
    pub(in crate::cli) fn run(self) -> anyhow::Result<()> {
        self.check_files()?;
        let Translated { config, notes } = self.translate()?;
        let log = crate::cli::common::begin(ANY_START, &config.log, &config.audit)?;
        for note in notes {
            tracing::warn!("{note}");
        }
        let state_dir = config.state_dir.as_deref();
        let start = crate::cli::common::take_over(state_dir, "agent", false)?;
        let reread = || self.translate().map(|translated| translated.config);
        let ran = cpc_agent::run(config, log, start, AgentExtension::extend, &reread);
        crate::cli::common::finish(crate::cli::runtime()?.block_on(ran)?)
    }

    fn check_files(&self) -> Result<(), ConfigError> {
        common::exist(&[
            ("--ca-cert", &self.server.ca_cert),
            ("--agent-cert", &self.agent.agent_cert),
            ("--agent-key", &self.agent.agent_key),
            (
                "--service-account-token-path",
                &self.agent.service_account_token_path,
            ),
            ("--kubeconfig", &self.counting.kubeconfig),
        ])
    }

    fn translate(&self) -> Result<Translated<AgentConfig>, ConfigError> {
        let mut notes = Vec::new();
        let mut config = AgentConfig::load(self.base.file())?;
        self.lay_over(&mut config, &mut notes)?;
        self.base.apply_log(&mut config.log);
        let in_vain = [self.fixed()?, self.unused.given()].concat();
        notes.extend(self.base.unused_note(in_vain));
        config
            .check()
            .map_err(|error| error.within(self.base.file()))?;
        Ok(Translated { config, notes })
    }
}
