//! What every tunnel of an agent shares.

use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use tunnel_proto::close::CloseReason;
use tunnel_proto::route::Claim;
use tunnel_proto::session::InstanceId;

use super::konnectivity::Client;
use super::race::Answered;
use super::renew::Renewals;
use cpc_config::allow_list::AllowList;
use cpc_datapath::Budget;
use cpc_host::gate::{Entered, Gate};
use cpc_host::lifecycle::{self, Phase};
use cpc_identity::Material;
use cpc_observe::konnectivity::ProxyAgentMetrics;
use cpc_observe::limits::LimitMetrics;
use cpc_observe::metrics::DialMetrics;
use cpc_transport::quic::config::Setup;

/// What every tunnel of an agent shares. Each shard has a clone.
#[derive(Clone)]
pub(super) struct Worker {
    /// Our certificate, without which nothing speaks QUIC.
    pub material: Option<Arc<Material>>,
    /// What tunnels over QUIC have in common.
    pub setup: Setup,
    /// How proxy-servers are dialled.
    pub konnectivity: Option<Client>,
    /// Our name.
    pub node: Arc<str>,
    /// This process.
    pub instance: InstanceId,
    /// An earlier process that has certainly ended.
    pub predecessor: Option<InstanceId>,
    /// What we offer to serve beyond the node addresses in our certificate.
    pub serve: watch::Receiver<Vec<Claim>>,
    /// What asks for another certificate.
    pub renewals: Renewals,
    /// What may be dialled.
    pub policy: Arc<ArcSwap<AllowList>>,
    /// Which addresses of destinations' names have answered.
    pub answered: Arc<Answered>,
    /// Counters.
    pub metrics: DialMetrics,
    /// What proxy-agent counts.
    pub proxy_metrics: ProxyAgentMetrics,
    /// The bound on the memory that is held for servers and targets.
    pub budget: Budget,
    /// Where the process is in its life.
    pub phase: watch::Receiver<Phase>,
    /// Open connections.
    pub connections: Gate,
    /// What the bounds refuse.
    pub limits: LimitMetrics,
}

/// What a person reads who asked too late.
pub(super) const ENDING: &str = "the agent is ending";

/// The bound on connections in metrics.
pub(super) const CONNECTIONS: &str = "connections";

/// The bound on memory in metrics.
pub(super) const STALLED_BYTES: &str = "stalled_bytes";

impl Worker {
    /// What we offer: the node addresses in our certificate as it is now, and what is configured.
    pub(super) fn offer(&self) -> Vec<Claim> {
        let material = self.material.as_ref();
        let own = material
            .map(|material| material.identity().addresses)
            .unwrap_or_default();
        let own = own.iter().map(|addr| Claim::Address(addr.to_canonical()));
        own.chain(self.serve.borrow().iter().cloned()).collect()
    }

    /// Whether a new connection would be cut before long. Until then an agent that drains serves: it may
    /// be the only one for its node.
    pub(super) fn is_ending(&self) -> bool {
        match *self.phase.borrow() {
            Phase::Running => false,
            Phase::Draining(deadline) => {
                deadline.saturating_duration_since(Instant::now()) < lifecycle::LAST_CALL
            }
            Phase::Ended => true,
        }
    }

    /// Counts a connection, or says why none is taken.
    ///
    /// # Errors
    /// The reason, and a text for the person who asked.
    pub(super) fn admit(&self) -> Result<Admitted, (CloseReason, String)> {
        if !self.budget.has_room() {
            self.limits.refuse(STALLED_BYTES);
            let text = format!(
                "unread data takes {} bytes (limits.stalled_bytes)",
                self.budget.used()
            );
            return Err((CloseReason::Overloaded, text));
        }
        let Some(entered) = self.connections.enter() else {
            if self.connections.is_closed() {
                return Err((CloseReason::Draining, ENDING.into()));
            }
            self.limits.refuse(CONNECTIONS);
            let text = format!(
                "the agent holds {} connections (limits.connections)",
                self.connections.inside()
            );
            return Err((CloseReason::Overloaded, text));
        };
        self.metrics.open.inc();
        Ok(Admitted {
            _entered: entered,
            open: self.metrics.open.clone(),
        })
    }
}

/// One connection that counts until it is dropped.
pub(super) struct Admitted {
    _entered: Entered,
    open: Gauge,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.open.dec();
    }
}
