//! Driver of the [`Connector`]: resolves names, starts tunnel tasks on shards, and passes events and
//! answers between both. Runs beside the shards.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;

use super::{Action, Connector, Dial, Event};
use crate::address::{Resolved, keep_resolving};
use crate::dial_target::{DialTarget, Established, TaskEvent, TunnelCommand};
use crate::extension::ServerCount;
use crate::handover::{Handover, Stage};
use crate::shards::Dispatch;
use crate::tunnel::GOODBYE;
use crate::tunnel_info::TunnelInfo;
use crate::tunnel_task::TunnelTask;
use crate::tunnel_views::{TunnelView, Tunnels};
use cpc_config::agent::Protocol;
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::lifecycle::{self, Phase};
use cpc_host::random;
use cpc_host::report::report;
use cpc_transport::quic::steering::Spread;

/// Addresses of servers, and the number of tunnels.
pub(crate) struct Servers {
    /// "host:port" of each server, and its protocol.
    pub addresses: Vec<(Arc<str>, Protocol)>,
    /// Number of foreign servers.
    pub foreign: ServerCount,
    /// Number of native tunnels to each server.
    pub tunnels: u8,
}

/// Connects until the process drains; then waits for the end and closes everything.
pub(crate) async fn run(
    shards: Dispatch,
    phase: watch::Receiver<Phase>,
    connections: ConcurrencyLimit,
    servers: Servers,
    (view, handover): (Arc<Tunnels>, Handover),
) {
    let Servers {
        addresses,
        foreign,
        tunnels,
    } = servers;
    // Bounded by their senders: a name has one resolution at a time, a tunnel at most one question, and its
    // server changes its health only after the time of a heartbeat.
    let (answers, resolved) = mpsc::unbounded_channel();
    for (server, _) in &addresses {
        tokio::spawn(keep_resolving(server.clone(), answers.clone()));
    }
    let (events, inbox) = mpsc::unbounded_channel();
    let driver = Driver {
        connector: Connector::new(addresses, tunnels, foreign.or_reported),
        shards,
        phase,
        spread: Spread::random(tunnels > 1),
        tunnels: HashMap::new(),
        events,
        view,
        handover,
    };
    driver
        .run(inbox, resolved, foreign.count, connections)
        .await;
}

struct Driver {
    connector: Connector,
    shards: Dispatch,
    phase: watch::Receiver<Phase>,
    spread: Spread,
    /// Tunnels by number, from their dial to their end.
    tunnels: HashMap<u64, Tunnel>,
    events: mpsc::UnboundedSender<(u64, TaskEvent)>,
    view: Arc<Tunnels>,
    handover: Handover,
}

/// A tunnel, on a shard.
struct Tunnel {
    address: SocketAddr,
    shard: usize,
    commands: mpsc::UnboundedSender<TunnelCommand>,
    /// Set by Welcome.
    established: Option<Established>,
}

impl Driver {
    async fn run(
        mut self,
        mut inbox: mpsc::UnboundedReceiver<(u64, TaskEvent)>,
        mut resolved: mpsc::UnboundedReceiver<Resolved>,
        mut counts: watch::Receiver<Option<u32>>,
        connections: ConcurrencyLimit,
    ) {
        let stopping = lifecycle::stopping(self.phase.clone());
        let ended = lifecycle::ended(self.phase.clone());
        let (mut stopping, mut ended) = (std::pin::pin!(stopping), std::pin::pin!(ended));
        let mut is_draining = false;
        let mut stage = self.handover.subscribe();
        loop {
            let next = self.connector.poll_timeout();
            tokio::select! {
                Some((number, event)) = inbox.recv() => self.pass_on(number, event),
                Some((server, answer)) = resolved.recv() => {
                    let answer = answer.map_err(|error| report(&error));
                    self.handle(Event::Resolved(server, answer));
                }
                () = sleep_until(next) => self.handle(Event::Timeout),
                Ok(()) = counts.changed() => {
                    let count = *counts.borrow_and_update();
                    self.handle(Event::ForeignServers(count));
                }
                Ok(()) = stage.changed() => {
                    let is_paused = *stage.borrow_and_update() != Stage::Serving;
                    self.handle(Event::Paused(is_paused));
                }
                () = &mut stopping, if !is_draining => {
                    is_draining = true;
                    self.handle(Event::Draining);
                }
                () = &mut ended => break,
            }
        }
        // With the first a server knows that a dial which has no answer yet was not served, and may go
        // elsewhere. A tunnel says so only where no answer can be on its way.
        let reason = match (self.handover.stage(), connections.is_closed()) {
            (Stage::Left, _) => CloseReason::HandedOver,
            (_, true) => CloseReason::Draining,
            (_, false) => CloseReason::Shutdown,
        };
        self.handle(Event::Stopping(reason));
        // Each tunnel says goodbye and reports its end. What is still being dialled ends with its
        // shard.
        let goodbyes = async {
            while self.connector.has_tunnels() {
                match inbox.recv().await {
                    Some((number, event)) => self.pass_on(number, event),
                    None => break,
                }
            }
        };
        let _ = timeout(2 * GOODBYE, goodbyes).await;
    }

