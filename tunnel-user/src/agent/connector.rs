//! Holds tunnels to every server, for ever: resolves, dials as [`Plan`] says, and serves.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;

use super::address::resolve;
use super::held::Tunnels;
use super::plan::{Plan, Verdict, Way, Wire};
use super::quic::Reached;
use super::tunnel::{About, DialError, Dialled, End, Tunnel};
use super::worker::Worker;
use super::{konnectivity, quic};
use crate::config::agent::Protocol;
use crate::process::lifecycle;

/// How often names are resolved anew.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(10);

/// A resolver that has not answered by then is asked again later.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where servers are found.
pub(super) struct Servers {
    /// "host:port", and what is spoken there.
    pub addresses: Vec<(Rc<str>, Protocol)>,
    /// How many proxy-servers there are by their leases, where those are watched.
    pub leases: watch::Receiver<Option<u32>>,
    /// Whether what proxy-servers say counts as well.
    pub count_both: bool,
}

enum Event {
    Resolved(Rc<str>, io::Result<Vec<SocketAddr>>),
    Reached(Way, Box<Reached>),
    Dialled(Way, Box<Result<Dialled, DialError>>),
    Changed(u64),
    Ended(u64, End),
}

/// Connects for ever, until the process drains; then waits for the end and closes everything.
pub(super) async fn run(worker: Rc<Worker>, servers: Servers, view: Arc<Tunnels>) {
    let Servers {
        addresses,
        leases,
        count_both,
    } = servers;
    let mut plan = Plan::default();
    if count_both {
        plan.count_both();
    }
    let (events, inbox) = mpsc::unbounded_channel();
    let mut connector = Connector {
        worker: worker.clone(),
        plan,
        tunnels: HashMap::new(),
        complaints: HashMap::new(),
        names: HashMap::new(),
        unresolved: HashSet::new(),
        last: 0,
        events,
        view,
    };
    for (server, protocol) in addresses {
        connector
            .names
            .insert(server.clone(), (protocol, Vec::new()));
        tokio::task::spawn_local(keep_resolving(server, connector.events.clone()));
    }
    connector.connect(inbox, leases, worker).await;
}

struct Connector {
    worker: Rc<Worker>,
    plan: Plan,
    tunnels: HashMap<u64, Tunnel>,
    complaints: HashMap<Way, String>,
    /// What the names of servers lead to.
    names: HashMap<Rc<str>, (Protocol, Vec<SocketAddr>)>,
    unresolved: HashSet<Rc<str>>,
    last: u64,
    events: mpsc::UnboundedSender<Event>,
    view: Arc<Tunnels>,
}

