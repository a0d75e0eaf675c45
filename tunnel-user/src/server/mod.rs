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
pub mod control;
mod dial;
mod early;
mod frontend;
pub mod grants;
mod link;
mod metrics;
pub mod registry;
pub mod routes;
mod serve;
mod shard;
mod status;

pub use attachments::{AttachError, spec};

use std::io;
use std::sync::Arc;

use tokio::sync::{oneshot, watch};
use tunnel_proto::session::InstanceId;

use crate::admin::{self, Admin};
use crate::config::{ConfigError, ServerConfig};
use crate::datapath::Budget;
use crate::process::inherited::Inherited;
use crate::process::lifecycle::{self, Phase, Pulse};
use crate::process::{host, memory};
use crate::redirect::{Redirect, RedirectError};
use crate::telemetry::logging::LogHandle;
use crate::telemetry::metrics::registry;
use crate::tls::material::MaterialError;
use crate::tls::{Material, Role, provider};
use crate::transport::endpoint::{EndpointError, STREAM_HELD};
use crate::transport::secret::{Secret, SecretError};
use attachments::{Attachments, kernel_routes};
use bind::Bound;
use control::Control;
use grants::Grants;
use metrics::ServerMetrics;
use registry::Registry;
use serve::Start;
use shard::Common;

/// Why a server did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Certificates.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// The persisted secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The redirect.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The redirect's maps.
    #[error("redirect: {0}")]
    Redirect(#[from] RedirectError),
    /// The tunnel's endpoint.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// A socket.
    #[error("{what}: {why}")]
    Socket {
        /// Which one.
        what: String,
        /// What the system says.
        why: io::Error,
    },
    /// Something that the system should have given.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A shard has ended by itself.
    #[error("a shard has ended by itself; its panic is above")]
    Shard,
}

/// Runs a server until it is told to stop. `reread` gives the configuration anew on SIGHUP.
///
/// # Errors
/// [`ServerError`], before anything is served.
pub async fn run(
    config: ServerConfig,
    log: LogHandle,
    mut inherited: Inherited,
    reread: impl Fn() -> Result<ServerConfig, ConfigError>,
) -> Result<(), ServerError> {
    config.check()?;
    host::raise_file_limit(config.limits.connections);
    let material = Material::load(config.tls.files()?, Role::Server, provider())?;
    let secret = Secret::load_or_create(&config.state_dir)?;
    let identity = material.identity();
    let own = identity.trust_domain.clone();
    let grants = Grants::new(&config.policy)?;

    let mut hangups = lifecycle::hangups()?;
    let bound = Bound::open(&config, &own, &mut inherited)?;
    let (attached, accepting) = Attachments::attach(&config.redirect, &own, &mut inherited)?;
    inherited.report_leftovers();

    let mut metrics = registry();
    let server_metrics = ServerMetrics::register(&mut metrics, config.log.access);
    let publish: control::Publish = if config.redirect.attachments.is_empty() {
        Box::new(|_| {})
    } else {
        kernel_routes(Redirect::new(&config.redirect.pin).routes()?)
    };
    let control = Control::new(Registry::new(grants, config.limits.forget), publish);
    let (phase, phases) = watch::channel(Phase::Running);
    let mut instance = [0; 16];
    aws_lc_rs::rand::fill(&mut instance).map_err(|_| io::Error::other("no random numbers"))?;
    let common = Common {
        control: control.handle(),
        metrics: server_metrics,
        budget: Budget::new(config.limits.stalled_bytes, STREAM_HELD),
        limits: config.limits.clone(),
        server_id: identity.name.clone(),
        server_count: config.server_count,
        instance: InstanceId(instance),
        started: tokio::time::Instant::now(),
        phase: phases.clone(),
        last_link: Arc::default(),
    };
    let view = status::View::register(&mut metrics, &config, identity.to_string(), &common);
    for frontend in &bound.tls {
        tokio::spawn(frontend.tls.clone().watch());
    }
    let pulse = Pulse::default();
    let start = Start {
        common: common.clone(),
        material: material.clone(),
        secret,
        udp: bound.udp,
        accepting,
        unix: bound.unix,
        tls: bound.tls,
        pulse: pulse.clone(),
    };
    let (started, starting) = oneshot::channel();
    // Dropped with the shard, however it ends.
    let (alive, mut shard_ended) = watch::channel(());
    let thread = crate::process::shard::spawn("shard-0", move || async move {
        let _alive = alive;
        serve::run(start, started).await;
    })?;
    tokio::spawn(control.run());
    let listening = starting.await.map_err(|_| ServerError::Shard)??;

    let admin = Admin::new(metrics, log.clone(), Arc::new(view));
    tokio::spawn(admin::serve(bound.admin, admin.clone().router()));
    tokio::spawn(admin::serve(bound.health, admin.health_router()));
    tokio::spawn(material.watch(|| {}));
    tokio::spawn(lifecycle::watchdog(pulse));
    tokio::spawn(memory::give_back(common.budget.clone()));
    tokio::spawn(attachments::forward_log(config.redirect.clone()));
    tracing::info!(%listening, %identity, admin = %config.admin, "server is up");
    lifecycle::notify(&[sd_notify::NotifyState::Ready]);

    let reload = lifecycle::on_hangup(&mut hangups, async || match reread() {
        Ok(config) => {
            match Grants::new(&config.policy) {
                Ok(grants) => common.control.set_grants(grants).await,
                Err(error) => tracing::warn!(%error, "policy not reloaded, the old one stays"),
            }
            attached.update(&config.redirect, &own);
            if let Err(error) = log.set(&config.log.filter) {
                tracing::warn!(%error, "log filter not reloaded, the old one stays");
            }
        }
        Err(error) => tracing::warn!(%error, "configuration not reloaded, the old one stays"),
    });
    let mut shard_lost = shard_ended.clone();
    let idle = async {
        let _ = shard_ended.changed().await;
    };
    let lost = lifecycle::lost(&phase, async {
        let _ = shard_lost.changed().await;
    });
    tokio::select! {
        done = lifecycle::until_stopped(&phase, config.limits.drain, idle) => done?,
        () = reload => {}
        () = lost => return Err(ServerError::Shard),
    }
    // Its last words are short: the shard ends its links and returns.
    let _ = thread.join();
    tracing::info!("server has ended");
    Ok(())
}
