//! Konnectivity as an extension of an agent: dials proxy-servers, counts what proxy-agent counts, and
//! serves its pages.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tunnel_proto::close::CloseReason;

use super::client::{Client, ClientError};
use super::dialer::ProxyServerDialer;
use super::leases;
use crate::health::agent_router;
use crate::metrics::{DialTrouble, ProxyAgentMetrics};
use cpc_agent::extension::{
    BoxError, BoxFuture, Extension, Observer, ReportedIdentity, ServerCount, TunnelDialer,
};
use cpc_config::AgentConfig;
use cpc_config::konnectivity::{CountSource, LeaseConfig};
use cpc_identity::lifetime::Certificates;
use cpc_observe::admin::{Admin, Pages};

/// Time for a proxy-server to learn that the agent drains: its requests until then are served.
const DRAIN_HEARD: Duration = Duration::from_secs(1);

/// The part of proxy-agent in an agent. Without `konnectivity` in its configuration only the pages are in
/// use.
pub struct AgentExtension {
    client: Option<Arc<Client>>,
    leases: Option<LeaseConfig>,
    /// Whether the larger one of leases and reports is the number of proxy-servers.
    counts_both: bool,
    metrics: ProxyAgentMetrics,
}

impl AgentExtension {
    /// Reads the configuration and the files that it names.
    ///
    /// # Errors
    /// [`ClientError`] naming the key.
    pub fn new(config: &AgentConfig) -> Result<Self, ClientError> {
        let config = config.konnectivity.as_ref();
        let client = config.map(Client::new).transpose()?;
        Ok(Self {
            client: client.map(Arc::new),
            leases: config.and_then(|config| config.leases.clone()),
            counts_both: config.is_some_and(|config| config.server_count == CountSource::Max),
            metrics: ProxyAgentMetrics::default(),
        })
    }

    /// Makes the extension of an agent.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn extend(config: &AgentConfig) -> Result<Arc<dyn Extension>, BoxError> {
        Ok(Arc::new(Self::new(config)?))
    }
}

impl Extension for AgentExtension {
    fn register(&self, registry: &mut Registry) {
        if self.client.is_some() {
            self.metrics.register(registry);
        }
    }

    fn observer(&self) -> Option<Arc<dyn Observer>> {
        self.client.as_ref()?;
        Some(Arc::new(MetricsObserver(self.metrics.clone())))
    }

    fn dialers(&self) -> Vec<Arc<dyn TunnelDialer>> {
        let client = self.client.iter();
        let dialer = client.map(|client| {
            let dialer = ProxyServerDialer::new(client.clone(), self.metrics.clone());
            Arc::new(dialer) as Arc<dyn TunnelDialer>
        });
        dialer.collect()
    }

    fn identity(&self) -> ReportedIdentity {
        let identity = self.client.as_ref().map(|client| ReportedIdentity {
            name: client.agent_id().clone(),
            addresses: client.addresses(),
        });
        identity.unwrap_or_default()
    }

    fn certificates(&self) -> Option<Arc<dyn Certificates>> {
        Some(self.client.clone()?)
    }

    fn count_servers(&self) -> BoxFuture<'_, Result<ServerCount, BoxError>> {
        Box::pin(async {
            let Some(config) = &self.leases else {
                return Ok(ServerCount::default());
            };
            let count = leases::count(config, self.metrics.leases.clone()).await?;
            let or_reported = self.counts_both;
            Ok(ServerCount { count, or_reported })
        })
    }

    fn drain_notice(&self) -> Duration {
        match &self.client {
            Some(_) => DRAIN_HEARD,
            None => Duration::ZERO,
        }
    }

    fn health_pages(&self, admin: Admin) -> Pages {
        agent_router(admin)
    }
}

/// Counts an agent's work under the names of proxy-agent.
struct MetricsObserver(ProxyAgentMetrics);

impl Observer for MetricsObserver {
    fn target_connected(&self, elapsed: Duration) {
        self.0.dialled(elapsed);
    }

    fn target_failed(&self, reason: CloseReason) {
        self.0.dial_failed(match reason {
            CloseReason::DialTimeout => DialTrouble::Timeout,
            _ => DialTrouble::Unknown,
        });
    }

    fn connection_opened(&self) {
        self.0.endpoint_opened();
    }

    fn connection_closed(&self) {
        self.0.endpoint_closed();
    }

    fn servers_counted(&self, reached: usize, known: usize) {
        self.0.set_servers(reached, known);
    }
}
