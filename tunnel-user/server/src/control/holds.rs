//! Times for which routes outlive their agents, which are about to come back.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use cpc_identity::{Identity, TrustDomain};

/// Time for agents to come back to a server, or to its successor.
const RETURN: Duration = Duration::from_secs(3);

/// Maximum number of holds of one agent within [`WINDOW`]: a hold delays the refusal of what no agent serves.
const MOST: usize = 5;

/// Window of [`MOST`].
const WINDOW: Duration = Duration::from_secs(150);

/// The holds in force.
#[derive(Debug, Default)]
pub(super) struct Holds {
    /// End of the hold of all routes.
    all: Option<Instant>,
    /// Ends of the holds by tenant.
    tenants: HashMap<TrustDomain, Instant>,
    /// Starts of the last holds of each agent, by the URI of its identity.
    agents: HashMap<String, Vec<Instant>>,
}

impl Holds {
    /// Holds the routes of all agents.
    pub(super) fn hold_all(&mut self, now: Instant) {
        self.all = Some(now + RETURN);
    }

    /// Holds the routes of the tenant of `agent`, unless that agent does so too often. Returns whether it does.
    pub(super) fn hold_for(&mut self, agent: &Identity, now: Instant) -> bool {
        self.tenants.retain(|_, until| *until > now);
        self.agents.retain(|_, starts| {
            starts.retain(|start| now - *start < WINDOW);
            !starts.is_empty()
        });
        let starts = self.agents.entry(agent.uri()).or_default();
        if starts.len() >= MOST {
            return false;
        }
        starts.push(now);
        self.tenants
            .insert(agent.trust_domain.clone(), now + RETURN);
        true
    }

    /// Returns the end of the hold of `tenant`, while there is one.
    pub(super) fn of(&self, tenant: &TrustDomain, now: Instant) -> Option<Instant> {
        let own = self.tenants.get(tenant).copied();
        self.all.max(own).filter(|until| *until > now)
    }

    /// Returns the last end of all holds, while there is one.
    pub(super) fn last(&self, now: Instant) -> Option<Instant> {
        let tenants = self.tenants.values().copied().max();
        self.all.max(tenants).filter(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use cpc_identity::Role;

    use super::*;

    fn agent(domain: &str, name: &str) -> Identity {
        Identity::new(domain.parse().unwrap(), Role::Agent, name).unwrap()
    }

    fn domain(name: &str) -> TrustDomain {
        name.parse().unwrap()
    }

    #[test]
    fn an_agent_holds_the_routes_of_its_tenant() {
        let (mut holds, now) = (Holds::default(), Instant::now());
        assert_eq!(holds.last(now), None);
        assert!(holds.hold_for(&agent("one.test", "w1"), now));
        assert!(holds.of(&domain("one.test"), now).is_some());
        assert_eq!(holds.of(&domain("two.test"), now), None);
        assert_eq!(holds.last(now), Some(now + RETURN));
        assert_eq!(holds.last(now + RETURN), None);
        holds.hold_all(now);
        assert!(holds.of(&domain("two.test"), now).is_some());
    }

    /// Bounds the time for which one agent can delay refusals.
    #[test]
    fn an_agent_holds_a_few_times() {
        let (mut holds, now) = (Holds::default(), Instant::now());
        let (one, other) = (agent("one.test", "w1"), agent("one.test", "w2"));
        for _ in 0..MOST {
            assert!(holds.hold_for(&one, now));
        }
        let soon = now + RETURN;
        assert!(!holds.hold_for(&one, soon));
        assert_eq!(holds.of(&domain("one.test"), soon), None);
        assert!(holds.hold_for(&other, soon));
        assert!(holds.hold_for(&one, now + WINDOW));
    }
}
