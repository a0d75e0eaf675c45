//! `cpc agent`: runs on a worker, dials out to every server, and dials targets for them within its own
//! policy. Towards the control plane it opens only its control stream. An
//! [extension](extension::Extension) adds tunnels of foreign protocols.

mod address;
mod agent_identity;
mod arrivals;
mod connector;
mod dial_target;
mod dialer;
mod error;
pub mod extension;
mod handover;
mod happy_eyeballs;
pub mod join;
mod native;
mod observer;
mod offer;
mod plan;
mod policy;
mod predecessor;
mod quic;
mod renew;
mod server_stream;
mod sessions;
mod shards;
mod start;
mod stats;
mod status;
mod tunnel;
mod tunnel_info;
mod tunnel_task;
mod tunnel_views;
mod worker;

pub use error::AgentError;

use std::pin::Pin;

use cpc_config::{AgentConfig, ConfigError};
use cpc_handover::Predecessor;
use cpc_host::environment::Environment;
use cpc_host::inherited::Inherited;
use cpc_host::lifecycle::End;
use cpc_host::report::report;
use cpc_observe::logging::LogHandle;
use extension::Extend;
use start::{Prepared, Serving};

/// Checks everything of a configuration that can be checked without opening anything.
///
/// # Errors
/// [`ConfigError::Value`] naming the key.
pub fn check(config: &AgentConfig) -> Result<(), ConfigError> {
    config.check()?;
    offer::claims(&config.serve).map(drop)
}

/// Runs an agent until it is stopped, in place of `predecessor` if there is one. `extend` makes its extension, such as
/// [`none`](extension::none). `reread` reads the configuration on SIGHUP.
///
/// # Errors
/// [`AgentError`], before any server is dialled.
pub fn run(
    config: AgentConfig,
    log: LogHandle,
    (inherited, predecessor): (Inherited, Option<Predecessor>),
    extend: Extend,
    reread: &dyn Fn() -> Result<AgentConfig, ConfigError>,
) -> Pin<Box<dyn Future<Output = Result<End, AgentError>> + '_>> {
    // The crate that awaits an unboxed future compiles it, with every future below.
    Box::pin(async move {
        let prepared = Prepared::new(config, Environment::process(), inherited, extend);
        let prepared = prepared.inspect_err(|error| {
            if let Some(predecessor) = &predecessor {
                predecessor.decline(&report(error));
            }
        })?;
        let serving = Serving::start(prepared, log, predecessor).await?;
        serving.until_stopped(reread).await
    })
}

/// Runs an agent as [`run`] does, on the current `LocalSet`, until `environment` requests its end.
///
/// # Errors
/// [`AgentError`], before any server is dialled.
pub async fn run_embedded(
    environment: Environment,
    config: AgentConfig,
    log: LogHandle,
    extend: Extend,
    reread: impl Fn() -> Result<AgentConfig, ConfigError>,
) -> Result<(), AgentError> {
    let prepared = Prepared::new(config, environment, Inherited::default(), extend)?;
    let serving = Serving::start(prepared, log, None).await?;
    serving.until_stopped(&reread).await.map(|_| ())
}
