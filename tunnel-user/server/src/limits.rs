//! The limits of a server: their names in configuration and metrics, and their texts when they refuse.

use prometheus_client::registry::Registry;

use cpc_config::ServerConfig;
use cpc_config::frontend::FrontendConfig;
use cpc_config::server::LimitsConfig;
use cpc_host::descriptors::Listeners;
use cpc_observe::limits::LimitMetrics;

/// A bound at which new work is refused while what is there goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    /// Open connections, dials under way among them.
    Connections,
    /// The same of one tenant.
    ConnectionsPerTenant,
    /// The same over one tunnel.
    ConnectionsPerTunnel,
    /// Dials under way.
    Dials,
    /// The same of one tenant.
    DialsPerTenant,
    /// Dials that one tunnel's agent has not answered.
    DialsPerTunnel,
    /// Bytes that peers may make the server hold.
    StalledBytes,
    /// The same of one tenant's.
    StalledBytesPerTenant,
    /// The same of one tunnel's.
    StalledBytesPerTunnel,
    /// Tunnels of agents.
    Agents,
    /// The same of one tenant.
    AgentsPerTenant,
    /// Routes.
    Routes,
    /// The same of one tenant.
    RoutesPerTenant,
    /// The same of one agent.
    RoutesPerAgent,
    /// Connections that wait for another tunnel.
    WaitingSessions,
    /// The same of one tenant.
    WaitingSessionsPerTenant,
    /// The same of one identity of an agent.
    WaitingSessionsPerAgent,
    /// Handshakes under way at the tunnel's port.
    Handshakes,
}

impl Limit {
    /// All there are.
    const ALL: [Self; 18] = [
        Self::Connections,
        Self::ConnectionsPerTenant,
        Self::ConnectionsPerTunnel,
        Self::Dials,
        Self::DialsPerTenant,
        Self::DialsPerTunnel,
        Self::StalledBytes,
        Self::StalledBytesPerTenant,
        Self::StalledBytesPerTunnel,
        Self::Agents,
        Self::AgentsPerTenant,
        Self::Routes,
        Self::RoutesPerTenant,
        Self::RoutesPerAgent,
        Self::WaitingSessions,
        Self::WaitingSessionsPerTenant,
        Self::WaitingSessionsPerAgent,
        Self::Handshakes,
    ];