    /// Passes an event of a tunnel's task to the connector.
    fn pass_on(&mut self, number: u64, event: TaskEvent) {
        let event = match event {
            TaskEvent::Reached(server) => Event::Reached(number, server),
            TaskEvent::Failed(error) => {
                self.tunnels.remove(&number);
                Event::Failed(number, error)
            }
            TaskEvent::Welcomed(server, established) => {
                if let Some(tunnel) = self.tunnels.get_mut(&number) {
                    tunnel.established = Some(established);
                }
                Event::Welcomed(number, server)
            }
            TaskEvent::Changed => {
                let tunnel = self.tunnels.get(&number);
                let Some(Established { info, .. }) = tunnel.and_then(|it| it.established.as_ref())
                else {
                    return;
                };
                Event::Changed(number, info.stats.health())
            }
            TaskEvent::Ended(end) => {
                self.tunnels.remove(&number);
                self.view.remove(number);
                Event::Ended(number, end)
            }
        };
        self.handle(event);
    }

    fn handle(&mut self, event: Event) {
        let now = Instant::now();
        // Before an event that follows from the drain.
        if *self.phase.borrow() != Phase::Running {
            self.connector.handle(Event::Draining, now, chance());
        }
        self.connector.handle(event, now, chance());
        // The count of foreign servers changes it, a welcome, and a tunnel's end.
        self.view.set_server_count(self.connector.server_count());
        while let Some(action) = self.connector.poll_action() {
            match action {
                Action::Dial(dial) => self.dial(dial),
                Action::Introduce(number) => self.command(number, TunnelCommand::Proceed),
                Action::Keep(number) => {
                    self.note_kept(number);
                    self.command(number, TunnelCommand::Proceed);
                }
                Action::Decline(number) => {
                    self.command(number, TunnelCommand::Decline);
                    self.tunnels.remove(&number);
                }
                Action::Retire(number) => self.command(number, TunnelCommand::Retire),
                Action::Close(number, reason) => {
                    self.command(number, TunnelCommand::Close(reason));
                }
                Action::Log(notice) => notice.write(),
            }
        }
    }

    fn dial(&mut self, dial: Dial) {
        let Dial {
            number,
            endpoint,
            server,
            slot,
        } = dial;
        let address = endpoint.address;
        let established = self.tunnels.values();
        let established = established.filter(|tunnel| tunnel.established.is_some());
        let held = established.map(|tunnel| (tunnel.address, tunnel.shard));
        let (shard, permit) = self.shards.place(address, held);
        tracing::debug!(%address, protocol = endpoint.kind.label(), shard, "dialling");
        // A tunnel gets a few commands in its life, from the connector alone.
        let (commands, inbox) = mpsc::unbounded_channel();
        let target = DialTarget {
            number,
            endpoint,
            server,
            spread: (self.spread, slot),
            events: self.events.clone(),
            commands: inbox,
        };
        let tunnel = Tunnel {
            address,
            shard,
            commands,
            established: None,
        };
        self.tunnels.insert(number, tunnel);
        self.shards.send(shard, TunnelTask { target, permit });
    }

    /// Sends a command; no effect on a tunnel that is ending.
    fn command(&self, number: u64, command: TunnelCommand) {
        if let Some(tunnel) = self.tunnels.get(&number) {
            let _ = tunnel.commands.send(command);
        }
    }

    fn note_kept(&self, number: u64) {
        let Some(tunnel) = self.tunnels.get(&number) else {
            return;
        };
        let (shard, Some(Established { info, probe })) = (tunnel.shard, &tunnel.established) else {
            return;
        };
        let TunnelInfo {
            server_id,
            endpoint,
            stats,
        } = info;
        let refused = stats.refused.lock();
        let refused = refused.unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = refused.first() {
            tracing::warn!(
                server = %server_id, refused = refused.len(), claim = %first.claim, why = %first.why,
                "the server refuses claims; `cpc status` shows all"
            );
        }
        drop(refused);
        tracing::info!(
            server = %server_id, address = %endpoint.address, protocol = endpoint.kind.label(),
            servers = self.connector.server_count(), shard, "tunnel is up"
        );
        let view = TunnelView::new(info.clone(), probe.clone(), shard);
        self.view.insert(number, view);
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
    let _ = random::fill(&mut byte);
    f64::from(byte[0]) / 256.0
}
