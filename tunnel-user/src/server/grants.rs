//! Who may serve what: a claim counts only as far as it is granted.
//!
//! Every agent may serve the node addresses in its own certificate. Everything else is granted by
//! the server's policy to identities by pattern. What an agent says of itself grants nothing.

use std::net::IpAddr;

use ipnet::IpNet;
use tunnel_proto::route::{Claim, NamePattern};
use tunnel_proto::session::Refusal;

use crate::config::ConfigError;
use crate::config::server::PolicyConfig;
use crate::tls::Identity;
use crate::tls::identity::matches;

/// The server's policy.
#[derive(Debug, Default)]
pub struct Grants(Vec<Grant>);

#[derive(Debug)]
struct Grant {
    identity: String,
    cidrs: Vec<IpNet>,
    names: Vec<NamePattern>,
    default_route: bool,
}

impl Grants {
    /// Reads the policy.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming a pattern that can't be right.
    pub fn new(config: &PolicyConfig) -> Result<Self, ConfigError> {
        let read = |grant: &crate::config::server::GrantConfig| {
            if !grant.identity.starts_with("spiffe://") {
                return Err(ConfigError::Value {
                    key: "policy.grants.identity",
                    why: format!(
                        "{:?} is no identity pattern: spiffe://cluster.local/agent/w* is",
                        grant.identity
                    ),
                });
            }
            let names = grant.names.iter().map(|name| name.parse());
            let names = names
                .collect::<Result<_, _>>()
                .map_err(|e| ConfigError::Value {
                    key: "policy.grants.names",
                    why: tunnel_proto::preface::NameError::to_string(&e),
                })?;
            Ok(Grant {
                identity: grant.identity.clone(),
                cidrs: grant.cidrs.iter().map(IpNet::trunc).collect(),
                names,
                default_route: grant.default_route,
            })
        };
        Ok(Self(
            config.grants.iter().map(read).collect::<Result<_, _>>()?,
        ))
    }

    /// Splits what `identity` offers into what it may serve and what it may not.
    pub fn cut(&self, identity: &Identity, offer: Vec<Claim>) -> (Vec<Claim>, Vec<Refusal>) {
        let grants: Vec<_> = self.to(identity).collect();
        let (mut accepted, mut refused) = (Vec::new(), Vec::new());
        for claim in offer {
            let granted = match &claim {
                Claim::Address(addr) => {
                    identity
                        .addresses
                        .iter()
                        .any(|own| own.to_canonical() == *addr)
                        || grants.iter().any(|g| g.covers_address(*addr))
                }
                Claim::Cidr(net) => grants.iter().any(|g| g.covers_net(net)),
                Claim::Name(name) => grants
                    .iter()
                    .any(|g| g.names.iter().any(|granted| granted.covers(name))),
                Claim::DefaultRoute => grants.iter().any(|g| g.default_route),
            };
            if granted {
                accepted.push(claim);
            } else {
                let why = "not granted: it is neither a node address in the agent's certificate \
                           nor in policy.grants of the server";
                refused.push(Refusal {
                    claim: claim.to_string(),
                    why: why.into(),
                });
            }
        }
        (accepted, refused)
    }

    /// Whether `identity` may serve everything that nobody else serves.
    pub fn allow_default_route(&self, identity: &Identity) -> bool {
        self.to(identity).any(|grant| grant.default_route)
    }

    fn to(&self, identity: &Identity) -> impl Iterator<Item = &Grant> {
        let uri = identity.uri();
        self.0
            .iter()
            .filter(move |grant| matches(&grant.identity, &uri))
    }
}

impl Grant {
    fn covers_address(&self, addr: IpAddr) -> bool {
        self.cidrs.iter().any(|granted| granted.contains(&addr))
    }

    fn covers_net(&self, net: &IpNet) -> bool {
        self.cidrs.iter().any(|granted| granted.contains(net))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::server::GrantConfig;
    use crate::tls::Role;

    fn agent(name: &str, addresses: &[&str]) -> Identity {
        Identity {
            trust_domain: "cluster.local".parse().unwrap(),
            role: Role::Agent,
            name: name.into(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        }
    }

    fn grants() -> Grants {
        let grant = GrantConfig {
            identity: "spiffe://cluster.local/agent/gw-*".into(),
            cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            names: vec!["*.svc".into()],
            default_route: false,
        };
        Grants::new(&PolicyConfig {
            grants: vec![grant],
        })
        .unwrap()
    }

    #[test]
    fn a_stolen_worker_serves_its_own_address_only() {
        let offer = vec![
            Claim::Address("10.99.1.2".parse().unwrap()),
            Claim::Address("10.99.2.2".parse().unwrap()),
            Claim::Cidr("0.0.0.0/0".parse().unwrap()),
            Claim::Cidr("10.244.1.0/24".parse().unwrap()),
            Claim::DefaultRoute,
        ];
        let (accepted, refused) = grants().cut(&agent("w1", &["10.99.1.2"]), offer);
        assert_eq!(accepted, [Claim::Address("10.99.1.2".parse().unwrap())]);
        assert_eq!(refused.len(), 4);
    }

    #[test]
    fn a_grant_covers_what_lies_within() {
        let offer = vec![
            Claim::Cidr("10.244.1.0/24".parse().unwrap()),
            Claim::Cidr("10.0.0.0/8".parse().unwrap()),
            Claim::Name("*.default.svc".parse().unwrap()),
        ];
        let (accepted, refused) = grants().cut(&agent("gw-1", &[]), offer);
        assert_eq!(accepted.len(), 2);
        assert_eq!(refused[0].claim, "10.0.0.0/8");
    }

    #[test]
    fn patterns() {
        for (pattern, text, fits) in [
            ("spiffe://a/agent/w1", "spiffe://a/agent/w1", true),
            ("spiffe://a/agent/*", "spiffe://a/agent/w1", true),
            ("spiffe://a/agent/w*-x", "spiffe://a/agent/w-1-x", true),
            ("spiffe://*/agent/w1", "spiffe://a/agent/w1", true),
            ("spiffe://a/*", "spiffe://a/agent/w1", false),
            ("spiffe://a/agent/w*", "spiffe://a/agent/x1", false),
        ] {
            assert_eq!(matches(pattern, text), fits, "{pattern} {text}");
        }
    }
}
