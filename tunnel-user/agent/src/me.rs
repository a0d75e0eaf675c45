//! Who the agent is: by its certificate, and without one as it says to proxy-servers.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::AgentError;
use super::konnectivity::Client;
use cpc_config::AgentConfig;
use cpc_config::agent::Protocol;
use cpc_identity::lifetime::{Certificates, Lifetimes};
use cpc_identity::{Material, Role, provider};

/// Who the agent is.
#[derive(Clone)]
pub(super) struct Me {
    /// Our certificate, without which nothing speaks QUIC.
    pub material: Option<Arc<Material>>,
    /// How proxy-servers are dialled.
    pub konnectivity: Option<Client>,
}

impl Me {
    /// As a checked configuration has it.
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

    /// Our certificates, and the CAs that we trust.
    pub(super) fn lifetimes(&self) -> Lifetimes {
        let ours = { self.material.iter() }.map(|it| it.clone() as Arc<dyn Certificates>);
        let theirs = self.konnectivity.iter();
        let theirs = theirs.map(|it| Arc::new(it.clone()) as Arc<dyn Certificates>);
        Lifetimes::new(ours.chain(theirs).collect())
    }

    /// The node's name.
    pub(super) fn name(&self) -> Arc<str> {
        match (&self.material, &self.konnectivity) {
            (Some(material), _) => material.identity().name,
            (None, Some(client)) => client.agent_id().clone(),
            (None, None) => Arc::default(),
        }
    }

    /// The node's addresses.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        match (&self.material, &self.konnectivity) {
            (Some(material), _) => material.identity().addresses,
            (None, Some(client)) => client.addresses(),
            (None, None) => Vec::new(),
        }
    }
}

impl fmt::Display for Me {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.material {
            Some(material) => material.identity().fmt(f),
            None => f.write_str(&self.name()),
        }
    }
}
