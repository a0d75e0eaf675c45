//! `cpc server`: on the control plane. Frontends take clients in, the router picks a link, the
//! datapath moves the bytes.
//!
//! ```text
//! frontend -> dial (routes) -> link ==QUIC==> agent
//!                ^
//! control (registry, grants) publishes routes to shards and kernel
//! ```
//!
//! [`run`] is the composition root: it reads nothing from the environment but what it is given, and returns
//! when all has ended. The stages of a start are in `start`.

mod agent_processes;
mod attachments;
mod bind;
mod breaker;
mod check;
pub mod control;
mod dial;
mod early;
mod embedding;
mod error;
pub mod extension;
mod faults;
mod frontend;
pub mod grants;
mod handover;
mod handshakes;
mod join;
mod limits;
mod link;
mod loads;
mod metrics;
mod permits;
mod privileges;
pub mod registry;
mod resumption;
pub mod routes;
mod serve;
mod shard;
mod start;
mod status;
mod tenants;
mod usage;

pub use attachments::{AttachError, Attachments, redirect, spec};
pub use check::check;
pub use cpc_redirect::RedirectError;
pub use embedding::{Capture, Origin, Origins, run_embedded};
pub use error::ServerError;
pub use privileges::{for_start, kept};

use std::pin::Pin;

use cpc_config::{ConfigError, ServerConfig};
use cpc_handover::Predecessor;
use cpc_host::environment::Environment;
use cpc_host::inherited::Inherited;
use cpc_host::lifecycle::End;
use cpc_host::report::report;
use cpc_observe::logging::LogHandle;
use extension::Extension;
use start::{Attached, Prepared, Serving, Tunnel};

/// Runs a server until it is told to stop, in place of `predecessor` if there is one. `reread` reads the configuration on SIGHUP. `extension` serves
/// the protocols of another system.
///
/// # Errors
/// [`ServerError`], before anything is served.
pub fn run(
    config: ServerConfig,
    log: LogHandle,
    (inherited, predecessor): (Inherited, Option<Predecessor>),
    reread: &dyn Fn() -> Result<ServerConfig, ConfigError>,
    extension: Option<Box<dyn Extension>>,
) -> Pin<Box<dyn Future<Output = Result<End, ServerError>> + '_>> {
    // The crate that awaits an unboxed future compiles it, with every future below.
    Box::pin(async move {
        let environment = Environment::process();
        let prepared = Prepared::new(config, environment, inherited, extension);
        let attached = prepared.and_then(Attached::new).inspect_err(|error| {
            if let Some(predecessor) = &predecessor {
                predecessor.decline(&report(error));
            }
        })?;
        let serving = Serving::start(attached, log, predecessor).await?;
        serving.until_stopped(reread).await
    })
}
