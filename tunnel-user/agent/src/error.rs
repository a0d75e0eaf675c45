//! Errors of an agent's start.

use std::io;
use std::net::SocketAddr;

use super::tunnel::BoxError;
use cpc_config::ConfigError;
use cpc_handover::HandoverError;
use cpc_host::privileges::PrivilegeError;
use cpc_identity::material::MaterialError;

/// Reason why an agent did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates are unusable.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// The extension can't start.
    #[error(transparent)]
    Extension(BoxError),
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
    /// The running process does not hand over.
    #[error("takeover")]
    Handover(#[from] HandoverError),
    /// A shard has ended by itself.
    #[error("a shard has ended by itself; its panic is above")]
    Shard,
}
