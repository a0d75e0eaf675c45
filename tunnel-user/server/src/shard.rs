//! What belongs to one shard of a server: its endpoint, its links, and what dials need; and how the
//! shards hand over to each other.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::Destination;
use tunnel_proto::session::InstanceId;

use super::breaker::Breaker;
use super::control::ControlHandle;
use super::doorstep::Doorstep;
use super::limits::Limit;
use super::link::Link;
use super::link::konnectivity::Agents;
use super::loads::Loads;
use super::metrics::ServerMetrics;
use super::routes::LinkId;
use super::tenants::Tenants;
use super::troubles::Troubles;
use cpc_config::server::LimitsConfig;
use cpc_datapath::Budget;
use cpc_host::descriptors::Shares;
use cpc_host::gate::{Entered, Gate};
use cpc_host::lifecycle::Phase;
use cpc_identity::TrustDomain;
use cpc_identity::join::Desk;
use cpc_identity::revoked::Revocations;

/// What every shard of a server knows.
#[derive(Clone)]
pub(super) struct Common {
    /// The control task.
    pub control: ControlHandle,
    /// Where certificates are issued, if they are.
    pub desk: Option<Arc<Desk>>,
    /// Counters.
    pub metrics: ServerMetrics,
    /// The bound on stopped readers.
    pub budget: Budget,
    /// Bounds.
    pub limits: LimitsConfig,
    /// Open connections.
    pub connections: Gate,
    /// What there are file descriptors for.
    pub shares: Shares,
    /// Clients that have not said yet what they want.
    pub waiting: Gate,
    /// Connections of gRPC clients, each of which may carry many of theirs.
    pub grpc_clients: Gate,
    /// Dials under way.
    pub dials: Gate,
    /// Tunnels.
    pub tunnels: Gate,
    /// What each tenant has of them.
    pub tenants: Tenants,
    /// Where agents come in over QUIC.
    pub door: Doorstep,
    /// Our name.
    pub server_id: Arc<str>,
    /// How many of us there are.
    pub server_count: u32,
    /// What readiness names.
    pub troubles: Troubles,
    /// Peers who count no more.
    pub revocations: Arc<Revocations>,
    /// This process.
    pub instance: InstanceId,
    /// Since when it runs.
    pub started: Instant,
    /// Where the process is in its life.
    pub phase: watch::Receiver<Phase>,
    /// The last link id that was given out.
    pub last_link: Arc<AtomicU64>,
    /// Tunnels over QUIC by shard.
    pub loads: Loads,
    /// All shards.
    pub peers: Peers,
}

/// What one shard has another do.
type Task = Box<dyn FnOnce(&Rc<Shard>) + Send>;

/// The ways to the shards. What waits there is bounded where it comes in: by the connections that
/// are admitted, by the strangers that a listener takes.
#[derive(Clone)]
pub(super) struct Peers {
    inboxes: Arc<[mpsc::UnboundedSender<Task>]>,
    dealt: Arc<AtomicUsize>,
}

/// Where a shard is told what to do.
pub(super) struct Inbox(mpsc::UnboundedReceiver<Task>);

impl Peers {
    /// Of `count` shards.
    pub(super) fn new(count: usize) -> (Self, Vec<Inbox>) {
        let channels = (0..count).map(|_| mpsc::unbounded_channel());
        let (inboxes, outlets): (Vec<_>, Vec<_>) = channels.unzip();
        let peers = Self {
            inboxes: inboxes.into(),
            dealt: Arc::default(),
        };
        (peers, outlets.into_iter().map(Inbox).collect())
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.inboxes.len()
    }
}

/// What is dialled, and for whom.
pub(super) type Target = (TrustDomain, Destination);

/// One shard. Dereferences to what all of them know.
pub(super) struct Shard {
    /// Which one.
    pub index: usize,
    /// The agents that are connected to it.
    pub links: RefCell<HashMap<LinkId, Link>>,
    /// Where agents of Konnectivity come in.
    pub agents: OnceCell<Weak<Agents>>,
    /// What times out when it is dialled over them.
    pub breaker: RefCell<Breaker<Target>>,
    common: Common,
}

impl std::ops::Deref for Shard {
    type Target = Common;

    fn deref(&self) -> &Common {
        &self.common
    }
}

impl Shard {
    /// A shard without links.
    pub(super) fn new(index: usize, common: Common) -> Rc<Self> {
        Rc::new(Self {
            index,
            links: RefCell::default(),
            agents: OnceCell::new(),
            breaker: Breaker::new(common.limits.breaker()).into(),
            common,
        })
    }

