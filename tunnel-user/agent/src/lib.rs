//! `cpc agent`: runs on a worker, dials out to every server, and dials targets for them within its own
//! policy. Towards the control plane it opens only its control stream, or the one stream that a
//! proxy-server of Konnectivity requires.

mod address;
mod agent_identity;
mod connector;
mod dialer;
mod happy_eyeballs;
pub mod join;
mod konnectivity;
mod leases;
pub mod plan;
mod policy;
mod predecessor;
mod quic;
mod renew;
mod shards;
mod stats;
mod status;
mod tunnel;
mod tunnel_task;
mod tunnel_views;
mod worker;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tunnel_proto::route::{Claim, MAX_CLAIMS};
use tunnel_proto::session::InstanceId;

use agent_identity::AgentIdentity;
use connector::Servers;
use cpc_config::agent::ServeConfig;
use cpc_config::allow_list::AllowList;
use cpc_config::konnectivity::CountSource;
use cpc_config::{AgentConfig, AllowRule, ConfigError};
use cpc_datapath::shard::Shards;
use cpc_datapath::{Budget, Engines, reclaim};
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::descriptors::{Listeners, Shares};
use cpc_host::host;
use cpc_host::lifecycle::{self, Phase};
use cpc_host::privileges::{self, CapabilitySet, PrivilegeError};
use cpc_host::report::report;
use cpc_identity::lifetime;
use cpc_identity::material::{Change, MaterialError};
use cpc_kubernetes::AccessError;
use cpc_observe::admin::{self, Admin};
use cpc_observe::audit::events as audit;
use cpc_observe::konnectivity::ProxyAgentMetrics;
use cpc_observe::limits::LimitMetrics;
use cpc_observe::logging::LogHandle;
use cpc_observe::metrics::{DialMetrics, ours};
use cpc_observe::reload::ReloadMetrics;
use cpc_transport::quic::MemoryBounds;
use cpc_transport::quic::config::Setup;
use konnectivity::ClientError;
use renew::Renewals;
use shards::Dispatch;
use tunnel_views::Tunnels;
use worker::{CONNECTIONS, STALLED_BYTES, Worker};

/// Reason why an agent did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates are unusable.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// The parameters of proxy-servers are unusable.
    #[error(transparent)]
    Konnectivity(#[from] ClientError),
    /// There is no access to the API server, which has the leases.
    #[error("konnectivity.leases: {0}")]
    Leases(AccessError),
    /// The capabilities can't be dropped.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// A listener of health and metrics can't be opened.
    #[error("TCP {addr}: {why}")]
    Admin {
        /// Address of the listener.
        addr: SocketAddr,
        /// Error of the system call.
        why: io::Error,
    },
    /// A system call at start failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A shard has ended by itself.
    #[error("a shard has ended by itself; its panic is above")]
    Shard,
}

impl From<AccessError> for AgentError {
    fn from(why: AccessError) -> Self {
        Self::Leases(why)
    }
}

/// Maximum number of configured claims, so that an offer with the node addresses stays within the
/// wire's bounds.
const MAX_SERVED: usize = MAX_CLAIMS - 64;

/// Polling interval of a draining agent for the end of its connections.
const IDLE_POLL: Duration = Duration::from_millis(50);

/// Time for a proxy-server to learn that the agent drains: its requests until then are served.
const DRAIN_HEARD: Duration = Duration::from_secs(1);

/// Checks everything of a configuration that can be checked without opening anything.
///
/// # Errors
/// [`ConfigError::Value`] naming the key.
pub fn check(config: &AgentConfig) -> Result<(), ConfigError> {
    config.check()?;
    claims(&config.serve).map(drop)
}

