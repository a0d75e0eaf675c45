//! The first stage: files are read and sockets are bound.

use std::sync::Arc;
use std::time::SystemTime;

use cpc_config::ServerConfig;
use cpc_datapath::Budget;
use cpc_handover::{KeeperSpec, KeptListeners};
use cpc_host::descriptors::Shares;
use cpc_host::environment::{Environment, Reloads, Restarts, Stops};
use cpc_host::host;
use cpc_host::inherited::Inherited;
use cpc_identity::Identity;
use cpc_identity::revoked::Revocations;
use cpc_observe::metrics::ours;
use cpc_observe::reload::ReloadMetrics;
use cpc_session::window::credit;
use cpc_transport::quic::MemoryBounds;
use prometheus_client::registry::Registry;

use super::tunnel::Tunnel;
use crate::bind::Bound;
use crate::check::{check, identity_without_certificate, needs_extension};
use crate::error::ServerError;
use crate::extension::Extension;
use crate::grants::Grants;
use crate::handover::succession::ROLE;
use crate::limits::{self, Limit};
use crate::metrics::ServerMetrics;

/// A server that has what it needs and serves nothing yet.
pub(crate) struct Prepared {
    pub(super) config: ServerConfig,
    /// Descriptors for each kind of connection.
    pub(super) shares: Shares,
    pub(super) registry: Registry,
    pub(super) metrics: ServerMetrics,
    /// Protocols of another system.
    pub(super) extension: Option<Box<dyn Extension>>,
    pub(super) reloads: ReloadMetrics,
    /// Memory for what peers send.
    pub(super) budget: Budget,
    /// Parameters of tunnels over QUIC; `None` where no certificate is configured.
    pub(super) tunnel: Option<Tunnel>,
    pub(super) identity: Identity,
    pub(super) grants: Grants,
    pub(super) revocations: Arc<Revocations>,
    /// Requests to stop.
    pub(super) stops: Stops,
    /// SIGHUP, from now on: it would end the process otherwise.
    pub(super) reload_requests: Reloads,
    /// SIGUSR2.
    pub(super) restarts: Restarts,
    pub(super) bound: Bound,
    /// Sockets of an earlier process that are not taken over yet.
    pub(super) inherited: Inherited,
    /// Configured keeper.
    pub(super) keeper: Option<KeeperSpec>,
    /// Listeners of a process that was killed, and later of this one, in the keeper.
    pub(super) kept: KeptListeners,
}

impl Prepared {
    /// Checks the configuration, reads every file that it names and binds every socket.
    ///
    /// # Errors
    /// [`ServerError`] naming the key, file or socket.
    pub(crate) fn new(
        mut config: ServerConfig,
        environment: Environment,
        mut inherited: Inherited,
        extension: Option<Box<dyn Extension>>,
    ) -> Result<Self, ServerError> {
        check(&config)?;
        if extension.is_none() && needs_extension(&config) {
            return Err(ServerError::NoExtension);
        }
        host::raise_file_limit();
        let shares = Shares::of_process(limits::listeners(&config));
        let connections = &mut config.limits.connections;
        *connections = host::fit_connections(*connections, shares.connections);
        let mut registry = Registry::default();
        if let Some(extension) = &extension {
            extension.register(&mut registry, &config);
        }
        let metrics = ServerMetrics::register(&mut registry, &config);
        let reloads = ReloadMetrics::register(ours(&mut registry), SystemTime::now());
        let budget = Budget::new(config.limits.stalled_bytes);
        let refusals = |limit: Limit| metrics.limits.refusals(limit.label());
        let memory = MemoryBounds {
            budget: budget.clone(),
            per_tunnel: config.limits.stalled_bytes_per_tunnel(),
            stream_window: credit(config.limits.stream_window, config.limits.resume),
            ended_by_tunnel: refusals(Limit::StalledBytesPerTunnel),
            ended_by_budget: refusals(Limit::StalledBytes),
        };
        let tunnel = Tunnel::load(&config, memory, &mut registry)?;
        let identity = match &tunnel {
            Some(tunnel) => tunnel.material.identity(),
            None => identity_without_certificate(&config)?,
        };
        let grants = Grants::new(&config.policy)?;
        let revocations = match &tunnel {
            Some(tunnel) => tunnel.material.revocations(),
            None => Revocations::load(config.tls.revoked.clone())?,
        };
        let (stops, reload_requests, restarts) = environment.into_requests()?;
        let own = &identity.trust_domain;
        let keeper = config.keeper.clone();
        let resume = config.limits.resume;
        let keeper = keeper.map(|path| KeeperSpec::new(path, ROLE, &identity.name, resume));
        let kept = KeptListeners::take(keeper.clone(), &mut inherited);
        let extending = extension.as_deref();
        let bound = Bound::open(&config, own, &revocations, &mut inherited, extending)?;
        Ok(Self {
            config,
            shares,
            registry,
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
            inherited,
            keeper,
            kept,
        })
    }
}
