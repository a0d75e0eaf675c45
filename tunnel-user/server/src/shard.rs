//! State of one shard of a server: its endpoint, its links, and the needs of dials; and tasks between
//! shards.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::net::UdpSocket;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::Destination;
use tunnel_proto::session::InstanceId;

use super::agent_processes::AgentProcesses;
use super::breaker::Breaker;
use super::control::ControlHandle;
use super::error::ServerError;
use super::extension::agent_server::AgentServer;
use super::extension::observer::Observer;
use super::faults::Faults;
use super::handover::Handover;
use super::handshakes::HandshakeLimiter;
use super::limits::Limit;
use super::link::{self, Link};
use super::loads::Loads;
use super::metrics::ServerMetrics;
use super::permits::{ConnectionPermit, DialPermit, TunnelPermit};
use super::routes::LinkId;
use super::start::Tunnel;
use super::tenants::Tenants;
use cpc_config::server::LimitsConfig;
use cpc_datapath::Budget;
use cpc_handover::KeeperHandle;
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::descriptors::Shares;
use cpc_host::host;
use cpc_host::lifecycle::Phase;
use cpc_identity::TrustDomain;
use cpc_identity::join::Issuer;
use cpc_identity::revoked::Revocations;
use cpc_transport::quic::{Endpoint, config, error_code};

/// State that all shards share.
#[derive(Clone)]
pub(super) struct Common {
    /// The control task.
    pub control: ControlHandle,
    /// Issuer of certificates, if configured.
    pub issuer: Option<Arc<Issuer>>,
    /// Metrics.
    pub metrics: ServerMetrics,
    /// Observer of dials and connections, for the extension's metrics.
    pub observer: Option<Arc<dyn Observer>>,
    /// Bound on the memory of stopped readers.
    pub budget: Budget,
    /// Configured limits.
    pub limits: LimitsConfig,
    /// Open connections.
    pub connections: ConcurrencyLimit,
    /// Shares of the file descriptors.
    pub shares: Shares,
    /// Clients whose request has not arrived yet.
    pub waiting: ConcurrencyLimit,
    /// Dials under way.
    pub dials: ConcurrencyLimit,
    /// Sessions that wait for another tunnel.
    pub waiting_sessions: ConcurrencyLimit,
    /// Processes of agents.
    pub processes: AgentProcesses,
    /// Number of tunnels.
    pub tunnels: ConcurrencyLimit,
    /// Limits of each tenant.
    pub tenants: Tenants,
    /// Limiter of handshakes at the tunnel's port.
    pub handshakes: HandshakeLimiter,
    /// Name of the server.
    pub server_id: Arc<str>,
    /// Number of servers.
    pub server_count: u32,
    /// Faults that readiness names.
    pub faults: Faults,
    /// Revoked peers.
    pub revocations: Arc<Revocations>,
    /// Id of this process.
    pub instance: InstanceId,
    /// Number of processes that had the id before.
    pub incarnation: u64,
    /// Start of this process.
    pub started: Instant,
    /// Phase of this process.
    pub phase: watch::Receiver<Phase>,
    /// Last assigned link id.
    pub last_link: Arc<AtomicU64>,
    /// Tunnels over QUIC by shard.
    pub loads: Loads,
    /// Queues of all shards.
    pub peers: Peers,
    /// Stage of a handover.
    pub handover: Handover,
    /// Keeper of sockets over a crash.
    pub keeper: KeeperHandle,
}

/// Task for another shard.
type Task = Box<dyn FnOnce(&Rc<Shard>) + Send>;

/// Queues to the shards. The work in them is bounded where it is admitted: by the connections, and by
/// the handshakes that a listener takes.
#[derive(Clone)]
pub(super) struct Peers {
    inboxes: Arc<[mpsc::UnboundedSender<Task>]>,
    dealt: Arc<AtomicUsize>,
}

