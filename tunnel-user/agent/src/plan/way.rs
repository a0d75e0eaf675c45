//! Ways to servers, where they lead, and what becomes of a tunnel.

use std::net::SocketAddr;
use std::sync::Arc;

use tunnel_proto::session::InstanceId;

/// What a tunnel speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Wire {
    /// Ours, over UDP.
    Quic,
    /// Konnectivity's, over TCP.
    Grpc,
}

impl Wire {
    /// For people: what the configuration calls it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Grpc => "konnectivity",
        }
    }
}

/// One way to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Way {
    /// Where.
    pub address: SocketAddr,
    /// Over what.
    pub wire: Wire,
}

/// Where a fresh tunnel leads.
#[derive(Clone, Debug)]
pub struct Leads {
    /// The server's id.
    pub server: Arc<str>,
    /// Its process, where the protocol tells.
    pub instance: Option<InstanceId>,
    /// How many servers there are, as it says.
    pub server_count: u32,
}

/// What is known of a tunnel's server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It is heard, and stays.
    Live,
    /// It is heard, and is about to leave. Until then it sends connections, so that another tunnel to the
    /// same process is of no use; its successor at the same address comes when it has left.
    Draining,
    /// It has not been heard for too long.
    Silent,
}

/// What to do with a fresh tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Serve it.
    Keep,
    /// There is a live one to that server.
    Decline,
    /// Another process of that name is live at this address: two servers have one id. It is left
    /// alone, or each of them would end the other's connections.
    Conflict(SocketAddr),
}
