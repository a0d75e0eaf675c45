//! Extensions of a server: protocols of other systems, for agents and for clients, each in a crate above
//! this one. A server has one or none; none of its code names it.
//!
//! ```text
//! cpc -> extension crate -> this crate
//!   '------- run(.., extension) --^
//! ```
//!
//! An extension takes part in the stages of a start: metrics are registered, sockets are bound
//! ([`Extension::bind_agents`]), listeners start on the shards ([`BoundAgents::start`]). Then it serves
//! agents on each shard ([`AgentServer`]), which show themselves to dials as [`AgentLink`], and clients of
//! `frontends.grpc` ([`ClientProtocol`]). A [`ShardHandle`] is all that it has of the server.

mod client;
mod observer;
mod shard;

pub use client::{ClientConnection, ClientRequest};
pub use observer::Observer;
pub use shard::ShardHandle;

pub use crate::dial::{AgentAnswer, DialError};
pub use crate::frontend::Scope;
pub use crate::frontend::refusals::{Refusals, status};
pub use crate::handshakes::{HandshakeFailure, HandshakeLimiter};
pub use crate::link::{AgentLink, Answer, Answered, LinkRecv, LinkSend};
pub use crate::permits::{ConnectionPermit, TunnelPermit};

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;

use cpc_config::ServerConfig;
use cpc_config::server::LimitsConfig;
use cpc_config::tls_floor::TlsFloor;
use cpc_host::inherited::Inherited;
use cpc_host::lifecycle::Phase;
use cpc_host::source_limiter::HandshakePermit;
use cpc_identity::TrustDomain;
use cpc_identity::lifetime::Certificates;
use cpc_identity::revoked::Revocations;
use cpc_observe::admin::{Admin, Pages};
use futures_util::future::LocalBoxFuture;
use prometheus_client::registry::Registry;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::server::TlsStream;

use crate::bind::listen;
use crate::error::ServerError;

/// A protocol of another system. Its methods are called in this order, once each.
pub trait Extension {
    /// Registers the metrics that `config` asks for; `registry` has no prefix.
    fn register(&self, registry: &mut Registry, config: &ServerConfig);

    /// Returns the observer of dials and connections, where `config` asks for one.
    fn observer(&self, config: &ServerConfig) -> Option<Arc<dyn Observer>>;

    /// Returns the protocol of `frontends.grpc`.
    fn clients(&self, limits: &LimitsConfig) -> Arc<dyn ClientProtocol>;

    /// Returns the refusals of HTTP CONNECT with `answers: konnectivity`.
    fn refusals(&self) -> &'static dyn Refusals;

    /// Opens the listener of agents, where `config` asks for one.
    ///
    /// # Errors
    /// [`ServerError`] naming the socket or the file.
    fn bind_agents(
        &self,
        config: &ServerConfig,
        own: &TrustDomain,
        revocations: &Arc<Revocations>,
        sockets: &mut Sockets<'_>,
    ) -> Result<Option<Box<dyn BoundAgents>>, ServerError>;

    /// Holds the leases that `config` asks for, until the process drains. The task ends some seconds after
    /// that.
    ///
    /// # Errors
    /// [`ServerError`] when there is no access to the API server.
    fn hold_leases<'a>(
        &'a self,
        config: &'a ServerConfig,
        server_id: &'a str,
        phase: watch::Receiver<Phase>,
    ) -> LocalBoxFuture<'a, Result<Option<JoinHandle<()>>, ServerError>>;

    /// Returns the pages of the listener `health`.
    fn probes(&self, admin: Admin) -> Pages;
}

/// Sockets from the service manager, or opened where there are none.
#[derive(Debug)]
pub struct Sockets<'a>(pub(crate) &'a mut Inherited);

impl Sockets<'_> {
    /// Opens a TCP listener.
    ///
    /// # Errors
    /// [`ServerError::Socket`].
    pub fn tcp(&mut self, addr: SocketAddr) -> Result<TcpListener, ServerError> {
        listen(self.0, addr)
    }
}

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

/// Serves agents on one shard.
pub trait AgentServer {
    /// Accepts without end, and [deals](ShardHandle::deal_agent) connections to all shards.
    fn accept(self: Rc<Self>, listener: tokio::net::TcpListener) -> LocalBoxFuture<'static, ()>;

    /// Serves a connection that any shard has accepted, as a task of its own.
    fn take(self: Rc<Self>, socket: TcpStream, remote: SocketAddr, permit: HandshakePermit);

    /// Ends the connections whose links have ended, and waits until all have.
    fn leave(self: Rc<Self>) -> LocalBoxFuture<'static, ()>;
}

/// A protocol of clients that share a connection.
pub trait ClientProtocol: Send + Sync + fmt::Debug {
    /// Returns the name in the configuration and in logs.
    fn name(&self) -> &'static str;

    /// Returns the protocols of ALPN.
    fn alpn(&self) -> Vec<Vec<u8>>;

    /// Returns the default TLS floor.
    fn floor(&self) -> TlsFloor;

    /// Prepares a listener, whose accepted sockets inherit its options.
    ///
    /// # Errors
    /// The error of the system call.
    fn prepare(&self, listener: &TcpListener) -> io::Result<()>;

    /// Serves a connection on a Unix socket to its end.
    fn serve_unix(
        self: Arc<Self>,
        shard: ShardHandle,
        scope: Arc<Scope>,
        socket: UnixStream,
    ) -> LocalBoxFuture<'static, ()>;

    /// Serves a connection with TLS to its end.
    fn serve_tls(
        self: Arc<Self>,
        shard: ShardHandle,
        scope: Arc<Scope>,
        client: SocketAddr,
        session: TlsStream<TcpStream>,
    ) -> LocalBoxFuture<'static, ()>;
}
