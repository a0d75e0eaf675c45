//! What an agent may dial: an allow-list, and nothing that was not named.
//!
//! Loopback, link-local, multicast, unspecified and cloud metadata addresses are allowed only by a
//! rule that lies within such a range, never by a wide one: `0.0.0.0/0` does not open
//! 169.254.169.254.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::config::{PortRange, Rule};

/// The kubelet's port, where its own node's agent may dial by default.
const KUBELET: u16 = 10250;

/// Ranges that only a rule within them opens.
const GUARDED: [&str; 13] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    // Metadata services that are not link-local.
    "100.100.100.200/32",
    "168.63.129.16/32",
    "fd00:ec2::254/128",
    "224.0.0.0/4",
    "255.255.255.255/32",
    "::/128",
    "::1/128",
    "fe80::/10",
    "ff00::/8",
    "::ffff:0:0/96",
];

/// Rules that allow everything, what is guarded too.
pub fn everything() -> Vec<Rule> {
    let rule = |net: &&str| {
        let cidr = net.parse().ok()?;
        let ports = Vec::new();
        Some(Rule { cidr, ports })
    };
    let all = ["0.0.0.0/0", "::/0"];
    all.iter().chain(&GUARDED).filter_map(rule).collect()
}

/// An agent's allow-list.
#[derive(Clone, Debug)]
pub struct Policy {
    rules: Vec<Rule>,
    guarded: Vec<IpNet>,
}

impl Policy {
    /// From configured rules; without any, the node's own addresses at the kubelet's port.
    pub fn new(allow: Option<Vec<Rule>>, node_addresses: &[IpAddr]) -> Self {
        let own = || {
            let rule = |addr: &IpAddr| Rule {
                cidr: IpNet::from(*addr),
                ports: vec![PortRange::one(KUBELET)],
            };
            node_addresses.iter().map(rule).collect()
        };
        let guarded = GUARDED.iter().filter_map(|net| net.parse().ok()).collect();
        Self {
            rules: allow.unwrap_or_else(own),
            guarded,
        }
    }

    /// Whether `addr` and `port` may be dialled.
    pub fn allows(&self, addr: IpAddr, port: u16) -> bool {
        let guard = self.guarded.iter().find(|net| net.contains(&addr));
        self.rules.iter().any(|rule| {
            rule.covers(addr, port) && guard.is_none_or(|guard| guard.contains(&rule.cidr))
        })
    }

    /// The rules, for people.
    pub fn rules(&self) -> impl Iterator<Item = String> {
        self.rules.iter().map(ToString::to_string)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[&str]) -> Policy {
        Policy::new(
            Some(rules.iter().map(|r| r.parse().unwrap()).collect()),
            &[],
        )
    }

    fn allows(policy: &Policy, addr: &str, port: u16) -> bool {
        policy.allows(addr.parse().unwrap(), port)
    }

    #[test]
    fn every_guarded_range_can_be_read() {
        assert_eq!(policy(&[]).guarded.len(), GUARDED.len());
    }

    #[test]
    fn by_default_only_the_own_kubelet() {
        let policy = Policy::new(None, &["10.99.1.2".parse().unwrap()]);
        assert!(allows(&policy, "10.99.1.2", 10250));
        assert!(!allows(&policy, "10.99.1.2", 22));
        assert!(!allows(&policy, "10.99.2.2", 10250));
    }

    #[test]
    fn a_wide_rule_does_not_open_what_is_guarded() {
        let wide = policy(&["0.0.0.0/0", "::/0"]);
        assert!(allows(&wide, "10.1.2.3", 80));
        for addr in [
            "127.0.0.1",
            "169.254.169.254",
            "::1",
            "fe80::1",
            "0.0.0.0",
            "fd00:ec2::254",
            "224.0.0.1",
        ] {
            assert!(!allows(&wide, addr, 80), "{addr}");
        }
        assert!(allows(&policy(&["127.0.0.1:80"]), "127.0.0.1", 80));
        let all = Policy::new(Some(everything()), &[]);
        for net in GUARDED {
            let net: IpNet = net.parse().unwrap();
            assert!(
                all.allows(net.network(), 80) && all.allows(net.broadcast(), 80),
                "{net}"
            );
        }
        assert!(allows(&all, "10.1.2.3", 80) && allows(&all, "2001:db8::1", 80));
    }
}
