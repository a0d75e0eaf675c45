//! The last stage: all that serves runs until a signal ends the process.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tunnel_proto::session::InstanceId;

use super::prepared::Prepared;
use super::reload::Reload;
use crate::agent_identity::AgentIdentity;
use crate::connector::{self, Servers};
use crate::error::AgentError;
use crate::extension::ServerCount;
use crate::handover::kept::{self, take_kept};
use crate::handover::{Handover, ROLE, Served, Stage, take_over};
use crate::policy::Policy;
use crate::predecessor;
use crate::quic::QuicDialer;
use crate::renew::{self, Renewals};
use crate::sessions::Sessions;
use crate::shards::Dispatch;
use crate::status::{Facts, View};
use crate::tunnel::TunnelDialer;
use crate::tunnel_views::Tunnels;
use crate::worker::{STALLED_BYTES, Worker};
use cpc_config::{AgentConfig, ConfigError};
use cpc_datapath::shard::Shards;
use cpc_datapath::{Budget, reclaim};
use cpc_handover::{Endpoint, KeeperHandle, KeeperSpec, KeptListeners, Predecessor, Succession};
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::environment::{Reloads, Stops};
use cpc_host::lifecycle::{self, End, Phase};
use cpc_host::random;
use cpc_identity::Material;
use cpc_identity::lifetime;
use cpc_identity::material::{Change, MaterialError};
use cpc_observe::admin::{self, Admin};
use cpc_observe::audit::events as audit;
use cpc_observe::limits::LimitMetrics;
use cpc_observe::logging::LogHandle;
use cpc_observe::metrics::ours;
use cpc_observe::sessions::SessionMetrics;
use cpc_session::Bounds;
use cpc_session::window::credit;
use cpc_transport::quic::MemoryBounds;
use cpc_transport::quic::config::Setup;

/// Polling interval of a draining agent for the end of its connections.
const IDLE_POLL: Duration = Duration::from_millis(50);

/// An agent at work.
pub(crate) struct Serving {
    config: AgentConfig,
    identity: AgentIdentity,
    shards: Shards,
    succession: Succession<Served>,
    connector: JoinHandle<()>,
    connections: ConcurrencyLimit,
    phase: watch::Sender<Phase>,
    stops: Stops,
    reload_requests: Reloads,
    reload: Reload,
}

