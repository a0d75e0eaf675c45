//! Agents of Konnectivity: `AgentService` over TLS, on a TCP port of its own.
//!
//! ```text
//! accept -> TLS -> HTTP/2 -> call -> who is it? -> headers -> session -> registered
//! ```
//!
//! [`Agents`] takes them in by the [`Acceptor`]; [`who`] says who they are; [`session`] drives the machine of
//! one stream ([`ServerEnd`]) and shows it to the server; [`KonnectivityLink`](link::KonnectivityLink) is what
//! dials use of it.
//!
//! An agent closes a stream to a server that it has a stream to already, which it knows by the
//! server's id. So several ids are presented ([`server_ids`]): connections on different streams
//! can't hold each other up. What comes of it is no agent before it has answered once, so that a
//! stream which the agent is about to close is never dialled on.
//!
//! What is lost of a connection that its client closes stands with [`ServerEnd`]'s description; all
//! else is as with an agent of ours: an agent that is not heard is left out, and its streams end
//! when TCP or the machine gives it up.
//!
//! [`ServerEnd`]: tunnel_proto::konnectivity::server_end

mod accept;
mod acceptor;
mod link;
mod path;
mod peer;
mod server_ids;
mod session;
mod stream;
mod tls;
mod who;

use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;

use self::accept::Agents;
use self::acceptor::Acceptor;
use self::tls::AgentTls;
use crate::metrics::ProxyServerMetrics;
use cpc_config::ServerConfig;
use cpc_config::konnectivity::KonnectivityConfig;
use cpc_identity::TrustDomain;
use cpc_identity::lifetime::Certificates;
use cpc_identity::revoked::Revocations;
use cpc_server::ServerError;
use cpc_server::extension::{
    AgentListener, AgentProtocol, AgentServer, BoundAgents, HandshakeLimiter, ShardHandle, Sockets,
};

/// The listener of agents, before anything is served.
pub(super) struct Bound {
    config: KonnectivityConfig,
    listener: TcpListener,
    tenant: TrustDomain,
    tls: AgentTls,
    metrics: ProxyServerMetrics,
}

impl Bound {
    /// Opens the listener, where one is configured.
    ///
    /// # Errors
    /// [`ServerError`] naming the socket or the file.
    pub(super) fn open(
        server: &ServerConfig,
        own: &TrustDomain,
        revocations: &Arc<Revocations>,
        sockets: &mut Sockets<'_>,
        metrics: &ProxyServerMetrics,
    ) -> Result<Option<Self>, ServerError> {
        let Some(config) = &server.konnectivity else {
            return Ok(None);
        };
        let listener = sockets.tcp(config.listen)?;
        let tenant = config.tenant.as_ref().unwrap_or(own).clone();
        let own = (server.tls.cert.as_deref(), server.tls.key.as_deref());
        let tls = AgentTls::load(config, own, tenant.clone(), revocations.clone())?;
        Ok(Some(Self {
            config: config.clone(),
            listener,
            tenant,
            tls,
            metrics: metrics.clone(),
        }))
    }
}

impl BoundAgents for Bound {
    fn certificates(&self) -> Arc<dyn Certificates> {
        Arc::new(self.tls.clone())
    }

    fn start(
        self: Box<Self>,
        server_id: &str,
        handshakes: HandshakeLimiter,
    ) -> LocalBoxFuture<'_, Result<AgentListener, ServerError>> {
        Box::pin(async move {
            let Self {
                config,
                listener,
                tenant,
                tls,
                metrics,
            } = *self;
            tokio::spawn(tls.clone().watch());
            let acceptor =
                Acceptor::new(&config, server_id, tls, tenant, handshakes, metrics).await?;
            let protocol = Arc::new(AgentService(acceptor));
            Ok(AgentListener { listener, protocol })
        })
    }
}

/// `AgentService`, on all shards.
struct AgentService(Acceptor);

impl AgentProtocol for AgentService {
    fn on_shard(&self, shard: ShardHandle) -> Rc<dyn AgentServer> {
        Rc::new(Agents::new(shard, self.0.clone()))
    }
}
