//! The first stage: files are read, sockets are bound, and capabilities are gone.

use std::net::{SocketAddr, TcpListener};
use std::time::SystemTime;

use prometheus_client::registry::Registry;
use tunnel_proto::route::Claim;

use crate::agent_identity::AgentIdentity;
use crate::error::AgentError;
use crate::extension::Extend;
use crate::offer;
use crate::policy::Policy;
use crate::worker::{CONNECTIONS, STALLED_BYTES, WAITING_SESSIONS};
use cpc_config::AgentConfig;
use cpc_datapath::Engines;
use cpc_datapath::shard::Shards;
use cpc_host::descriptors::{Listeners, Shares};
use cpc_host::environment::{Environment, Reloads, Restarts, Stops};
use cpc_host::host;
use cpc_host::inherited::Inherited;
use cpc_host::privileges::{self, CapabilitySet};
use cpc_observe::limits::LimitMetrics;
use cpc_observe::metrics::{DialMetrics, ours};
use cpc_observe::reload::ReloadMetrics;

/// An agent that has what it needs and serves nothing yet.
pub(crate) struct Prepared {
    pub(super) config: AgentConfig,
    /// Requests to stop.
    pub(super) stops: Stops,
    /// SIGHUP, from now on: it would end the process otherwise.
    pub(super) reload_requests: Reloads,
    /// SIGUSR2.
    pub(super) restarts: Restarts,
    /// The listeners, and sockets of an earlier process.
    pub(super) inherited: Inherited,
    /// Descriptors for each kind of connection.
    pub(super) shares: Shares,
    pub(super) identity: AgentIdentity,
    /// Claims beyond the node addresses.
    pub(super) claims: Vec<Claim>,
    pub(super) policy: Policy,
    pub(super) admin: TcpListener,
    /// Listener of `health`.
    pub(super) probes: Option<TcpListener>,
    /// Shards, none of which is started.
    pub(super) shards: Shards,
    pub(super) registry: Registry,
    pub(super) dials: DialMetrics,
    pub(super) reloads: ReloadMetrics,
    pub(super) limits: LimitMetrics,
}

impl Prepared {
    /// Checks the configuration, reads every file that it names, binds every socket, and gives back all
    /// capabilities. An embedded agent has those of its process, and its shards on the current thread.
    ///
    /// # Errors
    /// [`AgentError`] naming the key, file or socket.
    pub(crate) fn new(
        mut config: AgentConfig,
        environment: Environment,
        mut inherited: Inherited,
        extend: Extend,
    ) -> Result<Self, AgentError> {
        crate::check(&config)?;
        let is_embedded = environment.is_embedded();
        let (stops, reload_requests, restarts) = environment.into_requests()?;
        host::raise_file_limit();
        let http = if config.health.is_some() { 2 } else { 1 };
        let shares = Shares::of_process(Listeners { http, tls: 0 });
        let connections = &mut config.limits.connections;
        *connections = host::fit_connections(*connections, shares.connections);
        let identity = AgentIdentity::load(&config, extend)?;
        let claims = offer::claims(&config.serve)?;
        let policy = Policy::new(config.allow.clone(), identity.clone());
        let admin = listen(config.admin, &mut inherited)?;
        let probes = config.health.map(|addr| listen(addr, &mut inherited));
        let probes = probes.transpose()?;
        inherited.report_leftovers();

        let mut registry = Registry::default();
        identity.extension().register(&mut registry);
        let dials = DialMetrics::register(ours(&mut registry));
        let reloads = ReloadMetrics::register(ours(&mut registry), SystemTime::now());
        let shards = match is_embedded {
            true => Shards::on_this_thread(),
            false => Shards::new(Engines::choose(config.datapath.engine, config.shards)),
        };
        shards.engines().register(ours(&mut registry));
        let limits = LimitMetrics::register(
            ours(&mut registry),
            [
                (CONNECTIONS, u64::try_from(config.limits.connections).ok()),
                (STALLED_BYTES, Some(config.limits.stalled_bytes)),
                (
                    WAITING_SESSIONS,
                    u64::try_from(config.limits.waiting_sessions).ok(),
                ),
            ],
        );
        if !is_embedded {
            privileges::finish(CapabilitySet::empty(), "")?;
        }
        Ok(Self {
            config,
            stops,
            reload_requests,
            restarts,
            inherited,
            shares,
            identity,
            claims,
            policy,
            admin,
            probes,
            shards,
            registry,
            dials,
            reloads,
            limits,
        })
    }
}

fn listen(addr: SocketAddr, inherited: &mut Inherited) -> Result<TcpListener, AgentError> {
    let opened = match inherited.tcp(addr, None) {
        Some(listener) => Ok(listener),
        None => cpc_host::listen::tcp(addr),
    };
    let noted = opened.and_then(|listener| {
        inherited.note("", &listener)?;
        Ok(listener)
    });
    noted.map_err(|why| AgentError::Admin { addr, why })
}
