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

pub(crate) mod agent_server;
mod agents;
pub(crate) mod clients;
pub(crate) mod observer;
mod request;
pub(crate) mod shard;
mod sockets;

pub use agent_server::AgentServer;
pub use agents::{AgentListener, AgentProtocol, BoundAgents};
pub use clients::ClientProtocol;
pub use observer::Observer;
pub use request::{ClientConnection, ClientRequest};
pub use shard::ShardHandle;
pub use sockets::Sockets;

pub use crate::dial::error::{AgentAnswer, DialError};
pub use crate::frontend::refusals::{Refusals, status};
pub use crate::frontend::scope::Scope;
pub use crate::handshakes::{HandshakeFailure, HandshakeLimiter};
pub use crate::link::{AgentLink, Answer, Answered, LinkRecv, LinkSend};
pub use crate::permits::{ConnectionPermit, TunnelPermit};

use std::sync::Arc;

use cpc_config::ServerConfig;
use cpc_config::server::LimitsConfig;
use cpc_host::lifecycle::Phase;
use cpc_identity::TrustDomain;
use cpc_identity::revoked::Revocations;
use cpc_observe::admin::{Admin, Pages};
use futures_util::future::LocalBoxFuture;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::error::ServerError;

/// A protocol of another system. Its methods are called during a start, [`register`](Self::register) first.
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
