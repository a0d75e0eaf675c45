//! The connector holds tunnels to every server until the process ends. It resolves names, has shards
//! dial by [`Plan`], and decides which tunnels are kept. It runs beside the shards, where each tunnel
//! lives ([`tunnel_task`]).
//!
//! [`tunnel_task`]: super::tunnel_task

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;

use super::address::{Resolved, keep_resolving};
use super::plan::{Health, Plan, ServerEndpoint, Verdict};
use super::shards::Dispatch;
use super::tunnel::{End, GOODBYE, TunnelInfo};
use super::tunnel_task::{Event, TunnelCommand, TunnelTask, Welcomed};
use super::tunnel_views::{TunnelView, Tunnels};
use cpc_config::agent::Protocol;
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::lifecycle::{self, Phase};
use cpc_host::report::report;
use cpc_observe::complaint::Complaint;
use cpc_transport::quic::steering::Spread;

/// Addresses of servers, and the number of tunnels.
pub(super) struct Servers {
    /// "host:port" of each server, and its protocol.
    pub addresses: Vec<(Arc<str>, Protocol)>,
    /// Number of proxy-servers by their leases, where those are watched.
    pub leases: watch::Receiver<Option<u32>>,
    /// Whether the number that proxy-servers report counts as well.
    pub count_both: bool,
    /// Number of tunnels to each server over QUIC.
    pub tunnels: u8,
}

/// Connects until the process drains; then waits for the end and closes everything.
pub(super) async fn run(
    shards: Dispatch,
    phase: watch::Receiver<Phase>,
    connections: ConcurrencyLimit,
    servers: Servers,
    view: Arc<Tunnels>,
) {
    let Servers {
        addresses,
        leases,
        count_both,
        tunnels,
    } = servers;
    let mut plan = Plan::default();
    plan.set_tunnels(tunnels.into());
    if count_both {
        plan.count_both();
    }
    let (events, inbox) = mpsc::unbounded_channel();
    let mut connector = Connector {
        shards,
        phase,
        connections,
        plan,
        spread: Spread::random(tunnels > 1),
        dialling: HashMap::new(),
        tunnels: HashMap::new(),
        complaints: HashMap::new(),
        names: HashMap::new(),
        unresolved: HashSet::new(),
        last: 0,
        events,
        view,
    };
    let (answers, resolved) = mpsc::unbounded_channel();
    for (server, protocol) in addresses {
        connector
            .names
            .insert(server.clone(), (protocol, Vec::new()));
        tokio::spawn(keep_resolving(server, answers.clone()));
    }
    connector.connect(inbox, resolved, leases).await;
}

struct Connector {
    shards: Dispatch,
    phase: watch::Receiver<Phase>,
    /// Closed at the end, when no connection was left.
    connections: ConcurrencyLimit,
    plan: Plan,
    spread: Spread,
    /// Places of the tunnels that are being dialled.
    dialling: HashMap<u64, Place>,
    tunnels: HashMap<u64, HeldTunnel>,
    complaints: HashMap<ServerEndpoint, Complaint>,
    /// Addresses of the servers' names.
    names: HashMap<Arc<str>, (Protocol, Vec<SocketAddr>)>,
    unresolved: HashSet<Arc<str>>,
    last: u64,
    events: mpsc::UnboundedSender<Event>,
    view: Arc<Tunnels>,
}

/// Place of a tunnel.
#[derive(Clone, Copy, Debug)]
struct Place {
    shard: usize,
    /// Number of the tunnel among those at its address; its successor gets the same number.
    slot: u8,
}

/// A tunnel that is kept.
struct HeldTunnel {
    info: TunnelInfo,
    place: Place,
    commands: mpsc::UnboundedSender<TunnelCommand>,
}

impl HeldTunnel {
    /// Sends an order; no effect on a tunnel that is ending.
    fn send(&self, command: TunnelCommand) {
        let _ = self.commands.send(command);
    }
}

