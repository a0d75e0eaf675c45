//! `cpc agent`: on a worker. Dials out to every server, and dials targets for them as far as its
//! own policy goes. It opens nothing towards the control plane but its control stream, or the one
//! stream that a proxy-server of Konnectivity wants.

mod address;
mod connector;
mod dialer;
mod held;
mod konnectivity;
mod leases;
mod me;
pub mod plan;
pub mod policy;
mod quic;
mod stats;
mod status;
mod tunnel;
mod worker;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{oneshot, watch};
use tunnel_proto::route::{Claim, MAX_CLAIMS};
use tunnel_proto::session::InstanceId;

use crate::admin::{self, Admin};
use crate::config::agent::{Protocol, ServeConfig};
use crate::config::konnectivity::CountSource;
use crate::config::{AgentConfig, ConfigError, Rule};
use crate::datapath::Budget;
use crate::kubernetes::AccessError;
use crate::process::gate::Gate;
use crate::process::lifecycle::{self, Phase, Pulse};
use crate::process::{host, memory};
use crate::telemetry::konnectivity::ProxyAgentMetrics;
use crate::telemetry::logging::LogHandle;
use crate::telemetry::metrics::{DialMetrics, ours};
use crate::tls::material::MaterialError;
use crate::transport::endpoint::STREAM_HELD;
use connector::Servers;
use held::Tunnels;
use konnectivity::ClientError;
use me::Me;
use policy::Policy;
use worker::Worker;

