//! A shard, as an extension uses it.

use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::watch;
use tunnel_proto::preface::Destination;
use tunnel_proto::route::Claim;
use tunnel_proto::session::InstanceId;

use super::request::ClientRequest;
use crate::dial::error::DialError;
use crate::frontend::scope::Scope;
use crate::link::{AgentLink, Link, registration};
use crate::permits::TunnelPermit;
use crate::registry::Verdict;
use crate::routes::{LinkInfo, Trust};
use crate::shard::Shard;
use cpc_config::TunnelKind;
use cpc_datapath::Budget;
use cpc_host::lifecycle::Phase;
use cpc_host::source_limiter::HandshakePermit;
use cpc_identity::revoked::Revocations;
use cpc_identity::{Identity, TrustDomain};
use cpc_observe::metrics::FrontendKind;
use cpc_transport::tunnel::Probe;

/// A shard. Clones are handles of the same one.
#[derive(Clone)]
pub struct ShardHandle(Rc<Shard>);

impl ShardHandle {
    pub(crate) fn new(shard: &Rc<Shard>) -> Self {
        Self(shard.clone())
    }

    /// Returns the phase of this process.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.0.phase.clone()
    }

    /// Returns the number of servers, as configured.
    pub fn server_count(&self) -> u32 {
        self.0.server_count
    }

    /// Returns the revoked peers.
    pub fn revocations(&self) -> &Arc<Revocations> {
        &self.0.revocations
    }

    /// Returns the bound on the memory that is held for a tenant's peers.
    pub fn budget(&self, tenant: &TrustDomain) -> &Budget {
        &self.0.tenants.of(tenant).budget
    }

    /// Gives a new connection of an agent to the next shard in turn: its links will live there.
    pub fn deal_agent(&self, socket: TcpStream, remote: SocketAddr, permit: HandshakePermit) {
        let Ok(socket) = socket.into_std() else {
            return;
        };
        self.0.run_on(self.0.turn(), move |shard| async move {
            let agents = shard.agents.get().and_then(Weak::upgrade);
            if let (Some(agents), Ok(socket)) = (agents, TcpStream::from_std(socket)) {
                agents.take(socket, remote, permit);
            }
        });
    }

    /// Counts an agent of `tenant`.
    ///
    /// # Errors
    /// The text of the limit that refuses.
    pub fn admit_agent(&self, tenant: &TrustDomain) -> Result<TunnelPermit, String> {
        let admitted = self.0.admit_tunnel(tenant);
        admitted.map_err(|limit| limit.text(&self.0.limits))
    }

    /// Creates the state of a fresh link on this shard.
    pub fn new_link(
        &self,
        kind: TunnelKind,
        (identity, trust): (Identity, Trust),
        probe: Probe,
    ) -> Arc<LinkInfo> {
        let place = (self.0.next_link(), self.0.index);
        LinkInfo::new(place, kind, (identity, trust), probe)
    }

    /// Registers a link of process `instance`. Dials may come before this returns. Returns `None` if the
    /// process is ending.
    pub async fn register(
        &self,
        info: &Arc<LinkInfo>,
        link: Rc<dyn AgentLink>,
        instance: InstanceId,
        offer: Vec<Claim>,
    ) -> Option<Verdict> {
        let process = (instance, None);
        registration::register(&self.0, info, Link::Foreign(link), process, offer).await
    }

    /// Removes a link.
    pub async fn unregister(&self, info: &LinkInfo) {
        registration::unregister(&self.0, info).await;
    }

    /// Notes whether the agent has fallen silent; [`changed`](Self::changed) makes it count for routes.
    pub fn set_silent(&self, info: &LinkInfo, silent: bool) {
        registration::set_silent(info, silent);
    }

    /// Notes that the agent drains; [`changed`](Self::changed) makes it count for routes. Returns whether
    /// that is new: an agent may report it repeatedly.
    pub fn set_draining(&self, info: &LinkInfo) -> bool {
        registration::set_draining(info, None)
    }

    /// Has a registered link checked whose agent has fallen silent, is heard again, or drains.
    pub async fn changed(&self, info: &LinkInfo) {
        self.0.control.changed(info.id).await;
    }

    /// Admits a request of a client at a frontend with `scope`.
    ///
    /// # Errors
    /// [`DialError`]; the client has been sent nothing.
    pub fn admit_client(
        &self,
        scope: &Scope,
        frontend: FrontendKind,
        destination: Destination,
        client: Option<SocketAddr>,
    ) -> Result<ClientRequest, DialError> {
        ClientRequest::new(&self.0, scope, frontend, destination, client)
    }
}
