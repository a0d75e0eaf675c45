//! `konnectivity`: the agents of Konnectivity that a server serves, and the proxy-servers that an
//! agent dials.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tunnel_proto::trust_domain::TrustDomain;

use super::ConfigError;
use super::kubernetes::{Access, Rate, TokenRules};
use super::labels::{LabelError, Labels, Selector};
use super::tls_floor::TlsFloor;
use cpc_host::listen::everywhere;

/// The most server ids that one server may present.
const MAX_SERVER_IDS: u32 = 8;

/// Shortest keepalive interval: gRPC servers close connections with more frequent pings (GOAWAY).
const SHORTEST_KEEPALIVE: Duration = Duration::from_secs(30);

/// `konnectivity` of a server: the agents of Konnectivity that it serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KonnectivityConfig {
    /// TCP address of `AgentService`, always with TLS.
    pub listen: SocketAddr,
    /// The tenant that its agents are; the server's own trust domain when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<TrustDomain>,
    /// PEM chain that agents check; `tls.cert` when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,
    /// PEM key of `cert`; `tls.key` when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// PEM roots that vouch for agents. The server requests a certificate only where they are set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<PathBuf>,
    /// Agents show a service account's token. Not together with `client_ca`.
    #[serde(
        deserialize_with = "super::optional_section",
        skip_serializing_if = "Option::is_none"
    )]
    pub token: Option<TokenConfig>,
    /// Trusts the identifiers that agents announce, as Konnectivity does. Otherwise an agent serves
    /// the grants of its identity.
    pub believe_identifiers: bool,
    /// Server ids that are presented, 1 to 8: an agent opens a stream to each, and connections on
    /// different streams can't stop each other.
    pub server_ids: u32,
    /// Interval of HTTP/2 pings to an idle agent, at least 30 s.
    #[serde(with = "humantime_serde")]
    pub keepalive: Duration,
    /// TLS that the listener accepts.
    #[serde(deserialize_with = "super::section")]
    pub tls_floor: TlsFloor,
}

impl Default for KonnectivityConfig {
    fn default() -> Self {
        Self {
            listen: everywhere(8091),
            tenant: None,
            cert: None,
            key: None,
            client_ca: None,
            token: None,
            believe_identifiers: false,
            server_ids: 3,
            keepalive: Duration::from_secs(3600),
            tls_floor: TlsFloor::default(),
        }
    }
}

/// `konnectivity.token`: the tokens that authenticate agents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenConfig {
    /// Audience of the tokens.
    pub audience: String,
    /// Namespace of the service account.
    pub namespace: String,
    /// Name of the service account.
    pub service_account: String,
    /// Kubeconfig for the API server that reviews tokens; the pod's service account when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
    /// Bound on requests to the API server; none when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
}

impl Default for TokenConfig {
    fn default() -> Self {
        Self {
            audience: "system:konnectivity-server".into(),
            namespace: "kube-system".into(),
            service_account: "konnectivity-agent".into(),
            kubeconfig: None,
            rate: None,
        }
    }
}

/// `leases`: the leases by which agents count servers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LeaseConfig {
    /// Namespace of the leases.
    pub namespace: String,
    /// Label of the leases: on a server `key=value`, several separated by commas; on an agent any label
    /// selector.
    pub label: String,
    /// Kubeconfig for the API server; the pod's service account when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
    /// Bound on requests to the API server; none when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
}

impl Default for LeaseConfig {
    fn default() -> Self {
        Self {
            namespace: "kube-system".into(),
            label: "k8s-app=konnectivity-server".into(),
            kubeconfig: None,
            rate: None,
        }
    }
}

impl TokenConfig {
    /// Returns the rules that a token must satisfy.
    pub fn rules(&self) -> TokenRules {
        TokenRules {
            audience: self.audience.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }

    /// Returns the access to the API server that reviews tokens.
    pub fn access(&self) -> Access {
        Access {
            kubeconfig: self.kubeconfig.clone(),
            rate: self.rate,
        }
    }
}

impl LeaseConfig {
    /// Returns the labels of a server's leases.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key.
    pub fn labels(&self) -> Result<Labels, ConfigError> {
        self.label
            .parse()
            .map_err(|e: LabelError| ConfigError::value("leases.label", e.to_string()))
    }

    /// Returns the selector by which an agent finds the leases.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key.
    pub fn selector(&self) -> Result<Selector, ConfigError> {
        self.label
            .parse()
            .map_err(|e: LabelError| ConfigError::value("konnectivity.leases.label", e.to_string()))
    }

    /// Returns the access to the API server that holds the leases.
    pub fn access(&self) -> Access {
        Access {
            kubeconfig: self.kubeconfig.clone(),
            rate: self.rate,
        }
    }

