//! The last stage: everything that serves runs, until the process is told to end.

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
use crate::policy::Policy;
use crate::renew::{self, Renewals};
use crate::shards::Dispatch;
use crate::tunnel_views::Tunnels;
use crate::worker::{STALLED_BYTES, Worker};
use crate::{leases, predecessor, status};
use cpc_config::konnectivity::CountSource;
use cpc_config::{AgentConfig, ConfigError};
use cpc_datapath::shard::Shards;
use cpc_datapath::{Budget, reclaim};
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::environment::{Reloads, Stops};
use cpc_host::lifecycle::{self, Phase};
use cpc_host::random;
use cpc_identity::Material;
use cpc_identity::lifetime;
use cpc_identity::material::{Change, MaterialError};
use cpc_observe::admin::{self, Admin};
use cpc_observe::audit::events as audit;
use cpc_observe::limits::LimitMetrics;
use cpc_observe::logging::LogHandle;
use cpc_observe::metrics::ours;
use cpc_transport::quic::MemoryBounds;
use cpc_transport::quic::config::Setup;

/// Polling interval of a draining agent for the end of its connections.
const IDLE_POLL: Duration = Duration::from_millis(50);

/// Time for a proxy-server to learn that the agent drains: its requests until then are served.
const DRAIN_HEARD: Duration = Duration::from_secs(1);

/// An agent at work.
pub(crate) struct Serving {
    config: AgentConfig,
    identity: AgentIdentity,
    shards: Shards,
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
    pub(crate) async fn start(from: Prepared, log: LogHandle) -> Result<Self, AgentError> {
        let Prepared {
            config,
            stops,
            reload_requests,
            shares,
            identity,
            claims,
            policy,
            admin,
            probes,
            mut shards,
            mut registry,
            proxy_metrics,
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
        let view = status::View::register(
            ours(&mut registry),
            (
                identity.to_string(),
                config.shards,
                shards.engines().engine(),
            ),
            views.clone(),
            policy.in_force().clone(),
            (budget.clone(), connections.clone(), limits.clone()),
            phases.clone(),
            (proxy_metrics.clone(), identity.lifetimes()),
        );
        let instance = instance()?;
        let predecessor = predecessor::take(config.state_dir.as_deref(), instance);
        let leases = leases::count(&config, proxy_metrics.leases.clone()).await?;
        let renewals = Renewals::default();
        let worker = Worker {
            node: identity.name(),
            material: identity.material.clone(),
            setup,
            konnectivity: identity.konnectivity.clone(),
            instance,
            predecessor,
            serve,
            renewals: renewals.clone(),
            policy: policy.in_force().clone(),
            answered: Arc::default(),
            metrics: dials,
            proxy_metrics,
            budget: budget.clone(),
            phase: phases.clone(),
            connections: connections.clone(),
            limits,
        };
        let dispatch = Dispatch::start(&mut shards, config.shards, &worker)?;
        // It keeps the shards as long as it lives.
        let connector = connector::run(
            dispatch,
            phases,
            connections.clone(),
            servers(&config, leases),
            views,
        );
        let connector = tokio::spawn(connector);

        let pages = Admin::new(registry, log.clone(), Arc::new(view));
        if let Some(listener) = probes {
            let pages = admin::konnectivity::agent_router(pages.clone());
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
        Ok(Self {
            config,
            identity,
            shards,
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
        reread: impl Fn() -> Result<AgentConfig, ConfigError>,
    ) -> Result<(), AgentError> {
        let reload = lifecycle::on_reload(&mut self.reload_requests, async || {
            self.reload.run(reread())
        });
        let proxies = self.config.konnectivity.is_some();
        let idle = idle(&self.phase, &self.connections, proxies);
        let lost = lifecycle::lost(&self.phase, self.shards.any_ended());
        let drain = self.config.limits.drain;
        tokio::select! {
            done = lifecycle::until_stopped(&self.phase, self.stops, drain, idle) => done?,
            () = reload => {}
            () = lost => return Err(AgentError::Shard),
        }
        let _ = self.connector.await;
        self.shards.join().await;
        self.reload.log.report();
        tracing::info!("agent has ended");
        audit::process("ended", "agent", &self.identity);
        Ok(())
    }
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

fn servers(config: &AgentConfig, leases: watch::Receiver<Option<u32>>) -> Servers {
    let addresses = config.servers.iter();
    let addresses =
        addresses.map(|server| (server.address.as_str().into(), config.protocol(server)));
    let konnectivity = config.konnectivity.as_ref();
    Servers {
        addresses: addresses.collect(),
        leases,
        count_both: konnectivity.is_some_and(|k| k.server_count == CountSource::Max),
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

/// Waits until a draining agent has no connection left, and then refuses further ones. Proxy-servers
/// may request some until they have learnt of the drain.
async fn idle(phase: &watch::Sender<Phase>, connections: &ConcurrencyLimit, proxies: bool) {
    lifecycle::stopping(phase.subscribe()).await;
    if proxies {
        tokio::time::sleep(DRAIN_HEARD).await;
    }
    while !connections.close_if_empty() {
        tokio::time::sleep(IDLE_POLL).await;
    }
}
