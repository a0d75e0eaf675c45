//! Endpoints of servers, and the verdicts about fresh tunnels.

use std::net::SocketAddr;
use std::sync::Arc;

use tunnel_proto::session::InstanceId;

use cpc_config::TunnelKind;

/// Address and protocol of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerEndpoint {
    /// Address of the server.
    pub address: SocketAddr,
    /// Protocol of the tunnel.
    pub kind: TunnelKind,
}

/// Server of a fresh tunnel.
#[derive(Clone, Debug)]
pub struct ServerInfo {
    /// Id of the server.
    pub server: Arc<str>,
    /// Process of the server, where the protocol tells.
    pub instance: Option<InstanceId>,
    /// Number of servers, as this one reports.
    pub server_count: u32,
}

/// State of a tunnel's server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// The server is heard, and stays.
    Live,
    /// The server is heard, and drains. Until its end it sends connections, so that another tunnel to
    /// the same process is of no use; its successor at the same address comes when it has left.
    Draining,
    /// The server has not been heard for too long.
    Silent,
}

/// Decision about a fresh tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The tunnel is served.
    Keep,
    /// Another live tunnel leads to that server.
    Decline,
    /// Another process of that id is live at this address: two servers have one id. The older tunnel
    /// stays, or each server would end the other's connections.
    Conflict(SocketAddr),
}
