//! The listener of an extension's agents, from its socket to the shards.

use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;

use cpc_identity::lifetime::Certificates;
use futures_util::future::LocalBoxFuture;

use super::agent_server::AgentServer;
use super::shard::ShardHandle;
use crate::error::ServerError;
use crate::handshakes::HandshakeLimiter;

/// The listener of an extension's agents, before anything is served.
pub trait BoundAgents {
    /// Returns the certificates of the listener, for status and metrics.
    fn certificates(&self) -> Arc<dyn Certificates>;

    /// Starts what serves all shards, on the calling runtime. `handshakes` limits the listener.
    ///
    /// # Errors
    /// [`ServerError`].
    fn start(
        self: Box<Self>,
        server_id: &str,
        handshakes: HandshakeLimiter,
    ) -> LocalBoxFuture<'_, Result<AgentListener, ServerError>>;
}

/// A listener of agents that is about to accept.
pub struct AgentListener {
    /// The socket.
    pub listener: TcpListener,
    /// Protocol of the agents.
    pub protocol: Arc<dyn AgentProtocol>,
}

/// A protocol of agents, on any shard.
pub trait AgentProtocol: Send + Sync {
    /// Creates its server on a shard.
    fn on_shard(&self, shard: ShardHandle) -> Rc<dyn AgentServer>;
}
