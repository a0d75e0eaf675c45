//! Status and readiness of a server, and the metrics that are collected at each scrape.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use super::attachments::Health;
use super::control::{ControlHandle, SessionView};
use super::shard::Common;
use super::usage;
use cpc_config::ServerConfig;
use cpc_datapath::Engine;
use cpc_handover::peek_offset;
use cpc_host::lifecycle::Phase;
use cpc_host::report::report;
use cpc_identity::lifetime::{self, Lifetimes};
use cpc_identity::metrics::CertificateMetrics;
use cpc_observe::admin::Source;
use cpc_observe::admin::status::{
    AgentRow, ConnectionCounts, PeekOffset, Refused, ServerStatus, Status, rfc3339, since,
};
use cpc_observe::metrics::ours;
use cpc_observe::millis;
use cpc_redirect::Redirect;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    attachment: String,
    event: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AttachmentLabels {
    attachment: String,
}

/// A view of a running server.
pub(super) struct View {
    identity: String,
    control: ControlHandle,
    common: Common,
    shards: usize,
    engine: Engine,
    phase: watch::Receiver<Phase>,
    pin: Option<PathBuf>,
    events: Family<EventLabels, Counter>,
    health: Health,
    in_place: Family<AttachmentLabels, Gauge>,
    ready: Gauge,
    stalled: Gauge,
    breakers_open: Gauge,
    lifetimes: Lifetimes,
    certificates: CertificateMetrics,
}

impl View {
    /// Creates the view of a starting server. Adds its metrics to `registry`.
    pub(super) fn register(
        registry: &mut Registry,
        config: &ServerConfig,
        identity: String,
        engine: Engine,
        (common, health): (&Common, Health),
        lifetimes: Lifetimes,
    ) -> Self {
        let redirects = !config.redirect.attachments.is_empty();
        let view = Self {
            identity,
            control: common.control.clone(),
            common: common.clone(),
            shards: config.shards,
            engine,
            phase: common.phase.clone(),
            pin: redirects.then(|| config.redirect.pin.clone()),
            events: Family::default(),
            health,
            in_place: Family::default(),
            ready: Gauge::default(),
            stalled: Gauge::default(),
            breakers_open: common.metrics.breakers_open.clone(),
            certificates: CertificateMetrics::register(ours(registry), lifetimes.clone()),
            lifetimes,
        };
        let PeekOffset { ipv4, ipv6 } = peek_offset();
        common.metrics.sessions.set_peek_offset(ipv4, ipv6);
        let registry = ours(registry);
        registry.register(
            "redirect_events",
            "What the kernel programs did with connects, by attachment",
            view.events.clone(),
        );
        registry.register(
            "redirect_in_place",
            "1 while an attachment of the redirect is in place",
            view.in_place.clone(),
        );
        registry.register(
            "ready",
            "1 when the redirect is in place and an agent answers heartbeats",
            view.ready.clone(),
        );
        registry.register(
            "stalled_streams",
            "Streams whose local socket takes nothing at the moment",
            view.stalled.clone(),
        );
        view
    }

    fn attachments(&self) -> Result<Vec<cpc_redirect::Status>, cpc_redirect::RedirectError> {
        match &self.pin {
            Some(pin) => Redirect::new(pin).status(),
            None => Ok(Vec::new()),
        }
    }
}

impl Source for View {
    fn ready(&self) -> Result<(), String> {
        if *self.phase.borrow() != Phase::Running {
            return Err("draining".into());
        }
        let obstacle = self.lifetimes.obstacle(SystemTime::now());
        if let Some(faults) = self.common.faults.text() {
            return Err(faults);
        }
        self.health.check()?;
        if !self.control.is_ready() {
            return Err(obstacle.unwrap_or_else(|| "no agent answers heartbeats".into()));
        }
        // What is up goes on; an agent that leaves does not come back.
        obstacle.map_or(Ok(()), Err)
    }

    fn status(&self) -> Pin<Box<dyn Future<Output = serde_json::Value> + Send + '_>> {
        Box::pin(async {
            let mut agents: Vec<_> = self.control.view().await.iter().map(row).collect();
            agents.sort_by(|a, b| a.identity.cmp(&b.identity));
            let (attachments, error) = match self.attachments() {
                Ok(attachments) => (attachments, None),
                Err(error) => (Vec::new(), Some(report(&error))),
            };
            let (keeper, kept) = self.common.keeper.state();
            let status = Status::Server(ServerStatus {
                identity: self.identity.clone(),
                version: env!("CARGO_PKG_VERSION").into(),
                ready: self.ready().is_ok(),
                not_ready: self.ready().err(),
                shards: self.shards,
                engine: self.engine.label().into(),
                breakers_open: self.breakers_open.get(),
                connections: ConnectionCounts {
                    open: self.common.connections.in_use(),
                    held: self.common.metrics.sessions.held.get(),
                    waiting: self.common.waiting_sessions.in_use(),
                    waiting_since: self.common.metrics.sessions.waiting.longest().map(since),
                    kept,
                    keeper,
                    peek_offset: peek_offset(),
                },
                certificates: lifetime::rows(&self.lifetimes, SystemTime::now()),
                agents,
                attachments: attachments
                    .iter()
                    .filter_map(|a| serde_json::to_value(a).ok())
                    .collect(),
                attachments_error: error,
            });
            serde_json::to_value(status).unwrap_or_default()
        })
    }

    fn refresh(&self) {
        self.certificates.refresh();
        self.ready.set(self.ready().is_ok().into());
        self.stalled
            .set(i64::try_from(self.common.budget.stalled()).unwrap_or(i64::MAX));
        usage::refresh(&self.common.metrics.limits, &self.common);
        let (_, kept) = self.common.keeper.state();
        self.common.metrics.sessions.kept.set(kept as i64);
        if let Some(observer) = &self.common.observer {
            observer.set_backends(&self.control.backends());
        }
        for (attachment, fault) in self.health.all() {
            let labels = AttachmentLabels { attachment };
            let in_place = self.in_place.get_or_create(&labels);
            in_place.set(fault.is_none().into());
        }
        for attachment in self.attachments().unwrap_or_default() {
            for (event, count) in attachment.counters {
                let labels = EventLabels {
                    attachment: attachment.name.clone(),
                    event,
                };
                self.events
                    .get_or_create(&labels)
                    .inner()
                    .store(count, Ordering::Relaxed);
            }
        }
    }
}

fn row(session: &SessionView) -> AgentRow {
    let info = &session.info;
    let state = if info.silent.load(Ordering::Relaxed) {
        "silent"
    } else if info.draining.load(Ordering::Relaxed) {
        "draining"
    } else {
        "live"
    };
    let path = info.probe.path();
    AgentRow {
        identity: info.identity.to_string(),
        protocol: info.kind.label().into(),
        address: path.remote.to_string(),
        shard: info.shard,
        state: state.into(),
        rtt_ms: millis(path.rtt),
        mtu: path.mtu,
        streams: info.streams.load(Ordering::Relaxed),
        up_bytes: info.totals.up.load(Ordering::Relaxed),
        down_bytes: info.totals.down.load(Ordering::Relaxed),
        routes: session.claims.iter().map(ToString::to_string).collect(),
        refused: session
            .refused
            .iter()
            .map(|r| Refused {
                claim: r.claim.clone(),
                why: r.why.clone(),
            })
            .collect(),
        since: rfc3339(info.since),
    }
}
