//! Shares of the table of routes, which the kernel holds for all tenants together: an agent can't take
//! the others' place in it, nor a tenant the others'.

use std::collections::HashMap;

use tunnel_proto::route::Claim;

use super::claims::Key;
use crate::limits::Limit;
use cpc_config::server::LimitsConfig;
use cpc_identity::TrustDomain;

/// Maximum number of routes. A claim is one route, that of the default route two.
#[derive(Clone, Copy, Debug)]
pub struct RouteBounds {
    /// Bound of all tenants.
    pub all: usize,
    /// Bound of one tenant, if it is to be less than three quarters of what the others leave.
    pub per_tenant: Option<usize>,
    /// Bound of one identity; of one process where identities are shared.
    pub per_agent: usize,
}

impl From<&LimitsConfig> for RouteBounds {
    fn from(limits: &LimitsConfig) -> Self {
        Self {
            all: limits.routes,
            per_tenant: limits.routes_per_tenant,
            per_agent: limits.routes_per_agent,
        }
    }
}

impl RouteBounds {
    /// Returns the reason for a claim that does not fit.
    pub(super) fn text(&self, limit: Limit) -> String {
        let what = match limit {
            Limit::RoutesPerAgent => format!("one agent has {} routes at most", self.per_agent),
            Limit::RoutesPerTenant => {
                let most = self.per_tenant.unwrap_or(self.all);
                format!("one tenant has {most} routes at most")
            }
            _ => format!(
                "the server holds {} routes at most, and one tenant three quarters of what others leave",
                self.all
            ),
        };
        format!("{what} (limits.{})", limit.label())
    }
}

/// Returns the number of entries of a claim in the table.
pub(super) fn cost(claim: &Claim) -> usize {
    match claim {
        Claim::DefaultRoute => 2,
        _ => 1,
    }
}

/// Use of the table.
#[derive(Debug, Default)]
pub(super) struct Shares {
    tenants: HashMap<TrustDomain, usize>,
    all: usize,
}

impl Shares {
    /// Counts a claim without another holder.
    pub(super) fn add(&mut self, (tenant, claim): &Key) {
        *self.tenants.entry(tenant.clone()).or_default() += cost(claim);
        self.all += cost(claim);
    }

    /// Removes a claim without another holder.
    pub(super) fn remove(&mut self, (tenant, claim): &Key) {
        if let Some(own) = self.tenants.get_mut(tenant) {
            *own -= cost(claim);
            self.all -= cost(claim);
            if *own == 0 {
                self.tenants.remove(tenant);
            }
        }
    }

    /// Returns the number of routes that a tenant may still take, and the bound that decides.
    pub(super) fn room(&self, bounds: &RouteBounds, tenant: &TrustDomain) -> (usize, Limit) {
        let own = self.tenants.get(tenant).copied().unwrap_or(0);
        let left = bounds.all.saturating_sub(self.all - own);
        // The next tenant finds a quarter of it.
        let fair = left - left / 4;
        let (most, limit) = match bounds.per_tenant {
            Some(most) if most < fair => (most, Limit::RoutesPerTenant),
            _ => (fair, Limit::Routes),
        };
        (most.saturating_sub(own), limit)
    }

    /// Returns the use by all tenants, and by the one that has most.
    pub(super) fn taken(&self) -> (usize, usize) {
        (self.all, self.tenants.values().copied().max().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: RouteBounds = RouteBounds {
        all: 100,
        per_tenant: None,
        per_agent: 10,
    };

    fn claim(tenant: &str, number: u8) -> Key {
        let claim = Claim::Address([10, 0, 0, number].into());
        (tenant.parse().unwrap(), claim)
    }

    #[test]
    fn whoever_comes_next_finds_room() {
        let mut shares = Shares::default();
        for (tenant, most) in [("a", 75), ("b", 19), ("c", 5), ("d", 1)] {
            let of = tenant.parse().unwrap();
            let (room, limit) = shares.room(&BOUNDS, &of);
            assert_eq!((room, limit), (most, Limit::Routes), "{tenant}");
            for number in 0..most {
                shares.add(&claim(tenant, number as u8));
            }
            assert_eq!(shares.room(&BOUNDS, &of).0, 0, "{tenant}");
        }
        assert_eq!(shares.taken(), (100, 75));
        for number in 0..75 {
            shares.remove(&claim("a", number));
        }
        assert_eq!(shares.taken(), (25, 19));
        assert!(shares.room(&BOUNDS, &"a".parse().unwrap()).0 > 50);
    }

    #[test]
    fn a_bound_for_each_tenant_counts_where_it_is_less() {
        let bounds = RouteBounds {
            per_tenant: Some(20),
            ..BOUNDS
        };
        let mut shares = Shares::default();
        let tenant = "a".parse().unwrap();
        assert_eq!(shares.room(&bounds, &tenant), (20, Limit::RoutesPerTenant));
        shares.add(&("a".parse().unwrap(), Claim::DefaultRoute));
        assert_eq!(shares.room(&bounds, &tenant).0, 18);
        let text = bounds.text(Limit::RoutesPerTenant);
        assert!(text.contains("20") && text.ends_with("(limits.routes_per_tenant)"));
    }
}