    /// Does what other shards ask for, for ever.
    pub(super) async fn listen(self: Rc<Self>, mut inbox: Inbox) {
        while let Some(task) = inbox.0.recv().await {
            task(&self);
        }
    }

    /// Runs a task on shard `index`. One that has ended drops it: then all of us are ending.
    pub(super) fn run_on<F>(
        self: &Rc<Self>,
        index: usize,
        task: impl FnOnce(Rc<Self>) -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + 'static,
    {
        if index == self.index {
            tokio::task::spawn_local(task(self.clone()));
        } else if let Some(inbox) = self.peers.inboxes.get(index) {
            let task = |shard: &Rc<Self>| drop(tokio::task::spawn_local(task(shard.clone())));
            let _ = inbox.send(Box::new(task));
        }
    }

    /// Whose turn it is to take somebody in who costs more than to be handed over: TLS, HTTP/2.
    pub(super) fn turn(&self) -> usize {
        self.peers.dealt.fetch_add(1, Ordering::Relaxed) % self.peers.len()
    }

    /// A link id that was never used.
    pub(super) fn next_link(&self) -> LinkId {
        LinkId(self.last_link.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Counts a connection of `tenant`, and that it is dialled.
    ///
    /// # Errors
    /// The bound that lets no more in.
    pub(super) fn admit(&self, tenant: &TrustDomain) -> Result<(Admitted, Dialling), Limit> {
        let admitted = self.try_admit(tenant);
        admitted.inspect_err(|limit| self.metrics.limits.refuse(limit.label()))
    }

    fn try_admit(&self, tenant: &TrustDomain) -> Result<(Admitted, Dialling), Limit> {
        let own = self.tenants.of(tenant);
        if !self.budget.has_room() {
            return Err(Limit::StalledBytes);
        }
        if !own.budget.has_room() {
            return Err(Limit::StalledBytesPerTenant);
        }
        let enter = |gate: &Gate, limit| gate.enter().ok_or(limit);
        let connections = (
            enter(&self.connections, Limit::Connections)?,
            enter(&own.connections, Limit::ConnectionsPerTenant)?,
        );
        let dials = (
            enter(&self.dials, Limit::Dials)?,
            enter(&own.dials, Limit::DialsPerTenant)?,
        );
        self.metrics.dials.open.inc();
        let admitted = Admitted {
            _entered: connections,
            open: self.metrics.dials.open.clone(),
        };
        Ok((admitted, Dialling { _entered: dials }))
    }

    /// Counts a tunnel of `tenant`.
    ///
    /// # Errors
    /// The bound that lets no more in.
    pub(super) fn admit_tunnel(&self, tenant: &TrustDomain) -> Result<TunnelPlace, Limit> {
        let all = self.tunnels.enter().ok_or(Limit::Agents);
        let own = self.tenants.of(tenant).agents.enter();
        let place = all.and_then(|all| Ok((all, own.ok_or(Limit::AgentsPerTenant)?)));
        place.inspect_err(|limit| self.metrics.limits.refuse(limit.label()))
    }

    /// Changes the breaker, and counts what is open then.
    pub(super) fn change_breaker<T>(&self, change: impl FnOnce(&mut Breaker<Target>) -> T) -> T {
        let mut breaker = self.breaker.borrow_mut();
        // Bounded, and at the bound a matter of a microsecond.
        let open = |breaker: &Breaker<Target>| breaker.open() as i64;
        let before = open(&breaker);
        let changed = change(&mut breaker);
        let more = open(&breaker) - before;
        self.metrics.breakers_open.inc_by(more);
        changed
    }

    /// Ends every link, and what lives on it.
    pub(super) fn close_links(&self, reason: CloseReason) {
        for link in self.links.borrow().values() {
            link.close(reason);
        }
    }
}

/// One connection that counts until it is dropped, on whichever shard.
pub(super) struct Admitted {
    _entered: (Entered, Entered),
    open: Gauge,
}

/// One dial that counts until it is dropped, on whichever shard.
pub(super) struct Dialling {
    _entered: (Entered, Entered),
}

/// One tunnel that counts until it is dropped.
pub(super) type TunnelPlace = (Entered, Entered);

impl Drop for Admitted {
    fn drop(&mut self) {
        self.open.dec();
    }
}
