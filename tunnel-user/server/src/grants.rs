//! Grants: a claim counts only as far as it is granted.
//!
//! Every agent may serve the node addresses in its own certificate. The server's policy grants all
//! other claims to identities by pattern. An agent's own statements grant nothing.
//!
//! The longest prefix is asked first, so a claim within a range takes that part from all agents that
//! serve the range. A range that several identities are granted is therefore served as it is granted,
//! by all of them alike; a part of it takes a grant of that part. Names follow the same rule.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::IpAddr;

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use tunnel_proto::preface::NameError;
use tunnel_proto::route::{Claim, NamePattern, canonical};
use tunnel_proto::session::Refusal;

use cpc_config::ConfigError;
use cpc_config::server::PolicyConfig;
use cpc_identity::Identity;
use cpc_identity::pattern::{MAX_PATTERN, matches};

const NOT_GRANTED: &str = "not granted: it is neither a node address in the agent's certificate nor in \
                           policy.grants of the server";

/// The server's policy.
#[derive(Debug, Default)]
pub struct Grants {
    /// Patterns of identities; grants refer to them by index.
    identities: Vec<String>,
    /// Grants of networks.
    nets: JointPrefixMap<IpNet, Vec<usize>>,
    /// Grants of names: of two patterns that cover the same, the narrower one first.
    names: Vec<(NamePattern, Vec<usize>)>,
    /// Grants of the default route, for destinations that no other agent serves.
    default_route: Vec<usize>,
}

/// An identity, with its own grants.
struct Grantee {
    uri: String,
    own: Vec<bool>,
}

impl Grants {
    /// Compiles the policy.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming an invalid pattern.
    pub fn new(config: &PolicyConfig) -> Result<Self, ConfigError> {
        let mut grants = Self::default();
        let mut names: BTreeMap<NamePattern, Vec<usize>> = BTreeMap::new();
        for (at, grant) in config.grants.iter().enumerate() {
            let wrong =
                |key, why: String| ConfigError::value(format!("policy.grants[{at}].{key}"), why);
            if !grant.identity.starts_with("spiffe://") {
                return Err(wrong(
                    "identity",
                    format!(
                        "{:?} is no identity pattern: spiffe://cluster.local/agent/w* is",
                        grant.identity
                    ),
                ));
            }
            if grant.identity.len() > MAX_PATTERN {
                let why = format!("is longer than {MAX_PATTERN} bytes, and no identity is");
                return Err(wrong("identity", why));
            }
            grants.identities.push(grant.identity.clone());
            for net in &grant.cidrs {
                grants.nets.entry(canonical(*net)).or_default().push(at);
            }
            for name in &grant.names {
                let parsed = name.parse();
                let name = parsed.map_err(|e: NameError| wrong("names", e.to_string()))?;
                names.entry(name).or_default().push(at);
            }
            if grant.default_route {
                grants.default_route.push(at);
            }
        }
        grants.names = names.into_iter().collect();
        grants.names.sort_by_key(|(pattern, _)| {
            let is_below = matches!(pattern, NamePattern::Below(_));
            (is_below, Reverse(pattern.to_string().len()))
        });
        Ok(grants)
    }

    /// Splits the offer of `identity` into granted and refused claims.
    pub fn cut(&self, identity: &Identity, offer: Vec<Claim>) -> (Vec<Claim>, Vec<Refusal>) {
        let grantee = self.grantee(identity);
        let (mut accepted, mut refused) = (Vec::new(), Vec::new());
        for claim in offer {
            let own = |addr: &IpAddr| {
                let mut addresses = identity.addresses.iter();
                addresses.any(|own| own.to_canonical() == *addr)
            };
            let judged = match &claim {
                Claim::Address(addr) if own(addr) => Ok(()),
                Claim::Address(addr) => self.judge_net(&grantee, IpNet::from(*addr)),
                Claim::Cidr(net) => self.judge_net(&grantee, *net),
                Claim::Name(name) => self.judge_name(&grantee, name),
                Claim::DefaultRoute if grantee.has(&self.default_route) => Ok(()),
                Claim::DefaultRoute => Err(NOT_GRANTED.into()),
            };
            match judged {
                Ok(()) => accepted.push(claim),
                Err(why) => refused.push(Refusal {
                    claim: claim.to_string(),
                    why,
                }),
            }
        }
        (accepted, refused)
    }