impl Connector {
    async fn connect(
        &mut self,
        mut inbox: mpsc::UnboundedReceiver<Event>,
        mut resolved: mpsc::UnboundedReceiver<Resolved>,
        mut leases: watch::Receiver<Option<u32>>,
    ) {
        let stopping = lifecycle::stopping(self.phase.clone());
        let ended = lifecycle::ended(self.phase.clone());
        let (mut stopping, mut ended) = (std::pin::pin!(stopping), std::pin::pin!(ended));
        let mut draining = false;
        loop {
            if !draining {
                for endpoint in self.plan.due(Instant::now()) {
                    self.dial(endpoint);
                }
            }
            // Leases change it, a welcome, and a tunnel's end.
            self.view.set_server_count(self.plan.server_count());
            let next = self.plan.next_timeout().filter(|_| !draining);
            tokio::select! {
                Some(event) = inbox.recv() => self.handle(event),
                Some((server, answer)) = resolved.recv() => {
                    self.resolved(server, answer, Instant::now());
                }
                () = sleep_until(next) => {}
                Ok(()) = leases.changed() => self.plan.set_leases(*leases.borrow_and_update()),
                () = &mut stopping, if !draining => draining = true,
                () = &mut ended => break,
            }
        }
        // With the first a server knows that a dial which has no answer yet was not served, and may go
        // elsewhere. A tunnel says so only where no answer can be on its way.
        let reason = match self.connections.is_closed() {
            true => CloseReason::Draining,
            false => CloseReason::Shutdown,
        };
        for tunnel in self.tunnels.values() {
            tunnel.send(TunnelCommand::Close(reason));
        }
        // Each tunnel says goodbye and reports its end. What is still being dialled ends with its
        // shard.
        let goodbyes = async {
            while !self.tunnels.is_empty() {
                match inbox.recv().await {
                    Some(event @ Event::Ended(..)) => self.handle(event),
                    Some(_) => {}
                    None => break,
                }
            }
        };
        let _ = timeout(2 * GOODBYE, goodbyes).await;
    }

    fn dial(&mut self, endpoint: ServerEndpoint) {
        let ServerEndpoint { address, kind } = endpoint;
        self.last += 1;
        let number = self.last;
        let held = self.tunnels.values();
        let held: Vec<_> = held
            .map(|held| (held.info.endpoint.address, held.place))
            .collect();
        let taken = |slot: &u8| {
            let mut held = held.iter();
            held.any(|(to, place)| *to == address && place.slot == *slot)
        };
        let slot = (0..u8::MAX).find(|slot| !taken(slot)).unwrap_or_default();
        let held = held.iter().map(|(to, place)| (*to, place.shard));
        let (shard, Some(place)) = self.shards.place(address, held) else {
            return;
        };
        tracing::debug!(%address, protocol = kind.label(), shard, "dialling");
        self.dialling.insert(number, Place { shard, slot });
        let task = TunnelTask {
            number,
            endpoint,
            server: self.name_of(endpoint),
            spread: (self.spread, slot),
            events: self.events.clone(),
            place,
        };
        self.shards.send(shard, task);
    }

    /// Returns the server name that `way` was resolved from.
    fn name_of(&self, endpoint: ServerEndpoint) -> Option<Arc<str>> {
        let server_info = |(protocol, addresses): &(Protocol, Vec<SocketAddr>)| {
            protocol.kinds().contains(&endpoint.kind) && addresses.contains(&endpoint.address)
        };
        let mut names = self.names.iter();
        let name = names.find_map(|(name, leads_to)| server_info(leads_to).then_some(name));
        name.cloned()
    }

