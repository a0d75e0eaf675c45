//! The configuration of `cpc agent`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;

use super::MAX_DRAIN;
use super::rule::{self, Rule};
use super::{ConfigError, LogConfig, TlsConfig, Version, base_of};

/// Everything an agent is told.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentConfig {
    /// Version of the schema.
    pub version: Version,
    /// Servers, `host:port`. Names are resolved anew every 10 s.
    pub servers: Vec<String>,
    /// Our certificate, and whom we trust.
    pub tls: TlsConfig,
    /// What we offer to serve, beyond the node addresses in our certificate.
    pub serve: ServeConfig,
    /// What may be dialled. When it is missing: the certificate's node addresses, port 10250.
    pub allow: Option<Vec<Rule>>,
    /// Address of health, metrics and status.
    pub admin: SocketAddr,
    /// Bounds.
    pub limits: AgentLimits,
    /// Logging.
    pub log: LogConfig,
}

impl Default for AgentConfig {
    fn default() -> Self {
        Self {
            version: Version,
            servers: Vec::new(),
            tls: TlsConfig::default(),
            serve: ServeConfig::default(),
            allow: None,
            admin: SocketAddr::from((Ipv4Addr::LOCALHOST, 8136)),
            limits: AgentLimits::default(),
            log: LogConfig::default(),
        }
    }
}

/// `serve`: what is offered. The server cuts it to what it grants.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServeConfig {
    /// Address ranges; a single address may stand without its prefix length.
    #[serde(deserialize_with = "rule::nets")]
    pub cidrs: Vec<IpNet>,
    /// DNS names, `*.suffix` among them.
    pub names: Vec<String>,
    /// Everything that nobody else serves.
    pub default_route: bool,
}

/// `limits` of an agent.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AgentLimits {
    /// How long a stopping agent waits for connections to end.
    #[serde(with = "humantime_serde")]
    pub drain: Duration,
    /// Connections at once.
    pub connections: usize,
    /// Bytes that stopped targets may hold before new dials are refused.
    pub stalled_bytes: u64,
}

impl Default for AgentLimits {
    fn default() -> Self {
        Self {
            drain: Duration::from_secs(30),
            connections: 10_000,
            stalled_bytes: 1 << 30,
        }
    }
}

impl AgentConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config: Self = super::load(path)?;
        config.tls.resolve(&base_of(path));
        Ok(config)
    }

    /// Checks what serde can't.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.limits.drain > MAX_DRAIN {
            return Err(ConfigError::Value {
                key: "limits.drain",
                why: "must be at most 24 h".into(),
            });
        }
        if self.servers.is_empty() {
            return Err(ConfigError::Value {
                key: "servers",
                why: "is empty: name at least one, such as cp.example.org:8132".into(),
            });
        }
        for server in &self.servers {
            if super::address::split(server).is_none() {
                return Err(ConfigError::Value {
                    key: "servers",
                    why: format!("{server:?} is not host:port"),
                });
            }
        }
        Ok(())
    }
}
