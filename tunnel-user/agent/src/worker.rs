//! State that all tunnels of an agent share.

use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tunnel_proto::close::CloseReason;
use tunnel_proto::route::Claim;
use tunnel_proto::session::InstanceId;

use super::handover::Handover;
use super::happy_eyeballs::AnsweredAddresses;
use super::observer::Observer;
use super::renew::Renewals;
use super::sessions::Sessions;
use cpc_config::allow_list::AllowList;
use cpc_datapath::Budget;
use cpc_handover::KeeperHandle;
use cpc_host::concurrency::{ConcurrencyLimit, Permit};
use cpc_host::lifecycle::{self, Phase};
use cpc_identity::Material;
use cpc_observe::limits::LimitMetrics;
use cpc_observe::metrics::{DialMetrics, GaugeGuard};

/// State that all tunnels of an agent share. Each shard has a clone.
#[derive(Clone)]
pub struct Worker {
    /// Our certificate, which native tunnels require.
    pub(super) material: Option<Arc<Material>>,
    /// Name of the node.
    pub(super) node: Arc<str>,
    /// Id of this process.
    pub(super) instance: InstanceId,
    /// Number of processes that had the id before.
    pub(super) incarnation: u64,
    /// Earlier process that has certainly ended.
    pub(super) predecessor: Option<InstanceId>,
    /// Claims beyond the node addresses in our certificate.
    pub(super) serve: watch::Receiver<Vec<Claim>>,
    /// Queue of renewals of our certificate.
    pub(super) renewals: Renewals,
    /// Allow-list.
    pub(super) policy: Arc<ArcSwap<AllowList>>,
    /// Addresses of destinations' names that have answered.
    pub(super) answered: Arc<AnsweredAddresses>,
    /// Metrics of dials.
    pub(super) metrics: DialMetrics,
    /// Observer of dials, where the extension has one.
    pub(super) observer: Option<Arc<dyn Observer>>,
    /// Bound on the memory held for servers and targets.
    pub(super) budget: Budget,
    /// Phase of the process.
    pub(super) phase: watch::Receiver<Phase>,
    /// Open connections.
    pub(super) connections: ConcurrencyLimit,
    /// Metrics of limits.
    pub(super) limits: LimitMetrics,
    /// Connections that outlive their tunnel.
    pub(super) sessions: Arc<Sessions>,
    /// Stage of a handover.
    pub(super) handover: Handover,
    /// Keeper of sockets over a crash.
    pub(super) keeper: KeeperHandle,
}

/// Text for a client whose request came too late.
pub(super) const ENDING: &str = "the agent is ending";

/// Name of the limit on connections in metrics.
pub(super) const CONNECTIONS: &str = "connections";

/// Name of the limit on memory in metrics.
pub(super) const STALLED_BYTES: &str = "stalled_bytes";

/// Name of the limit on waiting sessions in metrics.
pub(super) const WAITING_SESSIONS: &str = "waiting_sessions";

impl Worker {
    /// Returns the phase of the process.
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.clone()
    }

    /// Returns our offer: the node addresses in our present certificate, and the configured claims.
    pub(super) fn offer(&self) -> Vec<Claim> {
        let material = self.material.as_ref();
        let own = material
            .map(|material| material.identity().addresses)
            .unwrap_or_default();
        let own = own.iter().map(|addr| Claim::Address(addr.to_canonical()));
        own.chain(self.serve.borrow().iter().cloned()).collect()
    }

    /// Whether a new connection would be cut before long. Until then a draining agent serves: it may be
    /// the only one for its node.
    pub(super) fn is_ending(&self) -> bool {
        match *self.phase.borrow() {
            Phase::Running => false,
            Phase::Draining(deadline) => {
                deadline.saturating_duration_since(Instant::now()) < lifecycle::LAST_CALL
            }
            Phase::Ended => true,
        }
    }

    /// Admits and counts a connection.
    ///
    /// # Errors
    /// The reason of the refusal, and a text for the person who asked.
    pub(super) fn admit(&self) -> Result<Admitted, (CloseReason, String)> {
        if !self.budget.has_room() {
            self.limits.refuse(STALLED_BYTES);
            let text = format!(
                "unread data takes {} bytes (limits.stalled_bytes)",
                self.budget.used()
            );
            return Err((CloseReason::Overloaded, text));
        }
        self.count()
    }

    /// Counts a connection, which another process may have admitted.
    ///
    /// # Errors
    /// The reason of the refusal, and a text for the person who asked.
    pub(super) fn count(&self) -> Result<Admitted, (CloseReason, String)> {
        let Some(permit) = self.connections.acquire() else {
            if self.connections.is_closed() {
                return Err((CloseReason::Draining, ENDING.into()));
            }
            self.limits.refuse(CONNECTIONS);
            let text = format!(
                "the agent holds {} connections (limits.connections)",
                self.connections.in_use()
            );
            return Err((CloseReason::Overloaded, text));
        };
        Ok(Admitted {
            _permit: permit,
            _open: GaugeGuard::new(&self.metrics.open),
        })
    }
}

/// One admitted connection, counted until dropped.
pub(super) struct Admitted {
    _permit: Permit,
    _open: GaugeGuard,
}
