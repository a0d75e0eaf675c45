//! Holds tunnels to every server, for ever: resolves, dials as [`Plan`] says, and serves.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;

use super::address::resolve;
use super::plan::{Plan, Verdict};
use super::stats::TunnelStats;
use super::tunnel::{self, DialError, Dialled, Reached, Tunnel, reason_of};
use super::worker::Worker;
use crate::process::lifecycle;
use crate::transport::control_stream::ControlEnd;

/// How often names are resolved anew.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(10);

/// A resolver that has not answered by then is asked again later.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A tunnel, for people.
#[derive(Clone, Debug)]
pub(super) struct TunnelView {
    /// Which server.
    pub server_id: Arc<str>,
    /// Where it was reached.
    pub address: SocketAddr,
    /// How it does.
    pub stats: Arc<TunnelStats>,
    /// Its path.
    pub connection: quinn::Connection,
}

/// The tunnels that are held, for people. Written by the connector.
#[derive(Debug, Default)]
pub(super) struct Tunnels {
    held: Mutex<HashMap<u64, TunnelView>>,
    server_count: std::sync::atomic::AtomicU32,
}

impl Tunnels {
    /// All of them, by server.
    pub(super) fn view(&self) -> Vec<TunnelView> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let mut view: Vec<_> = held.values().cloned().collect();
        view.sort_by(|a, b| a.server_id.cmp(&b.server_id));
        view
    }

    /// Whether a server is reached.
    pub(super) fn any_live(&self) -> bool {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.values().any(|tunnel| tunnel.stats.is_live())
    }

    /// How many servers there are, as the last one said.
    pub(super) fn server_count(&self) -> u32 {
        self.server_count.load(std::sync::atomic::Ordering::Relaxed)
    }
}

enum Event {
    Resolved(String, io::Result<Vec<SocketAddr>>),
    Reached(SocketAddr, Box<Reached>),
    Dialled(SocketAddr, Box<Result<Dialled, DialError>>),
    Changed(u64),
    Ended(u64, ControlEnd),
}

/// Connects for ever, until the process drains; then waits for the end and closes everything.
pub(super) async fn run(worker: Rc<Worker>, servers: Vec<String>, view: Arc<Tunnels>) {
    let (events, inbox) = mpsc::unbounded_channel();
    let mut connector = Connector {
        worker: worker.clone(),
        plan: Plan::default(),
        tunnels: HashMap::new(),
        complaints: HashMap::new(),
        addresses: HashMap::new(),
        unresolved: HashSet::new(),
        last: 0,
        events,
        view,
    };
    for server in servers {
        tokio::task::spawn_local(keep_resolving(server, connector.events.clone()));
    }
    connector.connect(inbox, worker).await;
}

struct Connector {
    worker: Rc<Worker>,
    plan: Plan,
    tunnels: HashMap<u64, Rc<Tunnel>>,
    complaints: HashMap<SocketAddr, String>,
    addresses: HashMap<String, Vec<SocketAddr>>,
    unresolved: HashSet<String>,
    last: u64,
    events: mpsc::UnboundedSender<Event>,
    view: Arc<Tunnels>,
}

impl Connector {
    async fn connect(&mut self, mut inbox: mpsc::UnboundedReceiver<Event>, worker: Rc<Worker>) {
        let stopping = lifecycle::stopping(worker.phase.clone());
        let ended = lifecycle::ended(worker.phase.clone());
        let (mut stopping, mut ended) = (std::pin::pin!(stopping), std::pin::pin!(ended));
        let mut draining = false;
        loop {
            if !draining {
                for address in self.plan.due(Instant::now()) {
                    self.dial(address);
                }
            }
            let next = self.plan.next_timeout().filter(|_| !draining);
            tokio::select! {
                Some(event) = inbox.recv() => self.handle(event),
                () = sleep_until(next) => {}
                () = &mut stopping, if !draining => draining = true,
                () = &mut ended => break,
            }
        }
        for tunnel in self.tunnels.values() {
            tunnel.close(CloseReason::Shutdown);
        }
        // Each tunnel's task says goodbye and reports its end. What is still being dialled ends
        // with the runtime.
        while !self.tunnels.is_empty() {
            match inbox.recv().await {
                Some(event @ Event::Ended(..)) => self.handle(event),
                Some(_) => {}
                None => break,
            }
        }
    }

    fn dial(&self, address: SocketAddr) {
        tracing::debug!(%address, "dialling");
        let (worker, events) = (self.worker.clone(), self.events.clone());
        tokio::task::spawn_local(async move {
            let event = match tunnel::reach(&worker, address).await {
                Ok(reached) => Event::Reached(address, Box::new(reached)),
                Err(error) => Event::Dialled(address, Box::new(Err(error))),
            };
            // The connector outlives its dials, except at the very end.
            let _ = events.send(event);
        });
    }

    fn introduce(&self, address: SocketAddr, reached: Reached) {
        let (worker, events) = (self.worker.clone(), self.events.clone());
        tokio::task::spawn_local(async move {
            let dialled = reached.introduce(&worker).await;
            let _ = events.send(Event::Dialled(address, Box::new(dialled)));
        });
    }

