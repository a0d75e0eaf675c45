//! The policy of an agent: its allow-list, without implicit entries.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use ipnet::IpNet;

use super::agent_identity::AgentIdentity;
use cpc_config::allow_list::AllowList;
use cpc_config::{AllowRule, PortRange, Rule};

/// Port of the kubelet, which an agent may dial on its own node by default.
const KUBELET: u16 = 10250;

/// The policy in force, and what it follows from. Clones share it.
#[derive(Clone)]
pub(super) struct Policy {
    /// Configured rules.
    allow: Arc<Mutex<Option<Vec<AllowRule>>>>,
    identity: AgentIdentity,
    in_force: Arc<ArcSwap<AllowList>>,
}

impl Policy {
    /// Puts the configured rules in force.
    pub(super) fn new(allow: Option<Vec<AllowRule>>, identity: AgentIdentity) -> Self {
        let list = policy(allow.clone(), &identity.addresses());
        Self {
            allow: Arc::new(Mutex::new(allow)),
            identity,
            in_force: Arc::new(ArcSwap::from_pointee(list)),
        }
    }

    /// Returns the allow-list in force.
    pub(super) fn in_force(&self) -> &Arc<ArcSwap<AllowList>> {
        &self.in_force
    }

    /// Puts other rules in force.
    pub(super) fn configure(&self, allow: Option<Vec<AllowRule>>) {
        *self.allow.lock().unwrap_or_else(PoisonError::into_inner) = allow;
        self.refresh();
    }

    /// Puts the node addresses in our present certificate in force.
    pub(super) fn refresh(&self) {
        let allow = self.allow.lock();
        let allow = allow.unwrap_or_else(PoisonError::into_inner).clone();
        let list = policy(allow, &self.identity.addresses());
        self.in_force.store(Arc::new(list));
    }
}

/// Returns an agent's allow-list, from configured rules; without any, the node's own addresses at the
/// kubelet's port.
fn policy(allow: Option<Vec<AllowRule>>, node_addresses: &[IpAddr]) -> AllowList {
    let own = || {
        let rule = |addr: &IpAddr| {
            AllowRule::Addresses(Rule {
                cidr: IpNet::from(*addr),
                ports: vec![PortRange::one(KUBELET)],
            })
        };
        node_addresses.iter().map(rule).collect()
    };
    AllowList::new(allow.unwrap_or_else(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_default_only_the_own_kubelet() {
        let policy = policy(None, &["10.99.1.2".parse().unwrap()]);
        let allows = |addr: &str, port| policy.allows_address(addr.parse().unwrap(), port);
        assert!(allows("10.99.1.2", 10250));
        assert!(!allows("10.99.1.2", 22));
        assert!(!allows("10.99.2.2", 10250));
    }

    #[test]
    fn an_empty_list_is_nothing_at_all() {
        let node = "10.99.1.2".parse().unwrap();
        assert!(!policy(Some(Vec::new()), &[node]).allows_address(node, 10250));
    }
}
