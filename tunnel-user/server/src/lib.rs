//! `cpc server`: on the control plane. Frontends take clients in, the router picks a link, the
//! datapath moves the bytes.
//!
//! ```text
//! frontend -> dial (routes) -> link ==QUIC==> agent
//!                ^
//! control (registry, grants) publishes routes to shards and kernel
//! ```
//!
//! [`run`] is the composition root: it reads nothing from the environment but what it is given,
//! binds everything before it promises anything, and returns when all has ended.

mod attachments;
mod bind;
mod breaker;
pub mod control;
mod dial;
mod doorstep;
mod early;
mod frontend;
pub mod grants;
mod join;
mod leases;
mod limits;
mod link;
mod loads;
mod metrics;
mod privileges;
pub mod registry;
pub mod routes;
mod serve;
mod shard;
mod status;
mod tenants;
mod troubles;

pub use attachments::{AttachError, Attachments, redirect, spec};
pub use privileges::{for_start, kept};

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{oneshot, watch};
use tunnel_proto::session::InstanceId;

use self::limits::Limit;
use attachments::kernel_routes;
use bind::Bound;
use control::Control;
use cpc_config::{ConfigError, ServerConfig};
use cpc_datapath::shard::Shards;
use cpc_datapath::{Budget, Engines, reclaim};
use cpc_host::descriptors::Shares;
use cpc_host::gate::Gate;
use cpc_host::host;
use cpc_host::inherited::Inherited;
use cpc_host::lifecycle::{self, Phase};
use cpc_host::privileges::{PrivilegeError, finish};
use cpc_host::report::report;
use cpc_identity::identity::{IdentityError, name_of};
use cpc_identity::issue::IssueError;
use cpc_identity::join::BookError;
use cpc_identity::lifetime::{self, Certificates, Lifetimes};
use cpc_identity::material::MaterialError;
use cpc_identity::revoked::Revocations;
use cpc_identity::{Identity, Material, Role, TrustDomain, provider};
use cpc_kubernetes::AccessError;
use cpc_observe::admin::{self, Admin};
use cpc_observe::audit::events as audit;
use cpc_observe::logging::LogHandle;
use cpc_observe::metrics::ours;
use cpc_observe::reload::ReloadMetrics;
use cpc_redirect::{Redirect, RedirectError};
use cpc_transport::quic::MemoryBounds;
use cpc_transport::quic::config::{EndpointError, Setup};
use cpc_transport::quic::secret::{Secret, SecretError};
use doorstep::Doorstep;
use frontend::scope;
use grants::Grants;
use link::konnectivity::Door;
use loads::Loads;
use metrics::ServerMetrics;
use registry::{Registry, RouteBounds};
use serve::{Listeners, Start};
use shard::{Common, Peers};
use tenants::Tenants;
use troubles::Troubles;

/// Reason why a server did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates are unusable.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// The persisted secret is unusable.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// An attachment of the redirect failed.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The capabilities can't be dropped.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// The maps of the redirect can't be used.
    #[error("redirect")]
    Redirect(#[from] RedirectError),
    /// The endpoint of the tunnel can't be opened.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// A socket can't be opened.
    #[error("{what}: {why}")]
    Socket {
        /// Name of the socket.
        what: String,
        /// Error of the system call.
        why: io::Error,
    },
    /// There is no access to the Kubernetes API.
    #[error(transparent)]
    Kubernetes(#[from] AccessError),
    /// A system call at start failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The CA that issues certificates is unusable.
    #[error("join.ca: {0}")]
    Authority(IssueError),
    /// The file of tokens is unusable.
    #[error("join: {0}")]
    Book(BookError),
    /// The CA of joining agents belongs to another trust domain.
    #[error(
        "join.ca is of {ca}, and our own certificate of {own}: agents join the trust domain of their servers"
    )]
    JoinDomain {
        /// Trust domain of the CA.
        ca: TrustDomain,
        /// Our trust domain.
        own: TrustDomain,
    },
    /// A shard has ended by itself.
    #[error("a shard has ended by itself; its panic is above")]
    Shard,
}

impl From<IssueError> for ServerError {
    fn from(why: IssueError) -> Self {
        Self::Authority(why)
    }
}

impl From<BookError> for ServerError {
    fn from(why: BookError) -> Self {
        Self::Book(why)
    }
}