    fn resolved(&mut self, server: Arc<str>, resolved: io::Result<Vec<SocketAddr>>, now: Instant) {
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
                    tracing::warn!(%server, error = report(&error), "name not resolved, retrying");
                }
                return;
            }
        }
        let names = self.names.values();
        let addresses: Vec<_> = names
            .flat_map(|(protocol, addresses)| addresses.iter().map(|addr| (*addr, *protocol)))
            .collect();
        let known = |endpoint: &ServerEndpoint| {
            addresses
                .iter()
                .any(|(address, _)| *address == endpoint.address)
        };
        self.complaints.retain(|endpoint, _| known(endpoint));
        self.plan.set_addresses(&addresses, now);
    }

    fn handle(&mut self, event: Event) {
        let now = Instant::now();
        match event {
            Event::Reached(endpoint, number, server, introduce) => {
                let wanted = self.plan.reached(endpoint, &server, now, chance());
                if !wanted {
                    self.dialling.remove(&number);
                }
                let _ = introduce.send(wanted);
            }
            Event::Failed(endpoint, number, error) => {
                self.dialling.remove(&number);
                self.plan.failed(endpoint, now, chance());
                self.complain(endpoint, &error);
            }
            Event::Welcomed(tunnel) => self.welcomed(*tunnel, now),
            Event::Changed(number) => {
                let Some(tunnel) = self.tunnels.get(&number) else {
                    return;
                };
                let TunnelInfo {
                    server_id,
                    endpoint,
                    stats,
                } = &tunnel.info;
                let (kind, health) = (endpoint.kind, stats.health());
                self.plan.changed(kind, server_id, number, health, now);
                if health == Health::Live && !self.plan.holds(kind, server_id, number) {
                    tunnel.send(TunnelCommand::Retire);
                } else {
                    self.retire_superseded();
                }
            }
            Event::Ended(number, end) => self.ended(number, &end, now),
        }
    }

    fn ended(&mut self, number: u64, end: &End, now: Instant) {
        let Some(HeldTunnel { info, .. }) = self.tunnels.remove(&number) else {
            return;
        };
        let TunnelInfo {
            server_id,
            endpoint,
            ..
        } = &info;
        let (address, protocol) = (endpoint.address, endpoint.kind.label());
        let (reason, why) = (end.reason.label(), &end.why);
        if end.reason == CloseReason::Replaced || *self.phase.borrow() != Phase::Running {
            tracing::info!(server = %server_id, %address, protocol, reason, %why, "tunnel closed");
        } else {
            tracing::warn!(server = %server_id, %address, protocol, reason, %why, "tunnel ended");
        }
        self.view.remove(number);
        self.plan
            .ended(endpoint.kind, server_id, number, now, chance());
    }

    fn welcomed(&mut self, tunnel: Welcomed, now: Instant) {
        let Welcomed {
            number,
            info,
            server_info,
            probe,
            commands,
            keep,
        } = tunnel;
        let Some(place) = self.dialling.remove(&number) else {
            return;
        };
        let TunnelInfo {
            server_id,
            endpoint,
            stats,
        } = &info;
        let endpoint = *endpoint;
        let verdict = self
            .plan
            .welcomed(endpoint, number, server_info, now, chance());
        if let Verdict::Conflict(other) = verdict {
            self.complain(
                endpoint,
                &format_args!("{other} is a server {server_id} too; give each an id of its own"),
            );
        } else {
            self.complaints.remove(&endpoint);
        }
        if verdict != Verdict::Keep {
            let _ = keep.send(false);
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
            server = %server_id, address = %endpoint.address, protocol = endpoint.kind.label(),
            servers = self.plan.server_count(), shard = place.shard, "tunnel is up"
        );
        let view = TunnelView::new(info.clone(), probe, place.shard);
        self.view.insert(number, view);
        let held = HeldTunnel {
            info,
            place,
            commands,
        };
        self.tunnels.insert(number, held);
        // Without effect on one that has been lost meanwhile: it tells its end.
        let _ = keep.send(true);
        self.retire_superseded();
    }

    /// Retires gRPC tunnels where QUIC does the same: their connections go on.
    fn retire_superseded(&mut self) {
        for number in self.plan.superseded() {
            if let Some(tunnel) = self.tunnels.get(&number) {
                let TunnelInfo {
                    server_id,
                    endpoint,
                    ..
                } = &tunnel.info;
                tracing::info!(server = %server_id, address = %endpoint.address, "QUIC takes over");
                tunnel.send(TunnelCommand::Retire);
            }
        }
    }

    /// Logs an error of a way once per kind, not at every attempt. A server that does not speak QUIC is
    /// no error where the other protocol leads to it.
    fn complain(&mut self, endpoint: ServerEndpoint, error: &dyn fmt::Display) {
        let text = error.to_string();
        if !self.complaints.entry(endpoint).or_default().is_news(&text) {
            return;
        }
        let ServerEndpoint { address, kind } = endpoint;
        let protocol = kind.label();
        let reached = |tunnel: &HeldTunnel| tunnel.info.endpoint.address == address;
        if self.tunnels.values().any(reached) {
            tracing::info!(%address, protocol, error = text, "server not reached this way, retrying");
        } else {
            tracing::warn!(%address, protocol, error = text, "server not reached, retrying");
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Returns a random number in 0..1.
fn chance() -> f64 {
    let mut byte = [0];
    // Without random numbers all agents would dial at once, which is no harm to this one.
    let _ = aws_lc_rs::rand::fill(&mut byte);
    f64::from(byte[0]) / 256.0
}
