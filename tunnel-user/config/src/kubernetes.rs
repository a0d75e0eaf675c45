//! Access to the Kubernetes API, and the rules for tokens.
//!
//! The sections of a file repeat their common keys (`namespace`, `kubeconfig` and others): with serde's
//! `flatten` the error about an unknown key would lose its line and the list of known keys.

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
    /// Namespace of the service account.
    pub namespace: String,
    /// Name of the service account.
    pub service_account: String,
}
