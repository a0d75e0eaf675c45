//! The policy of an agent: its allow-list, without implicit entries.

use std::net::IpAddr;

use ipnet::IpNet;

use cpc_config::allow_list::AllowList;
use cpc_config::{AllowRule, PortRange, Rule};

/// Port of the kubelet, which an agent may dial on its own node by default.
const KUBELET: u16 = 10250;

/// Returns an agent's allow-list, from configured rules; without any, the node's own addresses at the
/// kubelet's port.
pub(super) fn policy(allow: Option<Vec<AllowRule>>, node_addresses: &[IpAddr]) -> AllowList {
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