/// Why an agent did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Certificates.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// How proxy-servers are dialled.
    #[error(transparent)]
    Konnectivity(#[from] ClientError),
    /// The API server, which knows of leases.
    #[error("konnectivity.leases: {0}")]
    Leases(#[from] AccessError),
    /// A listener of health and metrics.
    #[error("TCP {addr}: {why}")]
    Admin {
        /// Where.
        addr: SocketAddr,
        /// What the system says.
        why: io::Error,
    },
    /// Something that the system should have given.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The shard has ended by itself.
    #[error("the shard has ended by itself; its panic is above")]
    Shard,
}

/// Configured claims, so that an offer stays within the wire's bounds with the node addresses.
const MAX_SERVED: usize = MAX_CLAIMS - 64;

/// How often a draining agent looks whether its connections have ended.
const IDLE_POLL: Duration = Duration::from_millis(50);

/// What a proxy-server is given to hear that we drain: what it asks for until then is served.
const DRAIN_HEARD: Duration = Duration::from_secs(1);

/// Runs an agent until it is told to stop. `reread` gives the configuration anew on SIGHUP.
///
/// # Errors
/// [`AgentError`], before any server is dialled.
pub async fn run(
    config: AgentConfig,
    log: LogHandle,
    reread: impl Fn() -> Result<AgentConfig, ConfigError>,
) -> Result<(), AgentError> {
    config.check()?;
    let mut hangups = lifecycle::hangups()?;
    host::raise_file_limit(config.limits.connections);
    let me = Me::load(&config)?;
    let (offers, serve) = watch::channel(claims(&config.serve)?);
    let policy = Policy::new(config.allow.clone(), &me.addresses());
    let policy = Arc::new(ArcSwap::from_pointee(policy));
    let admin_listener = listen(config.admin)?;
    let probes = config.health.map(listen).transpose()?;

    let mut metrics = prometheus_client::registry::Registry::default();
    let proxy_metrics = ProxyAgentMetrics::default();
    if config.konnectivity.is_some() {
        proxy_metrics.register(&mut metrics);
    }
    let dials = DialMetrics::register(ours(&mut metrics), config.log.access);
    let tunnels = Arc::new(Tunnels::default());
    let budget = Budget::new(config.limits.stalled_bytes, STREAM_HELD);
    let (phase, phases) = watch::channel(Phase::Running);
    let view = status::View::register(
        ours(&mut metrics),
        me.to_string(),
        tunnels.clone(),
        policy.clone(),
        budget.clone(),
        phases.clone(),
        proxy_metrics.clone(),
    );
    let mut instance = [0; 16];
    aws_lc_rs::rand::fill(&mut instance).map_err(|_| io::Error::other("no random numbers"))?;

    let (idle_tx, idle) = oneshot::channel();
    // Dropped with the shard, however it ends.
    let (alive, mut shard_lost) = watch::channel(());
    let pulse = Pulse::default();
    let (shard_pulse, shard_budget) = (pulse.clone(), budget.clone());
    let servers = config.servers.iter();
    let servers: Vec<(String, Protocol)> = servers
        .map(|server| (server.address.clone(), config.protocol(server)))
        .collect();
    let leases = leases::count(&config, proxy_metrics.leases.clone()).await?;
    let konnectivity = config.konnectivity.as_ref();
    let count_both = konnectivity.is_some_and(|k| k.server_count == CountSource::Max);
    let most = config.limits.connections;
    let (shard_me, shard_policy) = (me.clone(), policy.clone());
    let thread = crate::process::shard::spawn("shard-0", move || async move {
        let _alive = alive;
        tokio::task::spawn_local(shard_pulse.beat());
        let worker = Rc::new(Worker {
            node: shard_me.name(),
            material: shard_me.material,
            konnectivity: shard_me.konnectivity,
            instance: InstanceId(instance),
            serve,
            policy: shard_policy,
            metrics: dials,
            proxy_metrics,
            budget: shard_budget,
            phase: phases.clone(),
            connections: Gate::new(most),
        });
        let watched = worker.clone();
        tokio::task::spawn_local(async move {
            lifecycle::stopping(phases).await;
            if watched.konnectivity.is_some() {
                tokio::time::sleep(DRAIN_HEARD).await;
            }
            while watched.connections.inside() > 0 {
                tokio::time::sleep(IDLE_POLL).await;
            }
            let _ = idle_tx.send(());
        });
        let addresses = servers.into_iter();
        let servers = Servers {
            addresses: addresses
                .map(|(server, protocol)| (server.into(), protocol))
                .collect(),
            leases,
            count_both,
        };
        connector::run(worker, servers, tunnels).await;
    })?;

    let admin = Admin::new(metrics, log.clone(), Arc::new(view));
    if let Some(listener) = probes {
        let pages = admin::konnectivity::agent_router(admin.clone());
        tokio::spawn(admin::serve(listener, pages));
    }
    tokio::spawn(admin::serve(admin_listener, admin.router()));
    let allow = Arc::new(Mutex::new(config.allow.clone()));
    if let Some(material) = me.material.clone() {
        let (me, policy, allow) = (me.clone(), policy.clone(), allow.clone());
        // By default the allow-list is the node addresses, which a certificate may change.
        let renew = move || policy.store(Arc::new(current_policy(&allow, &me)));
        tokio::spawn(material.watch(renew));
    }
    tokio::spawn(lifecycle::watchdog(pulse));
    tokio::spawn(memory::give_back(budget));
    tracing::info!(identity = %me, servers = config.servers.len(), admin = %config.admin, "agent is up");
    lifecycle::notify(&[sd_notify::NotifyState::Ready]);

    let reload = lifecycle::on_hangup(&mut hangups, async || match reread() {
        Ok(config) => {
            *allow.lock().unwrap_or_else(PoisonError::into_inner) = config.allow;
            policy.store(Arc::new(current_policy(&allow, &me)));
            match claims(&config.serve) {
                Ok(claims) => drop(offers.send_replace(claims)),
                Err(error) => tracing::warn!(%error, "offer not reloaded, the old one stays"),
            }
            if let Err(error) = log.set(&config.log.filter) {
                tracing::warn!(%error, "log filter not reloaded, the old one stays");
            }
            tracing::info!("allow-list and offer reloaded");
        }
        Err(error) => tracing::warn!(%error, "configuration not reloaded, the old one stays"),
    });
    let idle = async {
        let _ = idle.await;
    };
    let lost = lifecycle::lost(&phase, async {
        let _ = shard_lost.changed().await;
    });
    tokio::select! {
        done = lifecycle::until_stopped(&phase, config.limits.drain, idle) => done?,
        () = reload => {}
        () = lost => return Err(AgentError::Shard),
    }
    let _ = thread.join();
    tracing::info!("agent has ended");
    Ok(())
}

fn listen(addr: SocketAddr) -> Result<TcpListener, AgentError> {
    TcpListener::bind(addr)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|why| AgentError::Admin { addr, why })
}

fn current_policy(allow: &Mutex<Option<Vec<Rule>>>, me: &Me) -> Policy {
    let allow = allow.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Policy::new(allow, &me.addresses())
}

/// What is offered beyond the certificate's node addresses.
fn claims(config: &ServeConfig) -> Result<Vec<Claim>, ConfigError> {
    let names = config.names.iter().map(|name| {
        let parsed = name.parse().map(Claim::Name);
        parsed.map_err(|e: tunnel_proto::preface::NameError| ConfigError::Value {
            key: "serve.names",
            why: e.to_string(),
        })
    });
    let mut claims = names.collect::<Result<Vec<_>, _>>()?;
    claims.extend(config.cidrs.iter().map(|net| Claim::Cidr(net.trunc())));
    if config.default_route {
        claims.push(Claim::DefaultRoute);
    }
    if claims.len() > MAX_SERVED {
        return Err(ConfigError::Value {
            key: "serve",
            why: format!(
                "names {} things, {MAX_SERVED} at most; serve larger networks",
                claims.len()
            ),
        });
    }
    Ok(claims)
}
