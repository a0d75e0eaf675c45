//! The control task: owns the registry, and publishes snapshots of the routes to the shards, to the
//! kernel and to readiness. It makes all decisions that concern all shards (`batch`).

mod batch;
mod holds;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, sleep_until};
use tunnel_proto::route::Claim;
use tunnel_proto::session::{InstanceId, Refusal};

use self::batch::{Batch, Change, Effect, Snapshot, pause_after};
use self::holds::Holds;
use super::grants::Grants;
use super::limits::Limit;
use super::registry::{Backends, Registry, Session, Verdict};
use super::routes::{LinkId, LinkInfo, Routes};
use cpc_identity::{Identity, TrustDomain};

/// Length of the queue of requests; shards wait where it is full.
const QUEUE: usize = 1024;

/// Interval between removals of expired memories.
const EXPIRE_INTERVAL: Duration = Duration::from_secs(1);

/// A session, for status.
#[derive(Debug)]
pub struct SessionView {
    /// Shared state of the link.
    pub info: Arc<LinkInfo>,
    /// Claims that the agent serves.
    pub claims: Vec<Claim>,
    /// Refused claims.
    pub refused: Vec<Refusal>,
}

impl SessionView {
    fn new(session: &Session) -> Self {
        Self {
            info: session.info.clone(),
            claims: session.claims.clone(),
            refused: session.refused.clone(),
        }
    }
}

enum Request {
    /// A change, and the receiver of the verdict.
    Change(Change, Option<oneshot::Sender<Verdict>>),
    Holds(Identity, InstanceId, oneshot::Sender<bool>),
    View(oneshot::Sender<Vec<SessionView>>),
}

/// Use of the table of routes, and refusals for want of room.
#[derive(Debug, Default)]
pub struct RouteUsage {
    all: AtomicU64,
    most: AtomicU64,
    refused: Mutex<Vec<(Limit, u64)>>,
}

impl RouteUsage {
    /// Returns the use by all tenants, and by the one that has most.
    pub(super) fn taken(&self) -> (u64, u64) {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (load(&self.all), load(&self.most))
    }

    /// Returns the number of claims that each bound has refused since the last call.
    pub(super) fn take_refused(&self) -> Vec<(Limit, u64)> {
        std::mem::take(&mut *self.lock())
    }

