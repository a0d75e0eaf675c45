//! The protocols of Konnectivity on a server: agents (`agents`), clients (`clients`), the form of its
//! refusals, its leases, pages and metrics.

mod agents;
mod answer;
mod clients;
mod leases;
mod observer;
mod refusals;

use std::sync::Arc;

use cpc_config::ServerConfig;
use cpc_config::server::LimitsConfig;
use cpc_host::lifecycle::Phase;
use cpc_identity::TrustDomain;
use cpc_identity::revoked::Revocations;
use cpc_observe::admin::{Admin, Pages};
use cpc_server::ServerError;
use cpc_server::extension::{BoundAgents, ClientProtocol, Extension, Observer, Refusals, Sockets};
use futures_util::future::LocalBoxFuture;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::agents::Bound;
use self::clients::ProxyService;
use self::observer::DialCounters;
use self::refusals::ProxyServerRefusals;
use crate::health::server_router;
use crate::metrics::ProxyServerMetrics;

/// Konnectivity, for a server.
#[derive(Debug, Default)]
pub struct ServerExtension {
    metrics: ProxyServerMetrics,
}

impl Extension for ServerExtension {
    fn register(&self, registry: &mut Registry, config: &ServerConfig) {
        if config.is_konnectivity() {
            self.metrics.register(registry);
        }
    }

    fn observer(&self, config: &ServerConfig) -> Option<Arc<dyn Observer>> {
        let counters = || DialCounters::new(self.metrics.clone());
        config.is_konnectivity().then(|| Arc::new(counters()) as _)
    }

    fn clients(&self, limits: &LimitsConfig) -> Arc<dyn ClientProtocol> {
        Arc::new(ProxyService::new(self.metrics.clone(), limits))
    }

    fn refusals(&self) -> &'static dyn Refusals {
        &ProxyServerRefusals
    }

    fn bind_agents(
        &self,
        config: &ServerConfig,
        own: &TrustDomain,
        revocations: &Arc<Revocations>,
        sockets: &mut Sockets<'_>,
    ) -> Result<Option<Box<dyn BoundAgents>>, ServerError> {
        let bound = Bound::open(config, own, revocations, sockets, &self.metrics)?;
        Ok(bound.map(|bound| Box::new(bound) as _))
    }

    fn hold_leases<'a>(
        &'a self,
        config: &'a ServerConfig,
        server_id: &'a str,
        phase: watch::Receiver<Phase>,
    ) -> LocalBoxFuture<'a, Result<Option<JoinHandle<()>>, ServerError>> {
        let calls = self.metrics.leases.clone();
        Box::pin(leases::hold(config, server_id, calls, phase))
    }

    fn probes(&self, admin: Admin) -> Pages {
        server_router(admin)
    }
}