impl Connector {
    async fn connect(
        &mut self,
        mut inbox: mpsc::UnboundedReceiver<Event>,
        mut leases: watch::Receiver<Option<u32>>,
        worker: Rc<Worker>,
    ) {
        let stopping = lifecycle::stopping(worker.phase.clone());
        let ended = lifecycle::ended(worker.phase.clone());
        let (mut stopping, mut ended) = (std::pin::pin!(stopping), std::pin::pin!(ended));
        let mut draining = false;
        loop {
            if !draining {
                for way in self.plan.due(Instant::now()) {
                    self.dial(way);
                }
            }
            // Leases change it, a welcome, and a tunnel's end.
            self.view.set_server_count(self.plan.server_count());
            let next = self.plan.next_timeout().filter(|_| !draining);
            tokio::select! {
                Some(event) = inbox.recv() => self.handle(event),
                () = sleep_until(next) => {}
                Ok(()) = leases.changed() => self.plan.set_leases(*leases.borrow_and_update()),
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

    fn dial(&self, way: Way) {
        let Way { address, wire } = way;
        tracing::debug!(%address, protocol = wire.label(), "dialling");
        let (worker, events) = (self.worker.clone(), self.events.clone());
        let server = self.name_of(way);
        tokio::task::spawn_local(async move {
            let event = match reach(&worker, way, server.as_deref()).await {
                Ok(Progress::Reached(reached)) => Event::Reached(way, reached),
                Ok(Progress::Dialled(dialled)) => Event::Dialled(way, Box::new(Ok(*dialled))),
                Err(error) => Event::Dialled(way, Box::new(Err(error))),
            };
            // The connector outlives its dials, except at the very end.
            let _ = events.send(event);
        });
    }

    fn introduce(&self, way: Way, reached: Reached) {
        let (worker, events) = (self.worker.clone(), self.events.clone());
        tokio::task::spawn_local(async move {
            let dialled = reached.introduce(&worker).await;
            let dialled = dialled.map(Dialled::Quic).map_err(DialError::from);
            let _ = events.send(Event::Dialled(way, Box::new(dialled)));
        });
    }

    /// How the server is called that `way` was resolved from.
    fn name_of(&self, way: Way) -> Option<Rc<str>> {
        let leads = |(protocol, addresses): &(Protocol, Vec<SocketAddr>)| {
            let other = match way.wire {
                Wire::Quic => Protocol::Konnectivity,
                Wire::Grpc => Protocol::Quic,
            };
            *protocol != other && addresses.contains(&way.address)
        };
        let mut names = self.names.iter();
        let name = names.find_map(|(name, leads_to)| leads(leads_to).then_some(name));
        name.cloned()
    }

    fn resolved(&mut self, server: Rc<str>, resolved: io::Result<Vec<SocketAddr>>, now: Instant) {
        match resolved {
            Ok(addresses) => {
                self.unresolved.remove(&server);
                if let Some((_, known)) = self.names.get_mut(&server) {
                    *known = addresses;
                }
            }
            // What was known before may still be right. Said once, not at every try.
            Err(error) => {
                if self.unresolved.insert(server.clone()) {
                    tracing::warn!(%server, %error, "name not resolved, asking for ever");
                }
                return;
            }
        }
        let names = self.names.values();
        let addresses: Vec<_> = names
            .flat_map(|(protocol, addresses)| addresses.iter().map(|addr| (*addr, *protocol)))
            .collect();
        let known = |way: &Way| addresses.iter().any(|(address, _)| *address == way.address);
        self.complaints.retain(|way, _| known(way));
        self.plan.set_addresses(&addresses, now);
    }

    fn handle(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Resolved(server, resolved) => self.resolved(server, resolved, now),
            Event::Reached(way, reached) => {
                let server = &reached.identity.name;
                if self.plan.reached(way, server, now, chance()) {
                    self.introduce(way, *reached);
                } else {
                    tokio::task::spawn_local(reached.decline(CloseReason::DuplicateServer));
                }
            }
            Event::Dialled(way, dialled) => match *dialled {
                Ok(dialled) => self.welcomed(way, dialled, now),
                Err(error) => {
                    self.plan.failed(way, now, chance());
                    self.complain(way, &error);
                }
            },
            Event::Changed(number) => {
                let Some(tunnel) = self.tunnels.get(&number).cloned() else {
                    return;
                };
                let About {
                    server_id, stats, ..
                } = tunnel.about();
                let (wire, live) = (tunnel.wire(), stats.is_live());
                self.plan.changed(wire, server_id, number, live, now);
                if live && !self.plan.holds(wire, server_id, number) {
                    tokio::task::spawn_local(tunnel.retire());
                } else {
                    self.retire_superseded();
                }
            }
            Event::Ended(number, end) => {
                let Some(tunnel) = self.tunnels.remove(&number) else {
                    return;
                };
                let About { server_id, way, .. } = tunnel.about();
                let (address, protocol) = (way.address, way.wire.label());
                let (reason, why) = (end.reason.label(), end.why);
                if end.reason == CloseReason::Replaced || self.worker.is_draining() {
                    tracing::info!(server = %server_id, %address, protocol, reason, %why, "tunnel closed");
                } else {
                    tracing::warn!(server = %server_id, %address, protocol, reason, %why, "tunnel ended");
                }
                self.view.remove(number);
                let (wire, chance) = (way.wire, chance());
                self.plan.ended(wire, server_id, number, now, chance);
            }
        }
    }

    fn welcomed(&mut self, way: Way, dialled: Dialled, now: Instant) {
        self.last += 1;
        let number = self.last;
        let tunnel = dialled.tunnel();
        let About {
            server_id, stats, ..
        } = tunnel.about();
        let leads = dialled.leads();
        let verdict = self.plan.welcomed(way, number, leads, now, chance());
        if let Verdict::Conflict(other) = verdict {
            self.complain(
                way,
                &format_args!("{other} is a server {server_id} too; give each an id of its own"),
            );
        } else {
            self.complaints.remove(&way);
        }
        let worker = self.worker.clone();
        if verdict != Verdict::Keep {
            let declined = dialled.decline(worker, CloseReason::DuplicateServer);
            tokio::task::spawn_local(declined);
            return;
        }
        let refused = stats
            .refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(first) = refused.first() {
            tracing::warn!(
                server = %server_id, refused = refused.len(), claim = %first.claim, why = %first.why,
                "the server refuses claims; `cpc status` shows all"
            );
        }
        tracing::info!(
            server = %server_id, address = %way.address, protocol = way.wire.label(),
            servers = self.plan.server_count(), "tunnel is up"
        );
        self.view.insert(number, &tunnel);
        self.tunnels.insert(number, tunnel);
        let events = self.events.clone();
        tokio::task::spawn_local(async move {
            let changed = || drop(events.send(Event::Changed(number)));
            let end = dialled.serve(worker, changed).await;
            let _ = events.send(Event::Ended(number, end));
        });
        self.retire_superseded();
    }

    /// Lets go of gRPC where QUIC does the same: what lives on it lives on.
    fn retire_superseded(&mut self) {
        for number in self.plan.superseded() {
            if let Some(tunnel) = self.tunnels.get(&number) {
                let About { server_id, way, .. } = tunnel.about();
                tracing::info!(server = %server_id, address = %way.address, "QUIC takes over");
                tokio::task::spawn_local(tunnel.clone().retire());
            }
        }
    }

    /// Once for each kind of trouble with a way, not at every try. That a server does not speak
    /// QUIC is no trouble where the other protocol leads to it.
    fn complain(&mut self, way: Way, error: &dyn fmt::Display) {
        let text = error.to_string();
        if self.complaints.get(&way) == Some(&text) {
            return;
        }
        let Way { address, wire } = way;
        let protocol = wire.label();
        let reached = |tunnel: &Tunnel| tunnel.about().way.address == address;
        if self.tunnels.values().any(reached) {
            tracing::info!(%address, protocol, error = %text, "server not reached this way, trying for ever");
        } else {
            tracing::warn!(%address, protocol, error = %text, "server not reached, trying for ever");
        }
        self.complaints.insert(way, text);
    }
}

/// How far a dial has come.
enum Progress {
    Reached(Box<Reached>),
    Dialled(Box<Dialled>),
}

async fn reach(worker: &Worker, way: Way, server: Option<&str>) -> Result<Progress, DialError> {
    match (way.wire, &worker.material, &worker.konnectivity, server) {
        (Wire::Quic, Some(material), _, _) => {
            let reached = quic::reach(material, way.address).await?;
            Ok(Progress::Reached(Box::new(reached)))
        }
        (Wire::Grpc, _, Some(client), Some(server)) => {
            let metrics = &worker.proxy_metrics.streams;
            let dialled = konnectivity::dial(client, way, server, metrics).await?;
            Ok(Progress::Dialled(Box::new(Dialled::Grpc(dialled))))
        }
        _ => Err(DialError::NotConfigured),
    }
}

/// Resolves one name again and again, apart from the others: one that hangs delays nobody.
async fn keep_resolving(server: Rc<str>, events: mpsc::UnboundedSender<Event>) {
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