    pub(super) fn resolve(&mut self, base: &Path) {
        resolve(base, [&mut self.kubeconfig]);
    }
}

impl KonnectivityConfig {
    /// Returns the server ids that the server presents, beginning with `server_id`.
    pub fn ids(&self, server_id: &str) -> impl Iterator<Item = String> {
        (1..=self.server_ids).map(move |n| match n {
            1 => server_id.to_owned(),
            n => format!("{server_id}-{n}"),
        })
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let value = |key: &'static str, why: &str| Err(ConfigError::value(key, why));
        if !(1..=MAX_SERVER_IDS).contains(&self.server_ids) {
            return value("konnectivity.server_ids", "must be 1 to 8");
        }
        if self.keepalive < SHORTEST_KEEPALIVE {
            return value("konnectivity.keepalive", "must be at least 30 s");
        }
        if self.client_ca.is_some() && self.token.is_some() {
            return value(
                "konnectivity.token",
                "agents show a certificate (client_ca) or a token, not both",
            );
        }
        if self.client_ca.is_none() && self.token.is_none() && !self.believe_identifiers {
            return value(
                "konnectivity",
                "must name client_ca or token, which authenticate agents (believe_identifiers: true admits any agent, as Konnectivity does)",
            );
        }
        if self.cert.is_some() != self.key.is_some() {
            return value(
                "konnectivity.cert",
                "cert and key go together; leave both out to use those in `tls`",
            );
        }
        self.tls_floor.check("konnectivity.tls_floor")
    }

    pub(super) fn resolve(&mut self, base: &Path) {
        resolve(base, [&mut self.cert, &mut self.key, &mut self.client_ca]);
        if let Some(token) = &mut self.token {
            resolve(base, [&mut token.kubeconfig]);
        }
    }
}

/// `konnectivity` of an agent: how it dials proxy-servers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProxyServerConfig {
    /// PEM roots that vouch for proxy-servers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// PEM chain, for proxy-servers that request one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,
    /// PEM key of `cert`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
    /// File with a service account's token. The agent reads it for each connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// The name in the proxy-server's certificate; the host that is dialled when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
    /// Agent id that the agent announces; random when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<String>,
    /// Identifiers that the agent announces, URL-query encoded:
    /// `ipv4=10.0.0.1&host=w1&default-route=true`.
    pub identifiers: String,
    /// Interval of HTTP/2 pings to an idle server, at least 30 s.
    #[serde(with = "humantime_serde")]
    pub keepalive: Duration,
    /// Names offered in ALPN beside `h2`.
    #[serde(deserialize_with = "super::section")]
    pub alpn: Vec<String>,
    /// Leases by which the agent counts servers, in place of the latest report of a server.
    #[serde(
        deserialize_with = "super::optional_section",
        skip_serializing_if = "Option::is_none"
    )]
    pub leases: Option<LeaseConfig>,
    /// Numbers that count where leases are configured.
    pub server_count: CountSource,
}

/// Source of the number of proxy-servers, where an agent reads leases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CountSource {
    /// The number of leases alone.
    #[default]
    Leases,
    /// The larger of the number of leases and the number that proxy-servers report.
    Max,
}

impl Default for ProxyServerConfig {
    fn default() -> Self {
        Self {
            ca: None,
            cert: None,
            key: None,
            token_file: None,
            server_name: None,
            agent_id: None,
            identifiers: String::new(),
            keepalive: Duration::from_secs(3600),
            alpn: Vec::new(),
            leases: None,
            server_count: CountSource::default(),
        }
    }
}

impl ProxyServerConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let value = |key: &'static str, why: &str| Err(ConfigError::value(key, why));
        if self.ca.is_none() {
            return value(
                "konnectivity.ca",
                "is needed: it vouches for the proxy-servers",
            );
        }
        if self.cert.is_some() != self.key.is_some() {
            return value("konnectivity.cert", "cert and key go together");
        }
        if self.keepalive < SHORTEST_KEEPALIVE {
            return value(
                "konnectivity.keepalive",
                "must be at least 30 s: a proxy-server disconnects peers that ping more often",
            );
        }
        if let Some(leases) = &self.leases {
            leases.selector()?;
        }
        Ok(())
    }

    pub(super) fn resolve(&mut self, base: &Path) {
        resolve(
            base,
            [
                &mut self.ca,
                &mut self.cert,
                &mut self.key,
                &mut self.token_file,
            ],
        );
        if let Some(leases) = &mut self.leases {
            leases.resolve(base);
        }
    }
}

fn resolve<const N: usize>(base: &Path, paths: [&mut Option<PathBuf>; N]) {
    for path in paths.into_iter().flatten() {
        *path = base.join(&*path);
    }
}
