//! Access to the Kubernetes API, and the rules for tokens.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Access to the Kubernetes API.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Access {
    /// A kubeconfig, whose current context is used; the pod's service account when missing.
    pub kubeconfig: Option<PathBuf>,
    /// Bound on requests; none when missing.
    pub rate: Option<Rate>,
}

/// A bound on requests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Requests a second in the long run, more than 0.
    pub per_second: f32,
    /// Requests at once, at least 1.
    pub burst: u32,
}

/// Rules that a token must satisfy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRules {
    /// Audience of the token.
    pub audience: String,
    /// The namespace of the service account that it must be of.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
}
