//! Parameters of the agents' listener, made from the configuration before the server serves.

use std::sync::Arc;
use std::time::Duration;

use super::server_ids::ServerIds;
use super::tls::AgentTls;
use super::who::Proof;
use crate::metrics::ProxyServerMetrics;
use cpc_config::konnectivity::KonnectivityConfig;
use cpc_identity::TrustDomain;
use cpc_kubernetes::AccessError;
use cpc_kubernetes::token::TokenReviewer;
use cpc_server::extension::HandshakeLimiter;
use cpc_server::routes::Trust;

/// Parameters of agents, on any shard.
#[derive(Clone)]
pub(super) struct Acceptor {
    /// Proof of an agent's identity.
    pub(super) proof: Proof,
    /// Trust in an agent's claims.
    pub(super) trust: Trust,
    /// Tenant of the agents.
    pub(super) tenant: TrustDomain,
    /// TLS of the listener.
    pub(super) tls: AgentTls,
    /// Our ids.
    pub(super) ids: Arc<ServerIds>,
    /// Interval of HTTP/2 pings to an idle agent.
    pub(super) keepalive: Duration,
    /// Limiter of handshakes.
    pub(super) handshakes: HandshakeLimiter,
    /// Metrics.
    pub(super) metrics: ProxyServerMetrics,
}

impl Acceptor {
    /// Creates the parameters from `config`. Reviews of tokens run on the calling runtime.
    ///
    /// # Errors
    /// [`AccessError`]: there is no access to the API that reviews tokens.
    pub(super) async fn new(
        config: &KonnectivityConfig,
        server_id: &str,
        tls: AgentTls,
        tenant: TrustDomain,
        handshakes: HandshakeLimiter,
        metrics: ProxyServerMetrics,
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
                "agents of Konnectivity serve whatever they claim: a lying one gets the connections of \
                 others; konnectivity.believe_identifiers (for proxy-server \
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
            handshakes,
            metrics,
        })
    }
}