/// Queue of tasks from other shards.
pub(super) struct Inbox(mpsc::UnboundedReceiver<Task>);

impl Peers {
    /// Creates the queues of `count` shards.
    pub(super) fn new(count: usize) -> (Self, Vec<Inbox>) {
        let channels = (0..count).map(|_| mpsc::unbounded_channel());
        let (inboxes, outlets): (Vec<_>, Vec<_>) = channels.unzip();
        let peers = Self {
            inboxes: inboxes.into(),
            dealt: Arc::default(),
        };
        (peers, outlets.into_iter().map(Inbox).collect())
    }

    /// Returns the number of shards.
    pub(super) fn len(&self) -> usize {
        self.inboxes.len()
    }

    /// Runs `task` on the shard that is the `turn`th in turn. A shard that has ended drops it.
    pub(super) fn run_on(&self, turn: usize, task: impl FnOnce(&Rc<Shard>) + Send + 'static) {
        if let Some(inbox) = self.inboxes.get(turn % self.len().max(1)) {
            let _ = inbox.send(Box::new(task));
        }
    }

    /// Runs `task` on all shards, and returns the sum of its results.
    pub(super) async fn on_all(&self, task: fn(&Rc<Shard>) -> usize) -> usize {
        let results = (0..self.len()).map(|at| {
            let (done, result) = oneshot::channel();
            self.run_on(at, move |shard| {
                // Who asks waits for it.
                let _ = done.send(task(shard));
            });
            result
        });
        let results = join_all(results).await;
        results.into_iter().filter_map(Result::ok).sum()
    }
}

/// Destination of a dial, with its tenant.
pub(super) type Target = (TrustDomain, Destination);

/// One shard. Dereferences to the state that all of them share.
pub(super) struct Shard {
    /// Index of the shard.
    pub index: usize,
    /// Links of connected agents.
    pub links: RefCell<HashMap<LinkId, Link>>,
    /// Server of the extension's agents, where they are served.
    pub agents: OnceCell<Weak<dyn AgentServer>>,
    /// Breaker of destinations dialled over these links.
    pub breaker: RefCell<Breaker<Target>>,
    /// Parameters and socket of the tunnels of this shard, if it has some.
    tunnel: Option<(Tunnel, UdpSocket)>,
    /// Endpoint of the tunnels.
    pub endpoint: RefCell<Option<Endpoint>>,
    common: Common,
}

impl std::ops::Deref for Shard {
    type Target = Common;

    fn deref(&self) -> &Common {
        &self.common
    }
}

impl Shard {
    /// Creates a shard without links, whose tunnels come in at the socket of `tunnel`.
    pub(super) fn new(
        index: usize,
        common: Common,
        tunnel: Option<(Tunnel, UdpSocket)>,
    ) -> Rc<Self> {
        Rc::new(Self {
            tunnel,
            endpoint: RefCell::default(),
            index,
            links: RefCell::default(),
            agents: OnceCell::new(),
            breaker: Breaker::new(common.limits.breaker()).into(),
            common,
        })
    }

    /// Runs tasks from other shards, without end.
    pub(super) async fn listen(self: Rc<Self>, mut inbox: Inbox) {
        while let Some(task) = inbox.0.recv().await {
            task(&self);
        }
    }

    /// Runs a task on shard `index`. A shard that has ended drops it: then the process is ending.
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

    /// Returns the next shard in turn, for peers that cost more than a move: TLS, HTTP/2.
    pub(super) fn turn(&self) -> usize {
        self.peers.dealt.fetch_add(1, Ordering::Relaxed) % self.peers.len()
    }

