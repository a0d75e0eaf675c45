//! Identity of the agent: from its certificate, and without one as an extension reports it.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::AgentError;
use super::extension::{Extend, Extension};
use cpc_config::AgentConfig;
use cpc_identity::lifetime::{Certificates, Lifetimes};
use cpc_identity::{Material, Role, provider};

/// Identity of the agent.
#[derive(Clone)]
pub(super) struct AgentIdentity {
    /// Our certificate, which native tunnels require.
    pub material: Option<Arc<Material>>,
    extension: Arc<dyn Extension>,
}

impl AgentIdentity {
    /// Loads the files of a checked configuration, and the extension.
    ///
    /// # Errors
    /// [`AgentError`] when files are missing or wrong.
    pub(super) fn load(config: &AgentConfig, extend: Extend) -> Result<Self, AgentError> {
        let kinds = config.servers.iter();
        let mut kinds = kinds.flat_map(|server| config.protocol(server).kinds());
        let material = match kinds.any(|kind| kind.is_native()) {
            true => Some(Material::load(
                config.tls.files()?,
                Role::Agent,
                provider(),
            )?),
            false => None,
        };
        let extension = extend(config).map_err(AgentError::Extension)?;
        Ok(Self {
            material,
            extension,
        })
    }

    /// Returns the extension of the agent.
    pub(super) fn extension(&self) -> &Arc<dyn Extension> {
        &self.extension
    }

    /// Returns the lifetimes of our certificates and of the trusted CAs.
    pub(super) fn lifetimes(&self) -> Lifetimes {
        let ours = { self.material.iter() }.map(|it| it.clone() as Arc<dyn Certificates>);
        Lifetimes::new(ours.chain(self.extension.certificates()).collect())
    }

    /// Returns the name of the node.
    pub(super) fn name(&self) -> Arc<str> {
        match &self.material {
            Some(material) => material.identity().name,
            None => self.extension.identity().name,
        }
    }

    /// Returns the addresses of the node.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        match &self.material {
            Some(material) => material.identity().addresses,
            None => self.extension.identity().addresses,
        }
    }
}

impl fmt::Display for AgentIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.material {
            Some(material) => material.identity().fmt(f),
            None => f.write_str(&self.name()),
        }
    }
}
