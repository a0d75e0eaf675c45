//! The last stage: all that serves runs until a signal ends the process.

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use cpc_config::{ConfigError, ServerConfig};
use cpc_datapath::reclaim;
use cpc_datapath::shard::Shards;
use cpc_handover::{KeeperHandle, Predecessor, Succession};
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::environment::{Reloads, Stops};
use cpc_host::lifecycle::{self, End, Phase};
use cpc_host::random;
use cpc_host::report::report;
use cpc_identity::Identity;
use cpc_identity::lifetime::{self, Certificates, Lifetimes};
use cpc_observe::admin::{self, Admin};
use cpc_observe::audit::events as audit;
use cpc_observe::logging::LogHandle;
use cpc_observe::metrics::ours;
use cpc_observe::reload::ReloadMetrics;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tunnel_proto::session::InstanceId;

use super::attached::Attached;
use super::prepared::Prepared;
use crate::agent_processes::AgentProcesses;
use crate::attachments::Attachments;
use crate::bind::{self, Bound};
use crate::control::{Control, Publish};
use crate::error::ServerError;
use crate::extension::AgentListener;
use crate::faults::Faults;
use crate::frontend::scope::{self, Scope};
use crate::grants::Grants;
use crate::handover::kept::{self, take_kept};
use crate::handover::succession::{ROLE, Served, take_over};
use crate::handover::{self, Handover};
use crate::handshakes::HandshakeLimiter;
use crate::loads::Loads;
use crate::registry::{Registry, RouteBounds};
use crate::serve::{self, Listeners, Start};
use crate::shard::{Common, Peers};
use crate::tenants::Tenants;
use crate::{join, status};

/// Polling interval while a draining server waits for its connections to end.
const IDLE_POLL: Duration = Duration::from_millis(50);

/// A server at work.
pub(crate) struct Serving {
    config: ServerConfig,
    identity: Identity,
    common: Common,
    shards: Shards,
    phase: watch::Sender<Phase>,
    attachments: Attachments,
    scopes: Vec<Arc<Scope>>,
    /// The task that holds this server's leases.
    leases: Option<JoinHandle<()>>,
    stops: Stops,
    reload_requests: Reloads,
    reloads: ReloadMetrics,
    log: LogHandle,
    /// The tunnel's sockets. The kernel steers packets by their number: each stays until the last shard
    /// has ended.
    _sockets: Vec<UdpSocket>,
    succession: Succession<Served>,
}

