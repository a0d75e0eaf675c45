//! How the Kubernetes API is reached, and what is asked of it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How the API is reached.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Access {
    /// A kubeconfig, of which the current context counts. As a pod when missing.
    pub kubeconfig: Option<PathBuf>,
    /// How often it may be asked; as often as needed when missing.
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

/// Which tokens are good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRules {
    /// Whom a token must be for.
    pub audience: String,
    /// The namespace of the service account that it must be of.
    pub namespace: String,
    /// The service account.
    pub service_account: String,
}
