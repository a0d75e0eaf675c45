//! Parameters of tunnels over QUIC.

use std::sync::Arc;

use cpc_config::ServerConfig;
use cpc_identity::{Material, Role, provider};
use cpc_observe::metrics::ours;
use cpc_transport::quic::MemoryBounds;
use cpc_transport::quic::config::Setup;
use cpc_transport::quic::secret::Secret;
use prometheus_client::registry::Registry;

use crate::error::ServerError;

/// Parameters of tunnels over QUIC.
#[derive(Clone)]
pub(crate) struct Tunnel {
    pub(crate) material: Arc<Material>,
    pub(crate) secret: Arc<Secret>,
    pub(crate) setup: Setup,
}

impl Tunnel {
    /// Loads certificate and secret. `None` where no certificate is configured.
    ///
    /// # Errors
    /// [`ServerError`] naming the file.
    pub(super) fn load(
        config: &ServerConfig,
        memory: MemoryBounds,
        metrics: &mut Registry,
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
