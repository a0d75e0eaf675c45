//! `join`: certificates for workers that have none.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::kubernetes::{Access, TokenRules};
use super::{ConfigError, rule};
use cpc_host::listen::everywhere;

/// TCP port of the join listener.
pub const JOIN_PORT: u16 = 8138;

/// An agent renews at two thirds, and is to have time to try again.
const SHORTEST: Duration = Duration::from_secs(600);

/// Longer than that no CA should be.
const LONGEST: Duration = Duration::from_secs(3650 * 24 * 3600);

/// `join`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JoinConfig {
    /// TCP address of the join listener.
    pub listen: SocketAddr,
    /// Directory of the CA that issues: `ca.crt` and `ca.key`, as `cpc pki init` makes them.
    pub ca: PathBuf,
    /// Validity of an issued certificate.
    #[serde(with = "humantime_serde")]
    pub validity: Duration,
    /// Pods may join with their service account's token.
    #[serde(
        deserialize_with = "super::optional_section",
        skip_serializing_if = "Option::is_none"
    )]
    pub kubernetes: Option<PodsConfig>,
}

impl Default for JoinConfig {
    fn default() -> Self {
        Self {
            listen: everywhere(JOIN_PORT),
            ca: PathBuf::new(),
            validity: Duration::from_secs(30 * 24 * 3600),
            kubernetes: None,
        }
    }
}

/// `join.kubernetes`: the tokens that admit pods, and the addresses of their nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PodsConfig {
    /// Audience of the tokens.
    pub audience: String,
    /// Namespace of the service account.
    pub namespace: String,
    /// Name of the service account.
    pub service_account: String,
    /// Kubeconfig for the API server that reviews tokens; the pod's service account when missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
    /// Ranges of node addresses.
    #[serde(deserialize_with = "rule::nets")]
    pub addresses: Vec<IpNet>,
}

impl Default for PodsConfig {
    fn default() -> Self {
        Self {
            audience: "cpc-join".into(),
            namespace: "cpc-system".into(),
            service_account: "cpc-agent".into(),
            kubeconfig: None,
            addresses: Vec::new(),
        }
    }
}

impl PodsConfig {
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
            rate: None,
        }
    }
}

impl JoinConfig {
    /// Makes paths absolute.
    pub(super) fn resolve(&mut self, base: &Path) {
        // What is missing stays missing, for the check.
        if !self.ca.as_os_str().is_empty() {
            self.ca = base.join(&self.ca);
        }
        if let Some(kubernetes) = &mut self.kubernetes {
            kubernetes.kubeconfig = kubernetes.kubeconfig.as_ref().map(|it| base.join(it));
        }
    }

    /// Checks that the needed keys are there.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let value = |key: &'static str, why: &str| Err(ConfigError::value(key, why));
        if self.ca.as_os_str().is_empty() {
            return value(
                "join.ca",
                "is needed: the directory with ca.crt and ca.key of the CA that issues",
            );
        }
        if let Some(kubernetes) = &self.kubernetes
            && kubernetes.addresses.is_empty()
        {
            return value(
                "join.kubernetes.addresses",
                "are needed: the ranges that node addresses are in",
            );
        }
        if !(SHORTEST..=LONGEST).contains(&self.validity) {
            return value("join.validity", "must be 10min to 3650days");
        }
        Ok(())
    }
}
