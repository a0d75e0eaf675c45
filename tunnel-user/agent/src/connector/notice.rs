//! Log lines of the connector.

use std::sync::Arc;

use crate::plan::ServerEndpoint;
use crate::tunnel_info::TunnelEnd;

/// A log line.
#[derive(Debug)]
pub(super) enum Notice {
    /// A server's name is not resolved.
    Unresolved {
        /// The name, "host:port".
        server: Arc<str>,
        /// Error of the resolver.
        error: String,
    },
    /// A server is not reached.
    NotReached {
        /// Address and protocol.
        endpoint: ServerEndpoint,
        /// Error of the dial.
        error: String,
        /// Whether a kept tunnel leads to the address.
        is_reached: bool,
    },
    /// A native tunnel supersedes a foreign one.
    Superseded {
        /// Id of the server.
        server: Arc<str>,
        /// Address and protocol of the foreign tunnel.
        endpoint: ServerEndpoint,
    },
    /// A kept tunnel has ended.
    Ended {
        /// Id of the server.
        server: Arc<str>,
        /// Address and protocol.
        endpoint: ServerEndpoint,
        /// The end.
        end: TunnelEnd,
        /// Whether the agent meant it to end.
        is_intended: bool,
    },
}

impl Notice {
    /// Writes the line.
    pub(super) fn write(&self) {
        match self {
            Self::Unresolved { server, error } => {
                tracing::warn!(%server, error, "name not resolved, retrying");
            }
            Self::NotReached {
                endpoint: ServerEndpoint { address, kind },
                error,
                is_reached,
            } => {
                let protocol = kind.label();
                if *is_reached {
                    tracing::info!(%address, protocol, error, "server not reached this way, retrying");
                } else {
                    tracing::warn!(%address, protocol, error, "server not reached, retrying");
                }
            }
            Self::Superseded {
                server,
                endpoint: ServerEndpoint { address, .. },
            } => tracing::info!(%server, %address, "QUIC takes over"),
            Self::Ended {
                server,
                endpoint: ServerEndpoint { address, kind },
                end,
                is_intended,
            } => {
                let (protocol, reason, why) = (kind.label(), end.reason.label(), &end.why);
                if *is_intended {
                    tracing::info!(%server, %address, protocol, reason, %why, "tunnel closed");
                } else {
                    tracing::warn!(%server, %address, protocol, reason, %why, "tunnel ended");
                }
            }
        }
    }
}
