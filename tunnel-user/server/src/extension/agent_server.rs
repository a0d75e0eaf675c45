//! The server of an extension's agents, on one shard.

use std::net::SocketAddr;
use std::rc::Rc;

use cpc_host::source_limiter::HandshakePermit;
use futures_util::future::LocalBoxFuture;
use tokio::net::{TcpListener, TcpStream};

/// Serves agents on one shard.
pub trait AgentServer {
    /// Accepts without end, and [deals](super::ShardHandle::deal_agent) connections to all shards.
    fn accept(self: Rc<Self>, listener: TcpListener) -> LocalBoxFuture<'static, ()>;

    /// Serves a connection that any shard has accepted, as a task of its own.
    fn take(self: Rc<Self>, socket: TcpStream, remote: SocketAddr, permit: HandshakePermit);

    /// Ends the connections whose links have ended, and waits until all have.
    fn leave(self: Rc<Self>) -> LocalBoxFuture<'static, ()>;
}
