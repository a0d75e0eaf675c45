//! Errors of an agent's start.

use std::io;
use std::net::SocketAddr;

use super::konnectivity::ClientError;
use cpc_config::ConfigError;
use cpc_host::privileges::PrivilegeError;
use cpc_identity::material::MaterialError;
use cpc_kubernetes::AccessError;

/// Reason why an agent did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates are unusable.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// The parameters of proxy-servers are unusable.
    #[error(transparent)]
    Konnectivity(#[from] ClientError),
    /// There is no access to the API server, which has the leases.
    #[error("konnectivity.leases: {0}")]
    Leases(AccessError),
    /// The capabilities can't be dropped.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// A listener of health and metrics can't be opened.
    #[error("TCP {addr}: {why}")]
    Admin {
        /// Address of the listener.
        addr: SocketAddr,
        /// Error of the system call.
        why: io::Error,
    },
    /// A system call at start failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A shard has ended by itself.
    #[error("a shard has ended by itself; its panic is above")]
    Shard,
}

impl From<AccessError> for AgentError {
    fn from(why: AccessError) -> Self {
        Self::Leases(why)
    }
}
