//! What agents find when they come: made of the configuration, before anything is served.

use std::sync::Arc;
use std::time::Duration;

use super::server_ids::ServerIds;
use super::tls::AgentTls;
use super::who::Proof;
use crate::doorstep::Doorstep;
use crate::routes::Trust;
use cpc_config::konnectivity::KonnectivityConfig;
use cpc_identity::TrustDomain;
use cpc_kubernetes::AccessError;
use cpc_kubernetes::token::TokenReviewer;

/// How agents are let in, on any shard.
#[derive(Clone)]
pub(crate) struct Door {
    /// What vouches for them.
    pub(super) proof: Proof,
    /// How far they are taken at their word.
    pub(super) trust: Trust,
    /// Their tenant.
    pub(super) tenant: TrustDomain,
    /// Our certificate.
    pub(super) tls: AgentTls,
    /// The ids that we go by.
    pub(super) ids: Arc<ServerIds>,
    /// How often an idle one is pinged over HTTP/2.
    pub(super) keepalive: Duration,
    /// Where they wait until one is known.
    pub(super) step: Doorstep,
}

impl Door {
    /// As `config` says. Tokens are reviewed from the runtime that
    /// this is called on.
    ///
    /// # Errors
    /// [`AccessError`]: how to reach the API that reviews tokens is not known.
    pub(crate) async fn new(
        config: &KonnectivityConfig,
        server_id: &str,
        tls: AgentTls,
        tenant: TrustDomain,
        step: Doorstep,
    ) -> Result<Self, AccessError> {
        let proof = match (&config.client_ca, &config.token) {
            (Some(_), _) => Proof::Certificate,
            (None, Some(token)) => {
                let client = cpc_kubernetes::client(&token.access()).await?;
                Proof::Token(TokenReviewer::new(client, token.rules()))
            }
            (None, None) => Proof::Nothing,
        };
        let trust = if config.believe_identifiers {
            tracing::warn!(
                "agents of Konnectivity serve whatever they say they do: one that lies is given the \
                 connections of others; konnectivity.believe_identifiers (for proxy-server \
                 --cpc-believe-identifiers=false) and policy.grants bind them to their identities"
            );
            Trust::Believed
        } else {
            Trust::Granted
        };
        Ok(Self {
            proof,
            trust,
            tenant,
            tls,
            ids: ServerIds::new(config.ids(server_id).collect()),
            keepalive: config.keepalive,
            step,
        })
    }
}
