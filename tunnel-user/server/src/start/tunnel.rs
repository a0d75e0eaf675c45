//! What tunnels over QUIC need, and the identity of the server.

use std::sync::Arc;

use cpc_config::{ConfigError, ServerConfig};
use cpc_identity::identity::{IdentityError, name_of};
use cpc_identity::{Identity, Material, Role, provider};
use cpc_observe::metrics::ours;
use cpc_transport::quic::MemoryBounds;
use cpc_transport::quic::config::Setup;
use cpc_transport::quic::secret::Secret;
use prometheus_client::registry::Registry;

use crate::error::ServerError;

/// Tenant of a server without a certificate that names one.
const DEFAULT_TENANT: &str = "cluster.local";

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

/// Returns the identity in the server's certificate, or without one what is configured.
///
/// # Errors
/// [`ConfigError::Value`] where the configuration names no identity.
pub(crate) fn own_identity(
    config: &ServerConfig,
    tunnel: Option<&Tunnel>,
) -> Result<Identity, ConfigError> {
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