    /// Returns an unused link id.
    pub(super) fn next_link(&self) -> LinkId {
        LinkId(self.last_link.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Counts a connection of `tenant` and its dial.
    ///
    /// # Errors
    /// The limit that refuses.
    pub(super) fn admit(
        &self,
        tenant: &TrustDomain,
    ) -> Result<(ConnectionPermit, DialPermit), Limit> {
        let admitted = self.try_admit(tenant);
        admitted.inspect_err(|limit| self.metrics.limits.refuse(limit.label()))
    }

    fn try_admit(&self, tenant: &TrustDomain) -> Result<(ConnectionPermit, DialPermit), Limit> {
        let own = self.tenants.of(tenant);
        if !self.budget.has_room() {
            return Err(Limit::StalledBytes);
        }
        if !own.budget.has_room() {
            return Err(Limit::StalledBytesPerTenant);
        }
        let enter = |gate: &ConcurrencyLimit, limit| gate.acquire().ok_or(limit);
        let connections = (
            enter(&self.connections, Limit::Connections)?,
            enter(&own.connections, Limit::ConnectionsPerTenant)?,
        );
        let dials = (
            enter(&self.dials, Limit::Dials)?,
            enter(&own.dials, Limit::DialsPerTenant)?,
        );
        let connection = ConnectionPermit::new(connections, &self.metrics.dials.open);
        Ok((connection, DialPermit::new(dials)))
    }

    /// Counts a tunnel of `tenant`.
    ///
    /// # Errors
    /// The limit that refuses.
    pub(super) fn admit_tunnel(&self, tenant: &TrustDomain) -> Result<TunnelPermit, Limit> {
        let all = self.tunnels.acquire().ok_or(Limit::Agents);
        let own = self.tenants.of(tenant).agents.acquire();
        let permit = all.and_then(|all| Ok((all, own.ok_or(Limit::AgentsPerTenant)?)));
        permit.inspect_err(|limit| self.metrics.limits.refuse(limit.label()))
    }

    /// Changes the breaker, and updates its metric.
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

    /// Opens the endpoint of the tunnels, and accepts them.
    ///
    /// # Errors
    /// The socket can't be used.
    pub(super) fn open_tunnels(self: &Rc<Self>) -> Result<(), ServerError> {
        let Some((tunnel, udp)) = &self.tunnel else {
            return Ok(());
        };
        // Below the bound on shards.
        let index = self.index as u8;
        let Tunnel {
            material,
            secret,
            setup,
        } = tunnel;
        let opened = config::server(udp.try_clone()?, material, secret, index, setup)?;
        host::warn_once(&opened.complaints);
        tokio::task::spawn_local(link::quic::accept(self.clone(), opened.endpoint.clone()));
        self.endpoint.replace(Some(opened.endpoint));
        Ok(())
    }

    /// Leaves all tunnels to another process, which goes on with the connections over them. Returns 0.
    pub(super) fn leave_tunnels(self: &Rc<Self>) -> usize {
        let reason = CloseReason::HandedOver;
        self.close_links(reason);
        if let Some(endpoint) = self.endpoint.take() {
            endpoint.leave(error_code(reason), reason.label().as_bytes());
        }
        0
    }

    /// Offers to hold every connection. Returns the number of those that would end with their tunnel.
    pub(super) fn hold_all(self: &Rc<Self>) -> usize {
        let links = self.links.borrow();
        let tunnels = links.values().filter_map(|link| match link {
            Link::Tunnel(tunnel) => tunnel.notices.get(),
            Link::Foreign(_) => None,
        });
        tunnels.map(|notices| notices.hold_all()).sum()
    }

    /// Counts a connection of `tenant` that another process has accepted. `None`: a limit refuses it.
    pub(super) fn admit_restored(&self, tenant: &TrustDomain) -> Option<ConnectionPermit> {
        let own = self.tenants.of(tenant).connections.acquire()?;
        let permits = (self.connections.acquire()?, own);
        Some(ConnectionPermit::new(permits, &self.metrics.dials.open))
    }

    /// Ends every link and the connections on it.
    pub(super) fn close_links(&self, reason: CloseReason) {
        for link in self.links.borrow().values() {
            link.close(reason);
        }
    }
}