impl Serving {
    /// Starts shards, listeners and watchers, and tells systemd once they serve.
    ///
    /// # Errors
    /// [`ServerError`], before a peer was promised anything.
    pub(crate) async fn start(
        from: Attached,
        log: LogHandle,
        predecessor: Option<Predecessor>,
    ) -> Result<Self, ServerError> {
        let Attached {
            prepared,
            attachments,
            accepting,
            mut shards,
            publish,
            kernel_log,
        } = from;
        let Prepared {
            config,
            shares,
            mut registry,
            metrics,
            extension,
            reloads,
            budget,
            tunnel,
            identity,
            grants,
            revocations,
            stops,
            reload_requests,
            restarts,
            bound,
            mut inherited,
            keeper,
            kept: kept_listeners,
        } = prepared;
        let own = identity.trust_domain.clone();
        let material = tunnel.as_ref().map(|tunnel| tunnel.material.clone());
        let routing = Registry::new(grants, &config.routing.strategies, config.limits.forget);
        let (phase, phases) = watch::channel(Phase::Running);
        let mut instance = [0; 16];
        random::fill(&mut instance)?;
        let (peers, inboxes) = Peers::new(config.shards);
        let issuer = join::issuer(&config, &identity, material.as_ref()).await?;
        if let Some(issuer) = &issuer {
            issuer.metrics.register(ours(&mut registry));
        }
        let observer = extension.as_ref().and_then(|it| it.observer(&config));
        let failed_tunnels = metrics.handshakes.clone();
        let failed_joins = metrics.join_handshakes.clone();
        let (handover, collection) = Handover::new();
        let publish = unless_given_away(publish, handover.clone());
        let control = Control::new(routing.bounded(RouteBounds::from(&config.limits)), publish);
        let mut common = Common {
            control: control.handle(),
            issuer: issuer.clone(),
            metrics,
            observer,
            tenants: Tenants::new(&config, &own, &budget),
            budget,
            limits: config.limits.clone(),
            connections: ConcurrencyLimit::new(config.limits.connections),
            shares,
            faults: Faults::default(),
            waiting: ConcurrencyLimit::new(shares.waiting),
            dials: ConcurrencyLimit::new(config.limits.dials),
            waiting_sessions: ConcurrencyLimit::new(config.limits.waiting_sessions),
            processes: AgentProcesses::new(config.limits.waiting_sessions_per_agent),
            tunnels: ConcurrencyLimit::new(config.limits.agents),
            handshakes: HandshakeLimiter::new(&config.limits.handshakes, failed_tunnels.clone()),
            server_id: identity.name.clone(),
            server_count: config.server_count,
            revocations: revocations.clone(),
            instance: InstanceId(instance),
            incarnation: 0,
            started: tokio::time::Instant::now(),
            phase: phases.clone(),
            last_link: Arc::default(),
            loads: Loads::new(bound.udp.len()),
            peers,
            handover,
            keeper: KeeperHandle::new(keeper),
        };
        let lifetimes = lifetimes(material.iter().map(|it| it.clone() as _), &bound);
        tokio::spawn(lifetime::watch(lifetimes.clone()));
        let view = {
            let seen = (&common, attachments.health());
            let (name, engine) = (identity.to_string(), shards.engines().engine());
            status::View::register(&mut registry, &config, name, engine, seen, lifetimes)
        };
        for frontend in &bound.tls {
            tokio::spawn(frontend.tls.clone().watch());
        }
        let (mut protocol, mut agents) = (None, None);
        if let Some(bound) = bound.agents {
            let handshakes = config.limits.handshakes.at_most(shares.handshakes);
            let limiter = HandshakeLimiter::new(&handshakes, failed_tunnels);
            let started = bound.start(&common.server_id, limiter).await?;
            let AgentListener {
                listener,
                protocol: served,
            } = started;
            (protocol, agents) = (Some(served), Some(listener));
        }
        let scopes = { accepting.iter().map(|it| &it.scope) }
            .chain(bound.unix.iter().map(|it| &it.scope))
            .chain(bound.tls.iter().map(|it| &it.scope));
        let scopes: Vec<_> = scopes.cloned().collect();
        let mut listeners = Listeners {
            accepting,
            unix: bound.unix,
            tls: bound.tls,
            agents,
        };
        let listening = bound.udp.first().map(UdpSocket::local_addr).transpose()?;
        let tunnels = bound.udp.len();
        let sockets = bound.udp.iter().map(UdpSocket::try_clone);
        let sockets = sockets.collect::<io::Result<Vec<_>>>()?;
        let leases = match &extension {
            Some(extension) => {
                let id = &common.server_id;
                extension.hold_leases(&config, id, phases).await?
            }
            None => None,
        };

        if let (Some(listener), Some(issuer)) = (bound.join, issuer) {
            let handshakes = config.limits.handshakes.at_most(shares.handshakes);
            let limiter = join::limiter(&handshakes, failed_joins);
            join::serve(listener, issuer, limiter).await?;
        }

        // As late as possible: from here on the predecessor does not serve any more.
        let has_predecessor = predecessor.is_some();
        let restored = match predecessor {
            Some(predecessor) => {
                let restored = take_over(predecessor, &mut common)?;
                common.keeper.open(&kept::process(&common));
                restored
            }
            None => take_kept(&mut common),
        };
        tokio::spawn(common.keeper.clone().watch(kept::process(&common)));
        bind::take_effect(&bound.udp, &mut listeners, &mut inherited);
        kept_listeners.keep(inherited.noted());
        tokio::spawn(kept_listeners.clone().watch());
        let mut udp = bound.udp.into_iter();
        let mut starting = Vec::new();
        let each = inboxes.into_iter().zip(listeners.deal(config.shards));
        for (index, (inbox, listeners)) in each.enumerate() {
            let start = Start {
                index,
                common: common.clone(),
                inbox,
                tunnel: tunnel.clone().zip(udp.next()),
                listeners,
                agents: protocol.clone(),
            };
            let (started, outcome) = oneshot::channel();
            shards.spawn(move || serve::run(start, started))?;
            starting.push(outcome);
        }
        common.control.hold_routes();
        tokio::spawn(control.run());
        for outcome in starting {
            outcome.await.map_err(|_| ServerError::Shard)??;
        }
        handover::go_on(&common, restored);
        let endpoint = match restarts.is_process() {
            true => cpc_handover::Endpoint::open(&config.state_dir, ROLE, has_predecessor),
            false => None,
        };
        let service = Served {
            common: common.clone(),
            collection,
        };
        let succession = Succession {
            service,
            endpoint,
            restarts,
            inherited,
            listeners: kept_listeners,
        };

        let admin = Admin::new(registry, log.clone(), Arc::new(view));
        let pages = admin.clone().router();
        tokio::spawn(admin::serve(bound.admin, pages, shares.http));
        if let (Some(probes), Some(extension)) = (bound.probes, &extension) {
            let pages = extension.probes(admin.clone());
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
        tokio::spawn(attachments.watch());
        tracing::info!(
            tunnel = listening.map(tracing::field::display), %identity, admin = %config.admin,
            shards = config.shards, tunnel_shards = tunnels,
            "server is up"
        );
        audit::process("started", "server", &identity);
        lifecycle::notify(&[sd_notify::NotifyState::Ready]);
        Ok(Self {
            config,
            identity,
            common,
            shards,
            phase,
            attachments,
            scopes,
            leases,
            stops,
            reload_requests,
            reloads,
            log,
            succession,
            _sockets: sockets,
        })
    }

    /// Serves until SIGTERM or SIGINT, and then drains. `reread` reads the configuration on SIGHUP.
    ///
    /// # Errors
    /// [`ServerError::Shard`] when a shard has ended by itself.
    pub(crate) async fn until_stopped(
        mut self,
        reread: &dyn Fn() -> Result<ServerConfig, ConfigError>,
    ) -> Result<End, ServerError> {
        let mut end = End::Stopped;
        let reload = lifecycle::on_reload(&mut self.reload_requests, async || {
            let is_in_force = match reread() {
                Ok(config) => {
                    let granted = set_grants(&self.common, &config).await;
                    let own = &self.identity.trust_domain;
                    let captured = self.attachments.update(&config.redirect, own);
                    scope::reload(&self.scopes, &config);
                    granted & captured & self.log.reload(&config.log.filter)
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
            self.reloads.note(is_in_force, SystemTime::now());
        });
        let idle = idle(&self.phase, &self.common);
        let lost = lifecycle::lost(&self.phase, self.shards.any_ended());
        tokio::select! {
            done = lifecycle::until_stopped(&self.phase, self.stops, Some(self.config.limits.drain), idle) => done?,
            () = reload => {}
            () = lost => return Err(ServerError::Shard),
            () = self.succession.run() => {
                audit::process("handed over", "server", &self.identity);
                self.phase.send_replace(Phase::Ended);
                end = End::HandedOver;
            }
        }
        // A shard ends its links and returns: that is short.
        self.shards.join().await;
        self.common.keeper.discard();
        if let Some(leases) = self.leases {
            let _ = leases.await;
        }
        self.log.report();
        tracing::info!("server has ended");
        audit::process("ended", "server", &self.identity);
        Ok(end)
    }
}

/// Writes routes to the kernel, but not while the server gives away what it has: its agents go to the successor,
/// which writes them from then on.
fn unless_given_away(mut publish: Publish, handover: Handover) -> Publish {
    Box::new(move |routes, keeps_served| {
        if !handover.is_collecting() {
            publish(routes, keeps_served);
        }
    })
}

/// Returns the lifetimes of all certificates that this server uses.
fn lifetimes(own: impl Iterator<Item = Arc<dyn Certificates>>, bound: &Bound) -> Lifetimes {
    let frontends = bound.tls.iter().map(|it| Arc::new(it.tls.clone()) as _);
    let agents = bound.agents.iter().map(|it| it.certificates());
    Lifetimes::new(own.chain(frontends).chain(agents).collect())
}

/// Puts the grants of a configuration in force. `false`: they are wrong, and the old ones stay.
async fn set_grants(common: &Common, config: &ServerConfig) -> bool {
    match Grants::new(&config.policy) {
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
    }
}

/// Waits until a draining server has no connection left, and then closes the limit for new ones.
async fn idle(phase: &watch::Sender<Phase>, common: &Common) {
    lifecycle::stopping(phase.subscribe()).await;
    while !common.handover.is_serving() || !common.connections.close_if_empty() {
        tokio::time::sleep(IDLE_POLL).await;
    }
}