    /// Whether `identity` may serve everything that no other agent serves.
    pub fn allow_default_route(&self, identity: &Identity) -> bool {
        self.grantee(identity).has(&self.default_route)
    }

    fn grantee(&self, identity: &Identity) -> Grantee {
        let uri = identity.uri();
        let own = self.identities.iter().map(|pattern| matches(pattern, &uri));
        let own = own.collect();
        Grantee { uri, own }
    }

    fn judge_net(&self, grantee: &Grantee, claim: IpNet) -> Result<(), String> {
        let mut holding: Vec<_> = self.nets.cover(&claim).collect();
        holding.reverse();
        self.judge(grantee, claim, holding)
    }

    fn judge_name(&self, grantee: &Grantee, claim: &NamePattern) -> Result<(), String> {
        let holding = self.names.iter().filter(|(name, _)| name.covers(claim));
        let holding = holding.map(|(name, grants)| (name, grants));
        self.judge(grantee, claim, holding)
    }

    /// Judges `claim`. `holding` are the granted ranges that contain it, the narrowest first.
    fn judge<'a, R: PartialEq + Display>(
        &self,
        grantee: &Grantee,
        claim: R,
        holding: impl IntoIterator<Item = (R, &'a Vec<usize>)>,
    ) -> Result<(), String> {
        let mut others = false;
        for (range, grants) in holding {
            // A pattern stands for more than this identity.
            others |= grants.iter().any(|at| self.identities[*at] != grantee.uri);
            if !grantee.has(grants) {
                continue;
            }
            if !others || range == claim {
                return Ok(());
            }
            return Err(format!(
                "not granted: it would take a part of {range} from others to whom policy.grants of \
                 the server grants that as well. Claim {range}, or have {claim} granted"
            ));
        }
        Err(NOT_GRANTED.into())
    }
}