/// Runs an agent until it is stopped. `reread` reads the configuration on SIGHUP.
///
/// # Errors
/// [`AgentError`], before any server is dialled.
pub async fn run(
    mut config: AgentConfig,
    log: LogHandle,
    reread: impl Fn() -> Result<AgentConfig, ConfigError>,
) -> Result<(), AgentError> {
    check(&config)?;
    let mut hangups = lifecycle::hangups()?;
    host::raise_file_limit();
    let http = if config.health.is_some() { 2 } else { 1 };
    let shares = Shares::of_process(Listeners { http, tls: 0 });
    let connections = &mut config.limits.connections;
    *connections = host::fit_connections(*connections, shares.connections);
    let me = AgentIdentity::load(&config)?;
    let (offers, serve) = watch::channel(claims(&config.serve)?);
    let policy = policy::policy(config.allow.clone(), &me.addresses());
    let policy = Arc::new(ArcSwap::from_pointee(policy));
    let admin_listener = listen(config.admin)?;
    let probes = config.health.map(listen).transpose()?;

    let mut metrics = prometheus_client::registry::Registry::default();
    let proxy_metrics = ProxyAgentMetrics::default();
    if config.konnectivity.is_some() {
        proxy_metrics.register(&mut metrics);
    }
    let dials = DialMetrics::register(ours(&mut metrics));
    let reloads = ReloadMetrics::register(ours(&mut metrics), SystemTime::now());
    let engines = Engines::choose(config.datapath.engine, config.shards);
    engines.register(ours(&mut metrics));
    privileges::finish(CapabilitySet::empty(), "")?;
    let tunnels = Arc::new(Tunnels::default());
    let budget = Budget::new(config.limits.stalled_bytes);
    let connections = ConcurrencyLimit::new(config.limits.connections);
    let limits = LimitMetrics::register(
        ours(&mut metrics),
        [
            (CONNECTIONS, u64::try_from(config.limits.connections).ok()),
            (STALLED_BYTES, Some(config.limits.stalled_bytes)),
        ],
    );
    // An agent has few tunnels, and each may lead to the only server.
    let memory = MemoryBounds {
        budget: budget.clone(),
        per_tunnel: config.limits.stalled_bytes / 2,
        ended_by_tunnel: limits.refusals(STALLED_BYTES),
        ended_by_budget: limits.refusals(STALLED_BYTES),
    };
    let setup = Setup::new(config.transport, memory, ours(&mut metrics));
    let (phase, phases) = watch::channel(Phase::Running);
    let view = status::View::register(
        ours(&mut metrics),
        (me.to_string(), config.shards, engines.engine()),
        tunnels.clone(),
        policy.clone(),
        (budget.clone(), connections.clone(), limits.clone()),
        phases.clone(),
        (proxy_metrics.clone(), me.lifetimes()),
    );
    let mut instance = [0; 16];
    aws_lc_rs::rand::fill(&mut instance).map_err(|_| io::Error::other("no random numbers"))?;
    let instance = InstanceId(instance);
    let predecessor = predecessor::take(config.state_dir.as_deref(), instance);

    let servers = config.servers.iter();
    let addresses = servers.map(|server| (server.address.as_str().into(), config.protocol(server)));
    let leases = leases::count(&config, proxy_metrics.leases.clone()).await?;
    let konnectivity = config.konnectivity.as_ref();
    let servers = Servers {
        addresses: addresses.collect(),
        leases,
        count_both: konnectivity.is_some_and(|k| k.server_count == CountSource::Max),
        tunnels: config.tunnels,
    };
    let renewals = Renewals::default();
    let worker = Worker {
        node: me.name(),
        material: me.material.clone(),
        setup,
        konnectivity: me.konnectivity.clone(),
        instance,
        predecessor,
        serve,
        renewals: renewals.clone(),
        policy: policy.clone(),
        answered: Arc::default(),
        metrics: dials,
        proxy_metrics,
        budget: budget.clone(),
        phase: phases.clone(),
        connections: connections.clone(),
        limits,
    };
    let mut shards = Shards::new(engines);
    let dispatch = Dispatch::start(&mut shards, config.shards, &worker)?;
    // It keeps the shards as long as it lives.
    let connector = connector::run(
        dispatch,
        phases.clone(),
        connections.clone(),
        servers,
        tunnels,
    );
    let connector = tokio::spawn(connector);

    let admin = Admin::new(metrics, log.clone(), Arc::new(view));
    if let Some(listener) = probes {
        let pages = admin::konnectivity::agent_router(admin.clone());
        tokio::spawn(admin::serve(listener, pages, shares.http));
    }
    tokio::spawn(admin::serve(admin_listener, admin.router(), shares.http));
    let allow = Arc::new(Mutex::new(config.allow.clone()));
    if let Some(material) = me.material.clone() {
        let (me, policy, allow) = (me.clone(), policy.clone(), allow.clone());
        // By default the allow-list is the node addresses, which a certificate may change.
        let renew = move |outcome: Result<&Change, &MaterialError>| {
            if outcome.is_ok() {
                policy.store(Arc::new(current_policy(&allow, &me)));
            }
            cpc_identity::audit::certificates(outcome);
        };
        tokio::spawn(material.watch(renew));
    }
    if let Some(material) = &me.material {
        if config.tls.renew {
            tokio::spawn(renew::keep(material.clone(), renewals));
        }
        let (revocations, known) = (material.revocations(), material.domains());
        revocations.warn_of_strangers(&known);
        let list = revocations.clone();
        tokio::spawn(revocations.watch(move |outcome| {
            list.warn_of_strangers(&known);
            cpc_identity::audit::revocations(outcome);
        }));
    }
    tokio::spawn(lifetime::watch(me.lifetimes()));
    tokio::spawn(lifecycle::watchdog(shards.pulses()));
    tokio::spawn(reclaim::give_back(budget));
    tokio::spawn(log.clone().keep_reporting());
    tracing::info!(identity = %me, servers = config.servers.len(), admin = %config.admin, shards = config.shards, tunnels = config.tunnels, "agent is up");
    audit::process("started", "agent", &me);
    lifecycle::notify(&[sd_notify::NotifyState::Ready]);

    let reload = lifecycle::on_hangup(&mut hangups, async || {
        let is_in_force = match reread() {
            Ok(config) => {
                *allow.lock().unwrap_or_else(PoisonError::into_inner) = config.allow;
                policy.store(Arc::new(current_policy(&allow, &me)));
                let offered = match claims(&config.serve) {
                    Ok(claims) => {
                        offers.send_replace(claims);
                        tracing::info!("allow-list and offer reloaded");
                        audit::changed("allow-list and offer", Ok(()));
                        true
                    }
                    Err(error) => {
                        tracing::warn!(
                            error = report(&error),
                            "allow-list reloaded, offer not: the old one stays"
                        );
                        audit::changed("allow-list", Ok(()));
                        audit::changed("offer", Err(&error));
                        false
                    }
                };
                offered & log.reload(&config.log.filter)
            }
            Err(error) => {
                tracing::warn!(
                    error = report(&error),
                    "configuration not reloaded, the old one stays"
                );
                audit::changed("configuration", Err(&error));
                false
            }
        };
        reloads.note(is_in_force, SystemTime::now());
    });
    let idle = idle(&phase, &connections, config.konnectivity.is_some());
    let lost = lifecycle::lost(&phase, shards.any_ended());
    tokio::select! {
        done = lifecycle::until_stopped(&phase, config.limits.drain, idle) => done?,
        () = reload => {}
        () = lost => return Err(AgentError::Shard),
    }
    let _ = connector.await;
    shards.join();
    log.report();
    tracing::info!("agent has ended");
    audit::process("ended", "agent", &me);
    Ok(())
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

fn listen(addr: SocketAddr) -> Result<TcpListener, AgentError> {
    cpc_host::listen::tcp(addr).map_err(|why| AgentError::Admin { addr, why })
}

fn current_policy(allow: &Mutex<Option<Vec<AllowRule>>>, me: &AgentIdentity) -> AllowList {
    let allow = allow.lock().unwrap_or_else(PoisonError::into_inner).clone();
    policy::policy(allow, &me.addresses())
}

/// Returns the claims beyond the certificate's node addresses.
fn claims(config: &ServeConfig) -> Result<Vec<Claim>, ConfigError> {
    let names = config.names.iter().enumerate().map(|(at, name)| {
        let parsed = name.parse().map(Claim::Name);
        parsed.map_err(|e: tunnel_proto::preface::NameError| {
            ConfigError::value(format!("serve.names[{at}]"), e.to_string())
        })
    });
    let mut claims = names.collect::<Result<Vec<_>, _>>()?;
    claims.extend(config.cidrs.iter().map(|net| Claim::Cidr(net.trunc())));
    if config.default_route {
        claims.push(Claim::DefaultRoute);
    }
    if claims.len() > MAX_SERVED {
        let why = format!(
            "names {} things, {MAX_SERVED} at most; serve larger networks",
            claims.len()
        );
        return Err(ConfigError::value("serve", why));
    }
    Ok(claims)
}
