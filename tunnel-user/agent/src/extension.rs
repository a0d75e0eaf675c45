//! Extension of an agent by another crate: foreign tunnels, and what belongs to them.
//!
//! The agent names no foreign protocol. An extension dials over it ([`TunnelDialer`]) and serves its
//! streams with [`serve_dial`], under the same policy, limits, log and audit as native ones.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::sync::watch;

pub use super::dial_target::DialTarget;
pub use super::dialer::{Answer, serve_dial};
pub use super::observer::Observer;
pub use super::plan::{ServerEndpoint, ServerInfo};
pub use super::stats::TunnelStats;
pub use super::tunnel::{
    BoxError, EstablishedTunnel, GOODBYE, LOOK_INTERVAL, ServerTunnel, TunnelDialer,
};
pub use super::tunnel_info::{TunnelEnd, TunnelInfo};
pub use super::worker::Worker;
use cpc_config::AgentConfig;
use cpc_identity::lifetime::Certificates;
use cpc_observe::admin::{Admin, Pages};

/// An extension of an agent. By default it adds nothing.
pub trait Extension: Send + Sync {
    /// Adds metrics to `registry`, which has no prefix.
    fn register(&self, _registry: &mut Registry) {}

    /// Returns an observer of the agent's work, `None` where no one counts it.
    fn observer(&self) -> Option<Arc<dyn Observer>> {
        None
    }

    /// Returns the dialers of foreign kinds.
    fn dialers(&self) -> Vec<Arc<dyn TunnelDialer>> {
        Vec::new()
    }

    /// Returns the identity of an agent without a certificate, as the agent reports it to foreign servers.
    fn identity(&self) -> ReportedIdentity {
        ReportedIdentity::default()
    }

    /// Returns certificates whose expiry is announced.
    fn certificates(&self) -> Option<Arc<dyn Certificates>> {
        None
    }

    /// Starts counting foreign servers.
    ///
    /// # Errors
    /// Any error ends the start.
    fn count_servers(&self) -> BoxFuture<'_, Result<ServerCount, BoxError>> {
        Box::pin(async { Ok(ServerCount::default()) })
    }

    /// Returns the time for foreign servers to learn that the agent drains: their requests until then are
    /// served.
    fn drain_notice(&self) -> Duration {
        Duration::ZERO
    }

    /// Returns the pages of the listener `health`.
    fn health_pages(&self, admin: Admin) -> Pages {
        admin.router()
    }
}

impl Extension for () {}

/// Makes no extension: the agent has native tunnels alone.
///
/// # Errors
/// None.
pub fn none(_: &AgentConfig) -> Result<Arc<dyn Extension>, BoxError> {
    Ok(Arc::new(()))
}

/// Makes the extension of an agent with this configuration, which has been checked.
pub type Extend = fn(&AgentConfig) -> Result<Arc<dyn Extension>, BoxError>;

pub use futures_util::future::BoxFuture;

/// The identity that an agent reports about itself.
#[derive(Clone, Debug, Default)]
pub struct ReportedIdentity {
    /// Name of the agent.
    pub name: Arc<str>,
    /// Addresses of the node.
    pub addresses: Vec<IpAddr>,
}

/// The number of foreign servers, from a source beside their own reports.
#[derive(Debug)]
pub struct ServerCount {
    /// The number, `None` while unknown: then the reports count.
    pub count: watch::Receiver<Option<u32>>,
    /// Whether the larger one of both numbers counts.
    pub or_reported: bool,
}

impl Default for ServerCount {
    fn default() -> Self {
        Self {
            count: watch::channel(None).1,
            or_reported: false,
        }
    }
}