/// Parameters of tunnels over QUIC.
#[derive(Clone)]
struct Tunnel {
    material: Arc<Material>,
    secret: Arc<Secret>,
    setup: Setup,
}

impl Tunnel {
    /// Loads the parameters; `None` where no certificate is configured.
    fn load(
        config: &ServerConfig,
        memory: MemoryBounds,
        metrics: &mut prometheus_client::registry::Registry,
    ) -> Result<Option<Self>, ServerError> {
        if config.tls.cert.is_none() {
            return Ok(None);
        }
        Ok(Some(Self {
            material: Material::load(config.tls.files()?, Role::Server, provider())?,
            secret: Secret::load_or_create(&config.state_dir)?.into(),
            setup: Setup::new(config.transport, memory, ours(metrics)),
        }))
    }
}

/// Returns our identity: from the certificate, or without one from the configuration.
fn own_identity(config: &ServerConfig, tunnel: Option<&Tunnel>) -> Result<Identity, ConfigError> {
    if let Some(tunnel) = tunnel {
        return Ok(tunnel.material.identity());
    }
    let tenant = config.konnectivity.as_ref().and_then(|k| k.tenant.clone());
    let tenant = tenant.map_or_else(|| DEFAULT_TENANT.parse(), Ok);
    let identity = tenant.map_err(IdentityError::from).and_then(|tenant| {
        let name = name_of(config.server_id.as_deref().unwrap_or_default());
        Identity::new(tenant, Role::Server, &name)
    });
    identity.map_err(|e| ConfigError::value("server_id", e.to_string()))
}

/// Polling interval of a draining server for the end of its connections.
const IDLE_POLL: Duration = Duration::from_millis(50);

/// Waits until a draining server has no connection left, and then refuses further ones.
async fn idle(phase: &watch::Sender<Phase>, connections: &Gate) {
    lifecycle::stopping(phase.subscribe()).await;
    while !connections.close_if_empty() {
        tokio::time::sleep(IDLE_POLL).await;
    }
}

/// Tenant of a server without a certificate that names one.
const DEFAULT_TENANT: &str = "cluster.local";

/// Checks everything of a configuration that can be checked without opening anything.
///
/// # Errors
/// [`ConfigError::Value`] naming the key.
pub fn check(config: &ServerConfig) -> Result<(), ConfigError> {
    config.check()?;
    Grants::new(&config.policy)?;
    match config.tls.cert {
        Some(_) => drop(config.tls.files()?),
        None => drop(own_identity(config, None)?),
    }
    for (at, attachment) in config.redirect.attachments.iter().enumerate() {
        cpc_redirect::check_name(&attachment.name).map_err(|error| {
            ConfigError::value(
                format!("redirect.attachments[{at}].name"),
                error.to_string(),
            )
        })?;
    }
    Ok(())
}

