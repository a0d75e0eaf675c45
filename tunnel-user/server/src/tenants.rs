//! Limits of each tenant, so that one can't use up the share of all.
//!
//! Tenants are those of the configuration: no peer can add one.

use std::collections::HashMap;
use std::sync::Arc;

use cpc_config::ServerConfig;
use cpc_config::frontend::FrontendConfig;
use cpc_datapath::Budget;
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_identity::TrustDomain;

/// Limits of one tenant.
#[derive(Debug)]
pub(super) struct Tenant {
    /// Open connections.
    pub connections: ConcurrencyLimit,
    /// Dials under way.
    pub dials: ConcurrencyLimit,
    /// Tunnels of agents.
    pub agents: ConcurrencyLimit,
    /// Sessions that wait for another tunnel.
    pub waiting_sessions: ConcurrencyLimit,
    /// Memory held for the tenant's peers; it counts for the whole server as well.
    pub budget: Budget,
}

/// All tenants.
#[derive(Clone, Debug)]
pub(super) struct Tenants(Arc<Known>);

#[derive(Debug)]
struct Known {
    tenants: HashMap<TrustDomain, Tenant>,
    /// Limits of an unknown tenant: there should be none, but none may be without limits.
    others: Tenant,
}

impl Tenants {
    /// Creates the tenants that `config` names, and the server's `own`. `budget` is the whole server's.
    pub(super) fn new(config: &ServerConfig, own: &TrustDomain, budget: &Budget) -> Self {
        let limits = &config.limits;
        let most = |bound: Option<usize>| ConcurrencyLimit::new(bound.unwrap_or(usize::MAX));
        let tenant = || Tenant {
            connections: most(limits.connections_per_tenant),
            dials: most(limits.dials_per_tenant),
            agents: most(limits.agents_per_tenant),
            waiting_sessions: most(limits.waiting_sessions_per_tenant),
            budget: budget.part(limits.stalled_bytes_per_tenant.unwrap_or(u64::MAX)),
        };
        let frontends = &config.frontends;
        let frontends = frontends.http_connect.iter().chain(&frontends.grpc);
        let frontends = frontends.filter_map(|frontend| match frontend {
            FrontendConfig::Unix(unix) => unix.tenant.as_ref(),
            FrontendConfig::Tcp(tcp) => tcp.tenant.as_ref(),
        });
        let attachments = &config.redirect.attachments;
        let attachments = attachments.iter().filter_map(|a| a.tenant.as_ref());
        let konnectivity = config.konnectivity.iter();
        let konnectivity = konnectivity.filter_map(|k| k.tenant.as_ref());
        let trusted = config.tls.trust.iter().map(|trust| &trust.domain);
        let all = [own].into_iter().chain(trusted).chain(frontends);
        let all = all.chain(attachments).chain(konnectivity);
        Self(Arc::new(Known {
            tenants: all.map(|name| (name.clone(), tenant())).collect(),
            others: tenant(),
        }))
    }

    /// Returns the limits of the tenant called `name`.
    pub(super) fn of(&self, name: &TrustDomain) -> &Tenant {
        self.0.tenants.get(name).unwrap_or(&self.0.others)
    }

    /// Iterates over all tenants.
    pub(super) fn all(&self) -> impl Iterator<Item = &Tenant> {
        self.0.tenants.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpc_config::server::LimitsConfig;

    #[test]
    fn what_one_tenant_uses_is_not_missed_by_another() {
        let config = ServerConfig {
            limits: LimitsConfig {
                dials_per_tenant: Some(1),
                ..LimitsConfig::default()
            },
            ..serde_json::from_value(serde_json::json!({
                "frontends": {"http_connect": [{"unix": "/run/a.sock", "tenant": "other.example"}]},
            }))
            .unwrap()
        };
        let (own, other) = (
            "cluster.local".parse().unwrap(),
            "other.example".parse().unwrap(),
        );
        let tenants = Tenants::new(&config, &own, &Budget::new(1000));
        let _dial = tenants.of(&own).dials.acquire().unwrap();
        assert!(tenants.of(&own).dials.acquire().is_none());
        assert!(tenants.of(&other).dials.acquire().is_some());
        assert!(tenants.of(&own).connections.acquire().is_some());
        assert_eq!(tenants.all().count(), 2);
    }
}