    /// Metric label, and its key below `limits`.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::ConnectionsPerTenant => "connections_per_tenant",
            Self::ConnectionsPerTunnel => "connections_per_tunnel",
            Self::Dials => "dials",
            Self::DialsPerTenant => "dials_per_tenant",
            Self::DialsPerTunnel => "dials_per_tunnel",
            Self::StalledBytes => "stalled_bytes",
            Self::StalledBytesPerTenant => "stalled_bytes_per_tenant",
            Self::StalledBytesPerTunnel => "stalled_bytes_per_tunnel",
            Self::Agents => "agents",
            Self::AgentsPerTenant => "agents_per_tenant",
            Self::Routes => "routes",
            Self::RoutesPerTenant => "routes_per_tenant",
            Self::RoutesPerAgent => "routes_per_agent",
            Self::WaitingSessions => "waiting_sessions",
            Self::WaitingSessionsPerTenant => "waiting_sessions_per_tenant",
            Self::WaitingSessionsPerAgent => "waiting_sessions_per_agent",
            Self::Handshakes => "handshakes.at_once",
        }
    }

    /// Returns the bound, `None` without one.
    fn of(self, limits: &LimitsConfig) -> Option<u64> {
        let count = |count: usize| u64::try_from(count).ok();
        match self {
            Self::Connections => count(limits.connections),
            Self::ConnectionsPerTenant => limits.connections_per_tenant.and_then(count),
            Self::ConnectionsPerTunnel => count(limits.connections_per_tunnel),
            Self::Dials => count(limits.dials),
            Self::DialsPerTenant => limits.dials_per_tenant.and_then(count),
            Self::DialsPerTunnel => count(limits.dials_per_tunnel),
            Self::StalledBytes => Some(limits.stalled_bytes),
            Self::StalledBytesPerTenant => limits.stalled_bytes_per_tenant,
            Self::StalledBytesPerTunnel => Some(limits.stalled_bytes_per_tunnel()),
            Self::Agents => count(limits.agents),
            Self::AgentsPerTenant => limits.agents_per_tenant.and_then(count),
            Self::Routes => count(limits.routes),
            Self::RoutesPerTenant => limits.routes_per_tenant.and_then(count),
            Self::RoutesPerAgent => count(limits.routes_per_agent),
            Self::WaitingSessions => count(limits.waiting_sessions),
            Self::WaitingSessionsPerTenant => limits.waiting_sessions_per_tenant.and_then(count),
            Self::WaitingSessionsPerAgent => count(limits.waiting_sessions_per_agent),
            Self::Handshakes => count(limits.handshakes.at_once),
        }
    }

    /// Returns the text for a peer that is refused.
    pub(super) fn text(self, limits: &LimitsConfig) -> String {
        let most = self.of(limits).unwrap_or_default();
        let what = match self {
            Self::Connections => format!("the server holds {most} connections"),
            Self::ConnectionsPerTenant => format!("this tenant holds {most} connections"),
            Self::ConnectionsPerTunnel => format!("its tunnel holds {most} connections"),
            Self::Dials => format!("the server has {most} dials under way"),
            Self::DialsPerTenant => format!("this tenant has {most} dials under way"),
            Self::DialsPerTunnel => format!("its agent has not answered {most} dials"),
            Self::StalledBytes => format!("unread data may take {most} bytes"),
            Self::StalledBytesPerTenant => {
                format!("unread data of this tenant may take {most} bytes")
            }
            Self::StalledBytesPerTunnel => {
                format!("unread data of its tunnel may take {most} bytes")
            }
            Self::Agents => format!("the server serves {most} agents"),
            Self::AgentsPerTenant => format!("the server serves {most} agents of this tenant"),
            Self::Routes => format!("the server holds {most} routes"),
            Self::RoutesPerTenant => format!("this tenant has {most} routes"),
            Self::RoutesPerAgent => format!("one agent has {most} routes"),
            Self::WaitingSessions => format!("{most} connections wait for a tunnel"),
            Self::WaitingSessionsPerTenant => {
                format!("{most} connections of this tenant wait for a tunnel")
            }
            Self::WaitingSessionsPerAgent => {
                format!("{most} connections of one agent wait for a tunnel")
            }
            Self::Handshakes => format!("the server has {most} handshakes under way"),
        };
        format!("{what} (limits.{})", self.label())
    }
}

/// Returns the listeners of a server that take a share of its file descriptors.
pub(super) fn listeners(config: &ServerConfig) -> Listeners {
    let frontends = { config.frontends.http_connect.iter() }.chain(&config.frontends.grpc);
    let tls = frontends.filter(|frontend| matches!(frontend, FrontendConfig::Tcp(_)));
    let http = [true, config.health.is_some(), config.tls.cert.is_some()];
    let others = [config.join.is_some(), config.konnectivity.is_some()];
    let count = |there: &[bool]| there.iter().filter(|is_there| **is_there).count();
    Listeners {
        http: count(&http),
        tls: tls.count() + count(&others),
    }
}

/// Registers their metrics.
pub(super) fn register(registry: &mut Registry, limits: &LimitsConfig) -> LimitMetrics {
    let all = Limit::ALL.map(|limit| (limit.label(), limit.of(limits)));
    LimitMetrics::register(registry, all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_says_what_is_full_and_which_key_says_so() {
        let limits = LimitsConfig {
            connections_per_tenant: Some(7),
            dials_per_tenant: Some(7),
            stalled_bytes_per_tenant: Some(7),
            agents_per_tenant: Some(7),
            routes_per_tenant: Some(7),
            waiting_sessions_per_tenant: Some(7),
            ..LimitsConfig::default()
        };
        for limit in Limit::ALL {
            let text = limit.text(&limits);
            let most = limit.of(&limits).unwrap().to_string();
            assert!(text.contains(&most), "{text}");
            assert!(
                text.ends_with(&format!("(limits.{})", limit.label())),
                "{text}"
            );
        }
    }
}
