//! A server inside a program that simulates its surroundings: the same stages of a start and the same
//! tasks, on one thread, and without kernel programs.

use cpc_config::server::AttachmentConfig;
use cpc_config::{ConfigError, ServerConfig};
use cpc_host::environment::Environment;
use cpc_host::inherited::Inherited;
use cpc_observe::logging::LogHandle;

pub use crate::frontend::redirect::Origins;
pub use cpc_redirect::Origin;

use crate::error::ServerError;
use crate::start::{Attached, Prepared, Serving};

/// An attachment whose connections the embedding program leads to the server.
pub struct Capture {
    /// Name, tenant, allow-list and listeners; nothing is attached.
    pub attachment: AttachmentConfig,
    /// Origins of the connections.
    pub origins: Box<dyn Origins>,
}

/// Runs a server on the current `LocalSet` until `environment` requests its end.
///
/// # Errors
/// [`ServerError`], before anything is served.
pub async fn run_embedded(
    config: ServerConfig,
    log: LogHandle,
    environment: Environment,
    captures: Vec<Capture>,
    reread: impl Fn() -> Result<ServerConfig, ConfigError>,
) -> Result<(), ServerError> {
    let prepared = Prepared::new(config, environment, Inherited::default(), None)?;
    let attached = Attached::embedded(prepared, captures)?;
    let serving = Serving::start(attached, log, None).await?;
    serving.until_stopped(&reread).await.map(|_| ())
}
