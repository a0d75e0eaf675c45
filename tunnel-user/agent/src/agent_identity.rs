//! Identity of the agent: from its certificate, and without one as it reports itself to proxy-servers.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::AgentError;
use super::konnectivity::Client;
use cpc_config::AgentConfig;
use cpc_config::agent::Protocol;
use cpc_identity::lifetime::{Certificates, Lifetimes};
use cpc_identity::{Material, Role, provider};

/// Identity of the agent.
#[derive(Clone)]
pub(super) struct AgentIdentity {
    /// Our certificate, which QUIC requires.
    pub material: Option<Arc<Material>>,
    /// Parameters of dials to proxy-servers.
    pub konnectivity: Option<Client>,
}

impl AgentIdentity {
    /// Loads the files of a checked configuration.
    ///
    /// # Errors
    /// [`AgentError`] when files are missing or wrong.
    pub(super) fn load(config: &AgentConfig) -> Result<Self, AgentError> {
        let over_quic = config
            .servers
            .iter()
            .any(|server| config.protocol(server) != Protocol::Konnectivity);
        let material = match over_quic {
            true => Some(Material::load(
                config.tls.files()?,
                Role::Agent,
                provider(),
            )?),
            false => None,
        };
        Ok(Self {
            material,
            konnectivity: config.konnectivity.as_ref().map(Client::new).transpose()?,
        })
    }

    /// Returns the lifetimes of our certificates and of the trusted CAs.
    pub(super) fn lifetimes(&self) -> Lifetimes {
        let ours = { self.material.iter() }.map(|it| it.clone() as Arc<dyn Certificates>);
        let theirs = self.konnectivity.iter();
        let theirs = theirs.map(|it| Arc::new(it.clone()) as Arc<dyn Certificates>);
        Lifetimes::new(ours.chain(theirs).collect())
    }

    /// Returns the name of the node.
    pub(super) fn name(&self) -> Arc<str> {
        match (&self.material, &self.konnectivity) {
            (Some(material), _) => material.identity().name,
            (None, Some(client)) => client.agent_id().clone(),
            (None, None) => Arc::default(),
        }
    }

    /// Returns the addresses of the node.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        match (&self.material, &self.konnectivity) {
            (Some(material), _) => material.identity().addresses,
            (None, Some(client)) => client.addresses(),
            (None, None) => Vec::new(),
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