    fn resolved(&mut self, server: String, resolved: io::Result<Vec<SocketAddr>>, now: Instant) {
        match resolved {
            Ok(addresses) => {
                self.unresolved.remove(&server);
                self.addresses.insert(server, addresses);
            }
            // What was known before may still be right. Said once, not at every try.
            Err(error) => {
                if self.unresolved.insert(server.clone()) {
                    tracing::warn!(server, %error, "name not resolved, asking for ever");
                }
                return;
            }
        }
        let addresses: Vec<_> = self.addresses.values().flatten().copied().collect();
        self.complaints
            .retain(|address, _| addresses.contains(address));
        self.plan.set_addresses(&addresses, now);
    }

    fn handle(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Resolved(server, resolved) => self.resolved(server, resolved, now),
            Event::Reached(address, reached) => {
                let server = &reached.identity.name;
                if self.plan.reached(address, server, now, chance()) {
                    self.introduce(address, *reached);
                } else {
                    tokio::task::spawn_local(reached.decline(CloseReason::DuplicateServer));
                }
            }
            Event::Dialled(address, dialled) => match *dialled {
                Ok(dialled) => self.welcomed(address, dialled, now),
                Err(error) => {
                    self.plan.failed(address, now, chance());
                    self.complain(address, &error);
                }
            },
            Event::Changed(number) => {
                let Some(tunnel) = self.tunnels.get(&number) else {
                    return;
                };
                let live = tunnel.stats.is_live();
                self.plan.changed(&tunnel.server_id, number, live);
                if live && !self.plan.holds(&tunnel.server_id, number) {
                    tokio::task::spawn_local(tunnel.clone().retire());
                }
            }
            Event::Ended(number, end) => {
                let Some(tunnel) = self.tunnels.remove(&number) else {
                    return;
                };
                tracing::warn!(
                    server = %tunnel.server_id, address = %tunnel.address,
                    reason = reason_of(&end).label(), why = %end, "tunnel ended"
                );
                self.held().remove(&number);
                self.plan.ended(&tunnel.server_id, number, now, chance());
            }
        }
    }

    fn welcomed(&mut self, address: SocketAddr, dialled: Dialled, now: Instant) {
        self.last += 1;
        let number = self.last;
        let tunnel = dialled.tunnel.clone();
        let server = (tunnel.server_id.clone(), tunnel.server_instance, number);
        let count = dialled.server_count;
        let verdict = self.plan.welcomed(address, server, count, now, chance());
        self.view
            .server_count
            .store(count, std::sync::atomic::Ordering::Relaxed);
        if let Verdict::Conflict(other) = verdict {
            let id = &tunnel.server_id;
            self.complain(
                address,
                &format_args!("{other} is a server {id} too; give each an id of its own"),
            );
        } else {
            self.complaints.remove(&address);
        }
        if verdict != Verdict::Keep {
            tokio::task::spawn_local(dialled.decline(CloseReason::DuplicateServer));
            return;
        }
        let refused = tunnel
            .stats
            .refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(first) = refused.first() {
            tracing::warn!(
                server = %tunnel.server_id, refused = refused.len(), claim = %first.claim, why = %first.why,
                "the server refuses claims; `cpc status` shows all"
            );
        }
        tracing::info!(server = %tunnel.server_id, %address, servers = count, "tunnel is up");
        let view = TunnelView {
            server_id: tunnel.server_id.clone(),
            address,
            stats: tunnel.stats.clone(),
            connection: tunnel.connection.clone(),
        };
        self.held().insert(number, view);
        self.tunnels.insert(number, tunnel);
        let (worker, events) = (self.worker.clone(), self.events.clone());
        tokio::task::spawn_local(async move {
            let changed = || drop(events.send(Event::Changed(number)));
            let end = dialled.serve(worker, changed).await;
            let _ = events.send(Event::Ended(number, end));
        });
    }

    fn held(&self) -> std::sync::MutexGuard<'_, HashMap<u64, TunnelView>> {
        self.view
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Once for each kind of trouble with an address, not at every try.
    fn complain(&mut self, address: SocketAddr, error: &dyn fmt::Display) {
        let text = error.to_string();
        if self.complaints.get(&address) != Some(&text) {
            tracing::warn!(%address, error = %text, "server not reached, trying for ever");
            self.complaints.insert(address, text);
        }
    }
}

/// Resolves one name again and again, apart from the others: one that hangs delays nobody.
async fn keep_resolving(server: String, events: mpsc::UnboundedSender<Event>) {
    loop {
        let resolved = timeout(RESOLVE_TIMEOUT, resolve(&server)).await;
        let resolved = resolved.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        if events
            .send(Event::Resolved(server.clone(), resolved))
            .is_err()
        {
            return;
        }
        tokio::time::sleep(RESOLVE_INTERVAL).await;
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// In 0..1.
fn chance() -> f64 {
    let mut byte = [0];
    // Without random numbers all agents would dial at once, which is no harm to this one.
    let _ = aws_lc_rs::rand::fill(&mut byte);
    f64::from(byte[0]) / 256.0
}
