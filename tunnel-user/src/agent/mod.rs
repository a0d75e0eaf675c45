//! `cpc agent`: on a worker. Dials out to every server, and dials targets for them as far as its
//! own policy goes. It opens nothing towards the control plane but its control stream.

mod address;
mod connector;
mod dialer;
pub mod plan;
pub mod policy;
mod stats;
mod status;
mod tunnel;
mod worker;

use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::{oneshot, watch};
use tunnel_proto::route::{Claim, MAX_CLAIMS};
use tunnel_proto::session::InstanceId;

use crate::admin::{self, Admin};
use crate::config::agent::ServeConfig;
use crate::config::{AgentConfig, ConfigError, Rule};
use crate::datapath::Budget;
use crate::process::gate::Gate;
use crate::process::lifecycle::{self, Phase, Pulse};
use crate::process::{host, memory};
use crate::telemetry::logging::LogHandle;
use crate::telemetry::metrics::{DialMetrics, registry};
use crate::tls::material::MaterialError;
use crate::tls::{Material, Role, provider};
use crate::transport::endpoint::STREAM_HELD;
use connector::Tunnels;
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
    /// The admin listener.
    #[error("TCP {addr}: {why}")]
    Admin {
        /// Where.
        addr: std::net::SocketAddr,
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
const IDLE_POLL: std::time::Duration = std::time::Duration::from_millis(50);

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
    let material = Material::load(config.tls.files()?, Role::Agent, provider())?;
    let identity = material.identity();
    let (offers, serve) = watch::channel(claims(&config.serve)?);
    let policy = Policy::new(config.allow.clone(), &identity.addresses);
    let policy = Arc::new(ArcSwap::from_pointee(policy));
    let admin_listener = std::net::TcpListener::bind(config.admin)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|why| AgentError::Admin {
            addr: config.admin,
            why,
        })?;

    let mut metrics = registry();
    let dials = DialMetrics::register(&mut metrics, config.log.access);
    let tunnels = Arc::new(Tunnels::default());
    let budget = Budget::new(config.limits.stalled_bytes, STREAM_HELD);
    let (phase, phases) = watch::channel(Phase::Running);
    let view = status::View::register(
        &mut metrics,
        identity.to_string(),
        tunnels.clone(),
        policy.clone(),
        budget.clone(),
        phases.clone(),
    );
    let mut instance = [0; 16];
    aws_lc_rs::rand::fill(&mut instance).map_err(|_| io::Error::other("no random numbers"))?;

    let (idle_tx, idle) = oneshot::channel();
    // Dropped with the shard, however it ends.
    let (alive, mut shard_lost) = watch::channel(());
    let pulse = Pulse::default();
    let (shard_pulse, shard_budget) = (pulse.clone(), budget.clone());
    let (servers, most) = (config.servers.clone(), config.limits.connections);
    let (shard_material, shard_policy, node) =
        (material.clone(), policy.clone(), identity.name.clone());
    let thread = crate::process::shard::spawn("shard-0", move || async move {
        let _alive = alive;
        tokio::task::spawn_local(shard_pulse.beat());
        let worker = Rc::new(Worker {
            material: shard_material,
            node,
            instance: InstanceId(instance),
            serve,
            policy: shard_policy,
            metrics: dials,
            budget: shard_budget,
            phase: phases.clone(),
            connections: Gate::new(most),
        });
        let watched = worker.clone();
        tokio::task::spawn_local(async move {
            lifecycle::stopping(phases).await;
            while watched.connections.inside() > 0 {
                tokio::time::sleep(IDLE_POLL).await;
            }
            let _ = idle_tx.send(());
        });
        connector::run(worker, servers, tunnels).await;
    })?;

    let admin = Admin::new(metrics, log.clone(), Arc::new(view));
    tokio::spawn(admin::serve(admin_listener, admin.router()));
    let (renewed, allow) = (material.clone(), Arc::new(Mutex::new(config.allow.clone())));
    let renew = {
        let (policy, allow) = (policy.clone(), allow.clone());
        // By default the allow-list is the node addresses, which a certificate may change.
        move || policy.store(Arc::new(current_policy(&allow, &renewed)))
    };
    tokio::spawn(material.clone().watch(renew));
    tokio::spawn(lifecycle::watchdog(pulse));
    tokio::spawn(memory::give_back(budget));
    tracing::info!(%identity, servers = ?config.servers, admin = %config.admin, "agent is up");
    lifecycle::notify(&[sd_notify::NotifyState::Ready]);

    let reload = lifecycle::on_hangup(&mut hangups, async || match reread() {
        Ok(config) => {
            *allow.lock().unwrap_or_else(PoisonError::into_inner) = config.allow;
            policy.store(Arc::new(current_policy(&allow, &material)));
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

fn current_policy(allow: &Mutex<Option<Vec<Rule>>>, material: &Material) -> Policy {
    let allow = allow.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Policy::new(allow, &material.identity().addresses)
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