    fn set(&self, ((all, most), refused): ((usize, usize), Vec<Limit>)) {
        self.all.store(all as u64, Ordering::Relaxed);
        self.most.store(most as u64, Ordering::Relaxed);
        let mut counts = self.lock();
        for limit in refused {
            match counts.iter_mut().find(|(counted, _)| *counted == limit) {
                Some((_, count)) => *count += 1,
                None => counts.push((limit, 1)),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Limit, u64)>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Handle to the control task, for any thread.
#[derive(Clone)]
pub struct ControlHandle {
    requests: mpsc::Sender<Request>,
    routes: Arc<ArcSwap<Routes>>,
    published: watch::Receiver<()>,
    backends: Arc<ArcSwap<Backends>>,
    route_usage: Arc<RouteUsage>,
    /// Routes whose agents are about to come back: the kernel refuses none that it did not refuse before, and
    /// dials wait for them.
    holds: Arc<Mutex<Holds>>,
}

impl ControlHandle {
    /// Holds all routes: the agents are about to come back.
    pub(super) fn hold_routes(&self) {
        self.lock_holds().hold_all(Instant::now());
    }

    /// Holds the routes of an agent, which is about to come back, and those of its tenant.
    pub(super) fn hold_routes_of(&self, agent: &Identity) {
        if !self.lock_holds().hold_for(agent, Instant::now()) {
            tracing::debug!(agent = %agent, "no routes are held: the agent hands over too often");
        }
    }

    /// Returns the time until which agents of `tenant` are about to come back, while they are.
    pub(super) fn held_until(&self, tenant: &TrustDomain) -> Option<Instant> {
        self.lock_holds().of(tenant, Instant::now())
    }

    /// Returns the time until which any agents are about to come back, while they are.
    fn any_held_until(&self) -> Option<Instant> {
        self.lock_holds().last(Instant::now())
    }

    fn lock_holds(&self) -> MutexGuard<'_, Holds> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the use of the table of routes.
    pub(super) fn route_usage(&self) -> &RouteUsage {
        &self.route_usage
    }

    /// Returns the routes in force.
    pub fn routes(&self) -> arc_swap::Guard<Arc<Routes>> {
        self.routes.load()
    }

    /// Returns a receiver that changes whenever other routes come into force.
    pub fn published(&self) -> watch::Receiver<()> {
        self.published.clone()
    }

    /// Whether at least one agent answers heartbeats.
    pub fn is_ready(&self) -> bool {
        self.backends.load().all > 0
    }

    /// Returns the number of agents that answer heartbeats.
    pub fn backends(&self) -> Arc<Backends> {
        self.backends.load_full()
    }

    /// Registers a session of process `instance`, which may know of a `predecessor` that has ended. The
    /// routes are in force when this returns. Returns `None` if the process is ending.
    pub async fn connect(
        &self,
        info: Arc<LinkInfo>,
        (instance, predecessor): (InstanceId, Option<InstanceId>),
        offer: Vec<Claim>,
    ) -> Option<Verdict> {
        let connect = Change::Connect {
            info,
            instance,
            predecessor,
            offer,
        };
        self.judge(connect).await
    }

    /// Replaces a session's offer. Returns `None` if the session is gone, or the process is ending.
    pub async fn offer(&self, link: LinkId, offer: Vec<Claim>) -> Option<Verdict> {
        self.judge(Change::Offer(link, offer)).await
    }

    async fn judge(&self, change: Change) -> Option<Verdict> {
        let (reply, verdict) = oneshot::channel();
        let request = Request::Change(change, Some(reply));
        self.requests.send(request).await.ok()?;
        verdict.await.ok()
    }

    async fn apply(&self, change: Change) {
        let _ = self.requests.send(Request::Change(change, None)).await;
    }

    /// Notes that a link became available, or ceased to be.
    pub async fn changed(&self, link: LinkId) {
        self.apply(Change::Availability(link)).await;
    }

    /// Whether there is a session of that process.
    pub async fn holds(&self, identity: &Identity, instance: InstanceId) -> bool {
        let (reply, holds) = oneshot::channel();
        let request = Request::Holds(identity.clone(), instance, reply);
        self.requests.send(request).await.is_ok() && holds.await.unwrap_or(false)
    }

    /// Notes the end of a session.
    pub async fn disconnect(&self, link: LinkId) {
        self.apply(Change::Disconnect(link)).await;
    }

    /// Replaces the policy.
    pub async fn set_grants(&self, grants: Grants) {
        self.apply(Change::Grants(grants.into())).await;
    }

    /// Returns all sessions, for status.
    pub async fn view(&self) -> Vec<SessionView> {
        let (reply, view) = oneshot::channel();
        if self.requests.send(Request::View(reply)).await.is_err() {
            return Vec::new();
        }
        view.await.unwrap_or_default()
    }
}

/// Receiver of every snapshot once the shards have it. The flag tells whether routes that were served before may
/// come back.
pub type Publish = Box<dyn FnMut(&Routes, bool) + Send>;

/// The task itself.
pub struct Control {
    registry: Registry,
    requests: mpsc::Receiver<Request>,
    handle: ControlHandle,
    published: watch::Sender<()>,
    publish: Publish,
    /// Whether the kernel may have routes that the shards do not have.
    has_held_routes: bool,
}

async fn sleep_until_some(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

impl Control {
    /// Creates a control task over an empty registry. `publish` writes routes to the kernel.
    pub fn new(registry: Registry, publish: Publish) -> Self {
        let (requests, receiver) = mpsc::channel(QUEUE);
        let (published, watching) = watch::channel(());
        let handle = ControlHandle {
            requests,
            routes: Arc::default(),
            published: watching,
            backends: Arc::default(),
            route_usage: Arc::default(),
            holds: Arc::default(),
        };
        Self {
            registry,
            requests: receiver,
            handle,
            published,
            publish,
            has_held_routes: false,
        }
    }

    /// Returns a handle.
    pub fn handle(&self) -> ControlHandle {
        self.handle.clone()
    }

    /// Runs without end.
    pub async fn run(mut self) {
        let first = batch::snapshot(&mut self.registry);
        self.publish(first);
        let mut expire = tokio::time::interval(EXPIRE_INTERVAL);
        let mut requests = Vec::new();
        loop {
            let held = self
                .handle
                .any_held_until()
                .filter(|_| self.has_held_routes);
            tokio::select! {
                _ = self.requests.recv_many(&mut requests, QUEUE) => {}
                _ = expire.tick() => {}
                () = sleep_until_some(held) => {}
            }
            if self.has_held_routes && self.handle.any_held_until().is_none() {
                self.publish_to_kernel();
            }
            let began = Instant::now();
            if self.run_batch(requests.drain(..), began) {
                sleep(pause_after(began.elapsed())).await;
            }
        }
    }

    /// Handles requests. Returns whether routes may have changed.
    fn run_batch(&mut self, requests: impl Iterator<Item = Request>, now: Instant) -> bool {
        let mut batch = Batch::new(&mut self.registry, now);
        for request in requests {
            match request {
                Request::Change(change, reply) => batch.apply(change, reply),
                Request::Holds(identity, instance, reply) => {
                    let _ = reply.send(batch.registry().holds(&identity, instance));
                }
                Request::View(reply) => {
                    let view = batch.registry().sessions().map(SessionView::new);
                    let _ = reply.send(view.collect());
                }
            }
        }
        let (changed, effects) = batch.finish();
        for effect in effects {
            match effect {
                Effect::Publish(snapshot) => self.publish(*snapshot),
                Effect::Succeed(link, predecessor) => self.registry.succeed(link, predecessor),
                // The requester may have gone.
                Effect::Answer(reply, verdict) => drop(oneshot::Sender::send(reply, verdict)),
            }
        }
        changed
    }

    fn publish(&mut self, snapshot: Snapshot) {
        let Snapshot {
            routes,
            usage,
            backends,
        } = snapshot;
        // The shards first: what the kernel lets through can then be served.
        self.handle.routes.store(routes.clone());
        self.published.send_replace(());
        self.publish_to_kernel();
        self.handle.route_usage.set(usage);
        self.handle.backends.store(Arc::new(backends));
    }

    /// Writes the routes in force to the kernel, which keeps those that it serves while they are held.
    fn publish_to_kernel(&mut self) {
        self.has_held_routes = self.handle.any_held_until().is_some();
        (self.publish)(&self.handle.routes.load(), self.has_held_routes);
    }
}
