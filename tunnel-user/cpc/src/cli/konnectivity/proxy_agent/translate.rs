//! Translation of the flags of proxy-agent to the configuration of our agent.
//!
//! Flags and their defaults decide every setting that has a flag. All other settings come from the file.

use std::ops::RangeInclusive;
use std::time::Duration;

use tunnel_proto::konnectivity::Identifiers;

use super::Args;
use crate::cli::konnectivity::common::{keepalive, listen, non_empty, pair, path, port, wrong};
use cpc_config::agent::ServerAddress;
use cpc_config::allow_list;
use cpc_config::konnectivity::{CountSource, LeaseConfig, ProxyServerConfig};
use cpc_config::labels::Selector;
use cpc_config::{AgentConfig, ConfigError};

const PORTS: RangeInclusive<u16> = 1..=u16::MAX;

/// Fixed interval of dials to a missing proxy-server, at first.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

/// Fixed maximum interval after failures.
const SYNC_INTERVAL_CAP: Duration = Duration::from_secs(10);

impl Args {
    pub(super) fn lay_over(
        &self,
        config: &mut AgentConfig,
        notes: &mut Vec<String>,
    ) -> Result<(), ConfigError> {
        config.servers.insert(0, self.server()?);
        let kept = config.konnectivity.take().unwrap_or_default();
        config.konnectivity = Some(self.konnectivity(kept, notes)?);
        if !self.own.cpc_allow.is_empty() {
            config.allow = Some(self.own.cpc_allow.clone());
        } else if config.allow.is_none() {
            config.allow = Some(allow_list::everything());
            notes.push(
                "the agent dials every requested destination, including loopback and metadata services of clouds, as Konnectivity does; --cpc-allow restricts that"
                    .into(),
            );
        }
        config.limits.drain = None;
        self.pages(config)
    }

    fn server(&self) -> Result<ServerAddress, ConfigError> {
        let port = port("--proxy-server-port", self.server.proxy_server_port, PORTS)?;
        let host = self.server.proxy_server_host.as_str();
        if host.is_empty() {
            return Err(wrong("--proxy-server-host", "must not be empty"));
        }
        let address = if host.contains(':') && !host.starts_with('[') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        Ok(ServerAddress {
            address,
            protocol: Some(self.own.cpc_protocol),
        })
    }

    fn konnectivity(
        &self,
        kept: ProxyServerConfig,
        notes: &mut Vec<String>,
    ) -> Result<ProxyServerConfig, ConfigError> {
        let ca = path(&self.server.ca_cert);
        let ca = ca.ok_or_else(|| wrong("--ca-cert", "is needed: it vouches for proxy-servers"))?;
        let (cert, key) = pair(
            ("--agent-cert", &self.agent.agent_cert),
            ("--agent-key", &self.agent.agent_key),
        )?
        .unzip();
        let identifiers = &self.agent.agent_identifiers;
        let (_, unused) = Identifiers::parse_strict(identifiers)
            .map_err(|error| wrong("--agent-identifiers", error.to_string()))?;
        notes.extend(
            unused
                .iter()
                .map(|error| format!("--agent-identifiers: {error}")),
        );
        let agent_id = non_empty(&self.agent.agent_id).map(str::to_owned);
        let agent_id = agent_id.or(kept.agent_id.clone());
        let alpn = self.server.alpn_proto.iter();
        Ok(ProxyServerConfig {
            ca: Some(ca),
            cert,
            key,
            token_file: path(&self.agent.service_account_token_path),
            agent_id: agent_id.or_else(|| Some(uuid::Uuid::new_v4().to_string())),
            identifiers: identifiers.clone(),
            keepalive: keepalive("--keepalive-time", self.server.keepalive_time, notes),
            alpn: alpn.filter(|name| !name.is_empty()).cloned().collect(),
            leases: self.leases()?.or(kept.leases.clone()),
            server_count: self.count_source()?,
            ..kept
        })
    }

    fn leases(&self) -> Result<Option<LeaseConfig>, ConfigError> {
        let flags = &self.counting;
        let selector = flags.lease_label_selector.parse::<Selector>();
        selector.map_err(|error| wrong("--lease-label-selector", error.to_string()))?;
        Ok(flags.count_server_leases.then(|| LeaseConfig {
            namespace: flags.lease_namespace.clone(),
            label: flags.lease_label_selector.clone(),
            kubeconfig: path(&flags.kubeconfig),
            rate: None,
        }))
    }

    fn count_source(&self) -> Result<CountSource, ConfigError> {
        match self.counting.server_count_source.as_str() {
            "" | "default" => Ok(CountSource::Leases),
            "max" => Ok(CountSource::Max),
            other => {
                let why = format!("{other:?} is neither default nor max");
                Err(wrong("--server-count-source", why))
            }
        }
    }

    fn pages(&self, config: &mut AgentConfig) -> Result<(), ConfigError> {
        let flags = &self.pages;
        let health = port("--health-server-port", flags.health_server_port, PORTS)?;
        let host = non_empty(&flags.health_server_host).unwrap_or_default();
        config.health = Some(listen("--health-server-host", host, health)?);
        let admin = port("--admin-server-port", flags.admin_server_port, PORTS)?;
        config.admin = listen("--admin-bind-address", &flags.admin_bind_address, admin)?;
        Ok(())
    }

    /// Returns notes about flags whose values differ from the fixed ones.
    pub(super) fn fixed(&self) -> Result<Vec<String>, ConfigError> {
        let flags = &self.agent;
        if flags.sync_interval > flags.sync_interval_cap {
            return Err(wrong(
                "--sync-interval",
                "must not be over --sync-interval-cap",
            ));
        }
        let fixed = [
            ("--sync-interval", flags.sync_interval != SYNC_INTERVAL),
            (
                "--sync-interval-cap",
                flags.sync_interval_cap != SYNC_INTERVAL_CAP,
            ),
        ];
        let differs = fixed.into_iter().filter(|(_, differs)| *differs);
        Ok(differs.map(|(flag, _)| flag.to_owned()).collect())
    }
}

#[cfg(test)]
mod tests;
