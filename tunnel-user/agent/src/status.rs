//! Status and readiness of an agent, and the metrics that are collected at each scrape.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use super::observer::Observer;
use super::plan::Health;
use super::sessions::Sessions;
use super::tunnel_info::TunnelInfo;
use super::tunnel_views::{TunnelView, Tunnels};
use super::worker::{CONNECTIONS, STALLED_BYTES, WAITING_SESSIONS, Worker};
use cpc_config::allow_list::AllowList;
use cpc_datapath::{Budget, Engine};
use cpc_handover::{KeeperHandle, peek_offset};
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::lifecycle::Phase;
use cpc_identity::lifetime::{self, Lifetimes};
use cpc_identity::metrics::CertificateMetrics;
use cpc_observe::admin::Source;
use cpc_observe::admin::status::{
    AgentStatus, ConnectionCounts, PeekOffset, Refused, ServerRow, Status, rfc3339, since,
};
use cpc_observe::limits::LimitMetrics;
use cpc_observe::millis;

/// Facts about a running agent that its view shows.
pub(super) struct Facts {
    /// Identity of the agent.
    pub identity: String,
    /// Number of shards.
    pub shards: usize,
    /// Engine of the shards.
    pub engine: Engine,
    /// Kept tunnels.
    pub tunnels: Arc<Tunnels>,
    /// Lifetimes of the agent's certificates.
    pub lifetimes: Lifetimes,
}

/// A view of a running agent.
pub(super) struct View {
    facts: Facts,
    policy: Arc<ArcSwap<AllowList>>,
    budget: Budget,
    connections: ConcurrencyLimit,
    sessions: Arc<Sessions>,
    keeper: KeeperHandle,
    limits: LimitMetrics,
    phase: watch::Receiver<Phase>,
    servers: Gauge,
    stalled: Gauge,
    certificates: CertificateMetrics,
    observer: Option<Arc<dyn Observer>>,
}

impl View {
    /// Creates the view of a starting agent, whose tunnels share `worker`. Adds its metrics to `registry`.
    pub(super) fn register(registry: &mut Registry, worker: &Worker, facts: Facts) -> Self {
        let certificates = CertificateMetrics::register(registry, facts.lifetimes.clone());
        let PeekOffset { ipv4, ipv6 } = peek_offset();
        worker.sessions.metrics.set_peek_offset(ipv4, ipv6);
        let (servers, stalled) = (Gauge::default(), Gauge::default());
        registry.register(
            "servers",
            "Servers that hold a live tunnel",
            servers.clone(),
        );
        registry.register(
            "stalled_streams",
            "Streams whose target takes nothing at the moment",
            stalled.clone(),
        );
        Self {
            facts,
            policy: worker.policy.clone(),
            budget: worker.budget.clone(),
            connections: worker.connections.clone(),
            sessions: worker.sessions.clone(),
            keeper: worker.keeper.clone(),
            limits: worker.limits.clone(),
            phase: worker.phase(),
            servers,
            stalled,
            certificates,
            observer: worker.observer.clone(),
        }
    }
}

impl Source for View {
    fn ready(&self) -> Result<(), String> {
        if *self.phase.borrow() != Phase::Running {
            return Err("draining".into());
        }
        let obstacle = self.facts.lifetimes.obstacle(SystemTime::now());
        if self.facts.tunnels.live_servers() == 0 {
            return Err(obstacle.unwrap_or_else(|| "no server is reached".into()));
        }
        // What is up goes on; a tunnel that is lost does not come back.
        obstacle.map_or(Ok(()), Err)
    }

    fn status(&self) -> Pin<Box<dyn Future<Output = serde_json::Value> + Send + '_>> {
        let (keeper, kept) = self.keeper.state();
        let status = Status::Agent(AgentStatus {
            identity: self.facts.identity.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            ready: self.ready().is_ok(),
            not_ready: self.ready().err(),
            server_count: self.facts.tunnels.server_count(),
            shards: self.facts.shards,
            engine: self.facts.engine.label().into(),
            connections: ConnectionCounts {
                open: self.connections.in_use(),
                held: self.sessions.metrics.held.get(),
                waiting: self.sessions.waiting.in_use(),
                waiting_since: self.sessions.metrics.waiting.longest().map(since),
                kept,
                keeper,
                peek_offset: peek_offset(),
            },
            certificates: lifetime::rows(&self.facts.lifetimes, SystemTime::now()),
            servers: self.facts.tunnels.view().iter().map(row).collect(),
            allow: self.policy.load().rules().collect(),
        });
        Box::pin(async { serde_json::to_value(status).unwrap_or_default() })
    }

    fn refresh(&self) {
        self.certificates.refresh();
        let live = self.facts.tunnels.live_servers();
        self.servers.set(i64::try_from(live).unwrap_or(i64::MAX));
        let known = self.facts.tunnels.server_count().max(1);
        if let Some(observer) = &self.observer {
            observer.servers_counted(live, known as usize);
        }
        let stalled = self.budget.stalled();
        self.stalled.set(i64::try_from(stalled).unwrap_or(i64::MAX));
        self.limits.set_used(STALLED_BYTES, self.budget.used());
        let connections = self.connections.in_use() as u64;
        self.limits.set_used(CONNECTIONS, connections);
        let (_, kept) = self.keeper.state();
        self.sessions.metrics.kept.set(kept as i64);
        let waiting = self.sessions.waiting.in_use() as u64;
        self.limits.set_used(WAITING_SESSIONS, waiting);
    }
}

fn row(tunnel: &TunnelView) -> ServerRow {
    let TunnelInfo {
        server_id,
        endpoint,
        stats,
    } = &tunnel.info;
    let state = match stats.health() {
        Health::Silent => "silent",
        Health::Draining => "draining",
        Health::Live => "live",
    };
    let refused = stats.refused.lock().unwrap_or_else(PoisonError::into_inner);
    ServerRow {
        server_id: server_id.to_string(),
        address: endpoint.address.to_string(),
        shard: tunnel.shard,
        protocol: endpoint.kind.label().into(),
        state: state.into(),
        rtt_ms: tunnel.rtt().map(millis),
        mtu: tunnel.mtu(),
        streams: stats.streams.load(Ordering::Relaxed),
        up_bytes: stats.totals.up.load(Ordering::Relaxed),
        down_bytes: stats.totals.down.load(Ordering::Relaxed),
        routes: stats
            .accepted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone(),
        refused: refused
            .iter()
            .map(|r| Refused {
                claim: r.claim.clone(),
                why: r.why.clone(),
            })
            .collect(),
        since: rfc3339(stats.since),
    }
}