impl Serving {
    /// Starts shards, the connector and watchers, and tells systemd once they run.
    ///
    /// # Errors
    /// [`AgentError`], before any server is dialled.
    pub(crate) async fn start(
        from: Prepared,
        log: LogHandle,
        predecessor: Option<Predecessor>,
    ) -> Result<Self, AgentError> {
        let Prepared {
            config,
            stops,
            reload_requests,
            restarts,
            mut inherited,
            shares,
            identity,
            claims,
            policy,
            admin,
            probes,
            mut shards,
            mut registry,
            dials,
            reloads,
            limits,
        } = from;
        let (offers, serve) = watch::channel(claims);
        let (phase, phases) = watch::channel(Phase::Running);
        let views = Arc::new(Tunnels::default());
        let budget = Budget::new(config.limits.stalled_bytes);
        let connections = ConcurrencyLimit::new(config.limits.connections);
        let setup = setup(&config, &budget, &limits, &mut registry);
        let extension = identity.extension();
        let foreign = extension.count_servers().await;
        let foreign = foreign.map_err(AgentError::Extension)?;
        let renewals = Renewals::default();
        let metrics = SessionMetrics::register(ours(&mut registry));
        let dialers = dialers(&identity, setup).collect();
        let bounds = Bounds {
            bytes: config.limits.session_bytes,
            window: config.limits.stream_window.into(),
            budget: budget.part(config.limits.stalled_bytes / 2),
            held: metrics.held.clone(),
        };
        let (resume, waiting) = (config.limits.resume, config.limits.waiting_sessions);
        let sessions = Sessions::new(bounds, metrics, resume, waiting);
        let mut worker = Worker {
            node: identity.name(),
            material: identity.material.clone(),
            instance: instance()?,
            incarnation: 0,
            predecessor: None,
            serve,
            renewals: renewals.clone(),
            policy: policy.in_force().clone(),
            answered: Arc::default(),
            metrics: dials,
            observer: extension.observer(),
            budget: budget.clone(),
            phase: phases.clone(),
            connections: connections.clone(),
            limits,
            sessions,
            handover: Handover::new(),
            keeper: KeeperHandle::new(keeper_of(&config, &identity.name())),
        };
        let has_predecessor = predecessor.is_some();
        match predecessor {
            Some(predecessor) => {
                take_over(predecessor, &mut worker)?;
                inherited.close_unused();
                worker.keeper.open(&kept::process(&worker));
            }
            None => take_kept(&mut worker),
        }
        tokio::spawn(worker.keeper.clone().watch(kept::process(&worker)));
        let state_dir = config.state_dir.as_deref();
        worker.predecessor = predecessor::take(state_dir, worker.instance);
        let endpoint = match (state_dir, restarts.is_process()) {
            (Some(state_dir), true) => Endpoint::open(state_dir, ROLE, has_predecessor),
            _ => None,
        };
        tokio::spawn(worker.sessions.clone().watch(worker.clone()));
        let facts = Facts {
            identity: identity.to_string(),
            shards: config.shards,
            engine: shards.engines().engine(),
            tunnels: views.clone(),
            lifetimes: identity.lifetimes(),
        };
        let view = View::register(ours(&mut registry), &worker, facts);
        let dispatch = Dispatch::start(&mut shards, config.shards, &worker, &dialers)?;
        // It keeps the shards as long as it lives.
        let connector = connector::run(
            dispatch,
            phases,
            connections.clone(),
            servers(&config, foreign),
            (views, worker.handover.clone()),
        );
        let connector = tokio::spawn(connector);

        let pages = Admin::new(registry, log.clone(), Arc::new(view));
        if let Some(listener) = probes {
            let pages = extension.health_pages(pages.clone());
            tokio::spawn(admin::serve(listener, pages, shares.http));
        }
        tokio::spawn(admin::serve(admin, pages.router(), shares.http));
        if let Some(material) = &identity.material {
            watch_files(material, policy.clone());
            if config.tls.renew {
                tokio::spawn(renew::keep(material.clone(), renewals));
            }
        }
        tokio::spawn(lifetime::watch(identity.lifetimes()));
        tokio::spawn(lifecycle::watchdog(shards.pulses()));
        tokio::spawn(reclaim::give_back(budget));
        tokio::spawn(log.clone().keep_reporting());
        tracing::info!(identity = %identity, servers = config.servers.len(), admin = %config.admin, shards = config.shards, tunnels = config.tunnels, "agent is up");
        audit::process("started", "agent", &identity);
        lifecycle::notify(&[sd_notify::NotifyState::Ready]);
        let reload = Reload {
            policy,
            offers,
            log,
            metrics: reloads,
        };
        let succession = Succession {
            service: Served(worker),
            endpoint,
            restarts,
            inherited,
            // Clients of the pages ask again.
            listeners: KeptListeners::default(),
        };
        Ok(Self {
            config,
            identity,
            shards,
            succession,
            connector,
            connections,
            phase,
            stops,
            reload_requests,
            reload,
        })
    }

