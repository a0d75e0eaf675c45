//! A tunnel as status, log and connector know it.

use std::fmt;
use std::sync::Arc;

use tunnel_proto::close::CloseReason;

use super::plan::ServerEndpoint;
use super::stats::TunnelStats;

/// Description of a tunnel.
#[derive(Clone, Debug)]
pub struct TunnelInfo {
    /// Server of the tunnel.
    pub server_id: Arc<str>,
    /// Address and protocol.
    pub endpoint: ServerEndpoint,
    /// Statistics of the tunnel.
    pub stats: Arc<TunnelStats>,
}

/// End of a tunnel.
#[derive(Debug)]
pub struct TunnelEnd {
    /// Reason of the closed set.
    pub reason: CloseReason,
    /// Text for people.
    pub why: String,
}

impl TunnelEnd {
    /// Creates an end with its text.
    pub fn new(reason: CloseReason, why: impl fmt::Display) -> Self {
        let why = why.to_string();
        Self { reason, why }
    }
}