/// Runs a server until it is stopped. `reread` reads the configuration on SIGHUP.
///
/// # Errors
/// [`ServerError`], before anything is served.
pub async fn run(
    mut config: ServerConfig,
    log: LogHandle,
    mut inherited: Inherited,
    reread: impl Fn() -> Result<ServerConfig, ConfigError>,
) -> Result<(), ServerError> {
    check(&config)?;
    host::raise_file_limit();
    let shares = Shares::of_process(limits::listeners(&config));
    let connections = &mut config.limits.connections;
    *connections = host::fit_connections(*connections, shares.connections);
    let mut metrics = prometheus_client::registry::Registry::default();
    let server_metrics = ServerMetrics::register(&mut metrics, &config);
    let reloads = ReloadMetrics::register(ours(&mut metrics), SystemTime::now());
    let budget = Budget::new(config.limits.stalled_bytes);
    let refusals = |limit: Limit| server_metrics.limits.refusals(limit.label());
    let memory = MemoryBounds {
        budget: budget.clone(),
        per_tunnel: config.limits.stalled_bytes_per_tunnel(),
        ended_by_tunnel: refusals(Limit::StalledBytesPerTunnel),
        ended_by_budget: refusals(Limit::StalledBytes),
    };
    let tunnel = Tunnel::load(&config, memory, &mut metrics)?;
    let identity = own_identity(&config, tunnel.as_ref())?;
    let own = identity.trust_domain.clone();
    let material = tunnel.as_ref().map(|tunnel| tunnel.material.clone());
    let grants = Grants::new(&config.policy)?;

    let revocations = match &material {
        Some(material) => material.revocations(),
        None => Revocations::load(config.tls.revoked.clone())?,
    };

    let mut hangups = lifecycle::hangups()?;
    let bound = Bound::open(&config, &own, &revocations, &mut inherited)?;
    let (mut attached, accepting) = Attachments::attach(&config.redirect, &own, &mut inherited)?;
    inherited.report_leftovers();

    let engines = Engines::choose(config.datapath.engine, config.shards);
    engines.register(ours(&mut metrics));
    let publish: control::Publish = if config.redirect.attachments.is_empty() {
        Box::new(|_| {})
    } else {
        kernel_routes(Redirect::new(&config.redirect.pin).routes()?)
    };
    let kernel_log = attachments::kernel_log(&config.redirect);
    // Everything below, its threads among it, has what is left.
    let (keeps, why) = kept(&config, attached.ours());
    finish(keeps, why)?;
    attached.follow()?;
    let strategies = &config.routing.strategies;
    let registered = Registry::new(grants, strategies, config.limits.forget)
        .bounded(RouteBounds::from(&config.limits));
    let control = Control::new(registered, publish);
    let (phase, phases) = watch::channel(Phase::Running);
    let mut instance = [0; 16];
    aws_lc_rs::rand::fill(&mut instance).map_err(|_| io::Error::other("no random numbers"))?;
    let (peers, inboxes) = Peers::new(config.shards);
    let desk = join::desk(&config, &identity, material.as_ref()).await?;
    if let Some(desk) = &desk {
        desk.metrics.register(ours(&mut metrics));
    }
    let failed_tunnels = server_metrics.handshakes.clone();
    let failed_joins = server_metrics.join_handshakes.clone();
    let common = Common {
        control: control.handle(),
        desk: desk.clone(),
        metrics: server_metrics,
        tenants: Tenants::new(&config, &own, &budget),
        budget,
        limits: config.limits.clone(),
        connections: Gate::new(config.limits.connections),
        shares,
        troubles: Troubles::default(),
        waiting: Gate::new(shares.waiting),
        grpc_clients: Gate::new(config.limits.connections),
        dials: Gate::new(config.limits.dials),
        tunnels: Gate::new(config.limits.agents),
        door: Doorstep::new(&config.limits.handshakes, failed_tunnels.clone()),
        server_id: identity.name.clone(),
        server_count: config.server_count,
        revocations: revocations.clone(),
        instance: InstanceId(instance),
        started: tokio::time::Instant::now(),
        phase: phases.clone(),
        last_link: Arc::default(),
        loads: Loads::new(bound.udp.len()),
        peers,
    };
    let engine = engines.engine();
    let mut certificates: Vec<Arc<dyn Certificates>> = Vec::new();
    certificates.extend(material.iter().map(|it| it.clone() as _));
    certificates.extend(bound.tls.iter().map(|it| Arc::new(it.tls.clone()) as _));
    certificates.extend(bound.agents.iter().map(|it| Arc::new(it.tls.clone()) as _));
    let lifetimes = Lifetimes::new(certificates);
    tokio::spawn(lifetime::watch(lifetimes.clone()));
    let name = identity.to_string();
    let seen = (&common, attached.health());
    let view = status::View::register(&mut metrics, &config, name, engine, seen, lifetimes);
    for frontend in &bound.tls {
        tokio::spawn(frontend.tls.clone().watch());
    }
    let (mut door, mut agents) = (None, None);
    if let (Some(konnectivity), Some(bound)) = (&config.konnectivity, bound.agents) {
        tokio::spawn(bound.tls.clone().watch());
        let id = &common.server_id;
        let handshakes = config.limits.handshakes.at_most(shares.handshakes);
        let step = Doorstep::new(&handshakes, failed_tunnels);
        let made = Door::new(konnectivity, id, bound.tls, bound.tenant, step);
        door = Some(made.await?);
        agents = Some(bound.listener);
    }
    let scopes = { accepting.iter().map(|it| &it.scope) }
        .chain(bound.unix.iter().map(|it| &it.scope))
        .chain(bound.tls.iter().map(|it| &it.scope));
    let scopes: Vec<_> = scopes.cloned().collect();
    let listeners = Listeners {
        accepting,
        unix: bound.unix,
        tls: bound.tls,
        agents,
    };
    let listening = bound.udp.first().map(UdpSocket::local_addr).transpose()?;
    let tunnels = bound.udp.len();
    // The kernel counts the sockets that there are: each stays until the last shard has ended.
    let kept = bound.udp.iter().map(UdpSocket::try_clone);
    let _kept = kept.collect::<io::Result<Vec<_>>>()?;
    let mut udp = bound.udp.into_iter();
    let starts = inboxes.into_iter().zip(listeners.deal(config.shards));
    let starts = starts.enumerate().map(|(index, (inbox, listeners))| Start {
        index,
        common: common.clone(),
        inbox,
        tunnel: tunnel.clone().zip(udp.next()),
        listeners,
        door: door.clone(),
    });
    let calls = common.metrics.konnectivity.leases.clone();
    let leases = leases::hold(&config, &common.server_id, calls, phases.clone()).await?;
    let mut shards = Shards::new(engines);
    let mut starting = Vec::new();
    for start in starts {
        let (started, outcome) = oneshot::channel();
        shards.spawn(move || serve::run(start, started))?;
        starting.push(outcome);
    }
    tokio::spawn(control.run());
    for outcome in starting {
        outcome.await.map_err(|_| ServerError::Shard)??;
    }

    if let (Some(listener), Some(desk)) = (bound.join, desk) {
        let handshakes = config.limits.handshakes.at_most(shares.handshakes);
        let strangers = join::doorstep(&handshakes, failed_joins);
        join::serve(listener, desk, strangers).await?;
    }
    let admin = Admin::new(metrics, log.clone(), Arc::new(view));
    tokio::spawn(admin::serve(
        bound.admin,
        admin.clone().router(),
        shares.http,
    ));
    if let Some(probes) = bound.probes {
        let pages = admin::konnectivity::server_router(admin.clone());
        tokio::spawn(admin::serve(probes, pages, shares.http));
    }
    if let Some(health) = bound.health {
        tokio::spawn(admin::serve(health, admin.health_router(), shares.http));
    }
    if let Some(material) = material {
        tokio::spawn(material.watch(cpc_identity::audit::certificates));
    }
    let known = config.tenants(&own);
    revocations.warn_of_strangers(&known);
    let list = revocations.clone();
    tokio::spawn(revocations.watch(move |outcome| {
        list.warn_of_strangers(&known);
        cpc_identity::audit::revocations(outcome);
    }));
    tokio::spawn(lifecycle::watchdog(shards.pulses()));
    tokio::spawn(reclaim::give_back(common.budget.clone()));
    tokio::spawn(kernel_log);
    tokio::spawn(log.clone().keep_reporting());
    tokio::spawn(attached.watch());
    tracing::info!(
        tunnel = listening.map(tracing::field::display), %identity, admin = %config.admin,
        shards = config.shards, tunnel_shards = tunnels,
        "server is up"
    );
    audit::process("started", "server", &identity);
    lifecycle::notify(&[sd_notify::NotifyState::Ready]);

    let reload = lifecycle::on_hangup(&mut hangups, async || {
        let is_in_force = match reread() {
            Ok(config) => {
                let granted = match Grants::new(&config.policy) {
                    Ok(grants) => {
                        common.control.set_grants(grants).await;
                        audit::changed("policy", Ok(()));
                        true
                    }
                    Err(error) => {
                        tracing::warn!(
                            error = report(&error),
                            "policy not reloaded, the old one stays"
                        );
                        audit::changed("policy", Err(&error));
                        false
                    }
                };
                let captured = attached.update(&config.redirect, &own);
                scope::reload(&scopes, &config);
                granted & captured & log.reload(&config.log.filter)
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
    let idle = idle(&phase, &common.connections);
    let lost = lifecycle::lost(&phase, shards.any_ended());
    tokio::select! {
        done = lifecycle::until_stopped(&phase, Some(config.limits.drain), idle) => done?,
        () = reload => {}
        () = lost => return Err(ServerError::Shard),
    }
    // Their last words are short: each ends its links and returns.
    shards.join();
    if let Some(leases) = leases {
        let _ = leases.await;
    }
    log.report();
    tracing::info!("server has ended");
    audit::process("ended", "server", &identity);
    Ok(())
}