    /// Serves until SIGTERM or SIGINT, and then drains. `reread` reads the configuration on SIGHUP.
    ///
    /// # Errors
    /// [`AgentError::Shard`] when a shard has ended by itself.
    pub(crate) async fn until_stopped(
        mut self,
        reread: &dyn Fn() -> Result<AgentConfig, ConfigError>,
    ) -> Result<End, AgentError> {
        let mut end = End::Stopped;
        let keeper = self.succession.service.0.keeper.clone();
        let reload = lifecycle::on_reload(&mut self.reload_requests, async || {
            self.reload.run(reread())
        });
        let notice = self.identity.extension().drain_notice();
        let handover = self.succession.service.0.handover.clone();
        let idle = idle(&self.phase, &self.connections, notice, &handover);
        let lost = lifecycle::lost(&self.phase, self.shards.any_ended());
        let drain = self.config.limits.drain;
        tokio::select! {
            done = lifecycle::until_stopped(&self.phase, self.stops, drain, idle) => done?,
            () = reload => {}
            () = lost => return Err(AgentError::Shard),
            () = self.succession.run() => {
                audit::process("handed over", "agent", &self.identity);
                self.phase.send_replace(Phase::Ended);
                end = End::HandedOver;
            }
        }
        let _ = self.connector.await;
        self.shards.join().await;
        keeper.discard();
        self.reload.log.report();
        tracing::info!("agent has ended");
        audit::process("ended", "agent", &self.identity);
        Ok(end)
    }
}

/// Returns the configured keeper.
fn keeper_of(config: &AgentConfig, name: &str) -> Option<KeeperSpec> {
    let path = config.keeper.clone()?;
    Some(KeeperSpec::new(path, ROLE, name, config.limits.resume))
}

/// Returns the common setup of tunnels over QUIC.
fn setup(
    config: &AgentConfig,
    budget: &Budget,
    limits: &LimitMetrics,
    registry: &mut Registry,
) -> Setup {
    // An agent has few tunnels, and each may lead to the only server.
    let memory = MemoryBounds {
        budget: budget.clone(),
        per_tunnel: config.limits.stalled_bytes / 2,
        stream_window: credit(config.limits.stream_window, config.limits.resume),
        ended_by_tunnel: limits.refusals(STALLED_BYTES),
        ended_by_budget: limits.refusals(STALLED_BYTES),
    };
    Setup::new(config.transport, memory, ours(registry))
}

/// Returns a random id of this process.
fn instance() -> io::Result<InstanceId> {
    let mut instance = [0; 16];
    random::fill(&mut instance)?;
    Ok(InstanceId(instance))
}

/// Returns the dialers of all kinds.
fn dialers(identity: &AgentIdentity, setup: Setup) -> impl Iterator<Item = Arc<dyn TunnelDialer>> {
    let native = identity.material.iter().map(move |material| {
        let (material, setup) = (material.clone(), setup.clone());
        Arc::new(QuicDialer { material, setup }) as Arc<dyn TunnelDialer>
    });
    native.chain(identity.extension().dialers())
}

fn servers(config: &AgentConfig, foreign: ServerCount) -> Servers {
    let addresses = config.servers.iter();
    let addresses =
        addresses.map(|server| (server.address.as_str().into(), config.protocol(server)));
    Servers {
        addresses: addresses.collect(),
        foreign,
        tunnels: config.tunnels,
    }
}

/// Watches the files of certificates and of revocations.
fn watch_files(material: &Arc<Material>, policy: Policy) {
    // By default the allow-list is the node addresses, which a certificate may change.
    let changed = move |outcome: Result<&Change, &MaterialError>| {
        if outcome.is_ok() {
            policy.refresh();
        }
        cpc_identity::audit::certificates(outcome);
    };
    tokio::spawn(material.clone().watch(changed));
    let (revocations, known) = (material.revocations(), material.domains());
    revocations.warn_of_strangers(&known);
    let list = revocations.clone();
    tokio::spawn(revocations.watch(move |outcome| {
        list.warn_of_strangers(&known);
        cpc_identity::audit::revocations(outcome);
    }));
}

/// Waits until a draining agent has no connection left, and then refuses further ones. Foreign servers
/// may request some for the time of `notice`, until they have learnt of the drain.
async fn idle(
    phase: &watch::Sender<Phase>,
    connections: &ConcurrencyLimit,
    notice: Duration,
    handover: &Handover,
) {
    lifecycle::stopping(phase.subscribe()).await;
    tokio::time::sleep(notice).await;
    while handover.stage() != Stage::Serving || !connections.close_if_empty() {
        tokio::time::sleep(IDLE_POLL).await;
    }
}