impl Grantee {
    fn has(&self, grants: &[usize]) -> bool {
        grants.iter().any(|at| self.own[*at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpc_config::server::GrantConfig;
    use cpc_identity::Role;

    fn agent(name: &str, addresses: &[&str]) -> Identity {
        Identity {
            trust_domain: "cluster.local".parse().unwrap(),
            role: Role::Agent,
            name: name.into(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        }
    }

    /// Grants of `(identity, cidrs, names)`.
    fn grants(of: &[(&str, &[&str], &[&str])]) -> Grants {
        let grant = |(name, cidrs, names): &(&str, &[&str], &[&str])| GrantConfig {
            identity: format!("spiffe://cluster.local/agent/{name}"),
            cidrs: cidrs.iter().map(|net| net.parse().unwrap()).collect(),
            names: names.iter().map(|name| (*name).into()).collect(),
            default_route: false,
        };
        Grants::new(&PolicyConfig {
            grants: of.iter().map(grant).collect(),
        })
        .unwrap()
    }

    fn gateway() -> Grants {
        grants(&[("gw-1", &["10.244.0.0/16"], &["*.svc"])])
    }

    /// A claim in the form that it has on the wire.
    fn claim(text: &str) -> Claim {
        let mut offer = tunnel_proto::control::Offer::default();
        let texts = match text {
            _ if text.contains('/') => &mut offer.cidrs,
            _ if text.parse::<IpAddr>().is_ok() => &mut offer.addresses,
            _ => &mut offer.names,
        };
        texts.push(text.into());
        tunnel_proto::route::from_offer(&offer).unwrap().remove(0)
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
        let (accepted, refused) = gateway().cut(&agent("w1", &["10.99.1.2"]), offer);
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
        let (accepted, refused) = gateway().cut(&agent("gw-1", &[]), offer);
        assert_eq!(accepted.len(), 2);
        assert_eq!(refused[0].claim, "10.0.0.0/8");
    }

    /// One of many who share a range takes no part of it from the others.
    #[test]
    fn a_part_of_a_shared_range_takes_a_grant_of_its_own() {
        let shared: &[(&str, &[&str], &[&str])] = &[(
            "*",
            &[
                "10.96.0.0/12",
                "10.100.0.0/16",
                "::ffff:10.200.0.0/112",
                "fd00::/32",
            ],
            &["*.svc", "*.kube-system.svc", "web.default.svc"],
        )];
        // The same without a pattern, and a part that is granted to one.
        let twice: &[(&str, &[&str], &[&str])] = &[
            ("w1", &["10.96.0.0/12"], &["*.svc"]),
            ("w2", &["10.96.0.0/12"], &["*.svc"]),
        ];
        let part: &[(&str, &[&str], &[&str])] = &[
            ("*", &["10.96.0.0/12"], &["*.svc"]),
            ("w1", &["10.96.0.0/16"], &["*.default.svc"]),
        ];
        let others: &[(&str, &[&str], &[&str])] = &[
            ("w1", &["10.96.0.0/12"], &["*.svc"]),
            ("w2", &["10.96.0.0/16"], &["dns.kube-system.svc"]),
        ];
        for (of, text, may) in [
            (shared, "10.96.0.0/12", true),
            (shared, "10.96.0.10", false),
            (shared, "10.96.0.10/32", false),
            (shared, "10.96.0.0/13", false),
            (shared, "::ffff:10.96.0.10", false),
            (shared, "::ffff:10.96.0.0/108", true),
            (shared, "::ffff:10.96.0.10/128", false),
            (shared, "10.100.0.0/16", true),
            (shared, "10.100.0.0/17", false),
            (shared, "10.200.0.0/16", true),
            (shared, "10.200.0.1", false),
            (shared, "fd00::/32", true),
            (shared, "fd00::a", false),
            (shared, "*.svc", true),
            (shared, "*.Default.SVC.", false),
            (shared, "dns.kube-system.svc", false),
            (shared, "*.kube-system.svc", true),
            (shared, "web.default.svc", true),
            (shared, "kubernetes.default.svc", false),
            (twice, "10.96.0.0/12", true),
            (twice, "10.96.0.10", false),
            (twice, "dns.kube-system.svc", false),
            // Its grant is the narrower one, so it is asked before the others anyway.
            (part, "10.96.0.10", true),
            (part, "10.97.0.10", false),
            (part, "web.default.svc", true),
            (part, "dns.kube-system.svc", false),
            // Another's narrower grant is not touched, from above or within.
            (others, "10.97.0.10", true),
            (others, "10.96.0.0/13", true),
            (others, "10.96.0.0/16", false),
            (others, "10.96.0.10", false),
            (others, "*.kube-system.svc", true),
            (others, "dns.kube-system.svc", false),
        ] {
            let (accepted, refused) = grants(of).cut(&agent("w1", &[]), vec![claim(text)]);
            assert_eq!(!accepted.is_empty(), may, "{text} of {of:?}: {refused:?}");
        }
    }

    #[test]
    fn a_certificates_address_needs_no_grant() {
        let shared = grants(&[("*", &["10.99.0.0/16"], &[])]);
        let offer = || vec![claim("::ffff:10.99.1.2")];
        assert!(
            shared
                .cut(&agent("w1", &["10.99.1.2"]), offer())
                .1
                .is_empty()
        );
        let (_, refused) = shared.cut(&agent("w2", &["10.99.1.3"]), offer());
        assert!(
            refused[0].why.contains("a part of 10.99.0.0/16"),
            "{refused:?}"
        );
    }

    #[test]
    fn a_pattern_is_bounded() {
        let grant = |length| GrantConfig {
            identity: format!("spiffe://{}", "*".repeat(length)),
            ..GrantConfig::default()
        };
        let policy = |length| PolicyConfig {
            grants: vec![grant(length)],
        };
        assert!(Grants::new(&policy(1015)).is_ok());
        let error = Grants::new(&policy(1016)).unwrap_err().to_string();
        assert!(error.contains("policy.grants[0].identity"), "{error}");
    }
}
