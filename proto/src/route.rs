//! Claims of an agent: the typed form of the wire's [`Offer`].
//!
//! Claims have one form each (IPv4-mapped addresses become IPv4, networks lose their host bits,
//! names are lower case), so that equal claims compare equal. Whether a claim is granted is the
//! server's policy; which claim wins is its router's business.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};
use thiserror::Error;

use crate::control::Offer;
use crate::preface::{Name, NameError};

/// The most claims in one offer.
pub const MAX_CLAIMS: usize = 1024;

/// The longest claim, in bytes of its text.
pub const MAX_CLAIM_LEN: usize = 253;

/// One claim of an agent. `Display` writes the text of the wire.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Claim {
    /// A single address.
    Address(IpAddr),
    /// A network.
    Cidr(IpNet),
    /// A DNS name, or all names below one.
    Name(NamePattern),
    /// Every destination that no other agent serves.
    DefaultRoute,
}

/// A DNS name (`webhook.default.svc`), or all names below one (`*.svc.cluster.local`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum NamePattern {
    /// This name alone.
    Exact(Name),
    /// Every name that ends in a dot and this one, with one label or more in front.
    Below(Name),
}

/// An offer that can't be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ClaimError {
    /// The offer has too many entries.
    #[error("an offer of {0} claims is over the limit of {MAX_CLAIMS}; claim larger networks")]
    TooMany(usize),
    /// An entry is too long.
    #[error("a claim of {0} bytes is over the limit of {MAX_CLAIM_LEN}")]
    TooLong(usize),
    /// An entry among the addresses is none.
    #[error("{0:?} is not an IP address")]
    BadAddress(String),
    /// An entry among the networks is none.
    #[error("{0:?} is not a network: write address/prefix, such as 10.244.1.0/24")]
    BadCidr(String),
    /// An entry among the names is none.
    #[error(transparent)]
    BadName(#[from] NameError),
}

impl NamePattern {
    /// Whether the pattern matches `name`.
    #[must_use]
    pub fn matches(&self, name: &Name) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Below(parent) => is_below(name, parent),
        }
    }

    /// Whether the pattern matches every name that `other` matches.
    #[must_use]
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (_, Self::Exact(name)) => self.matches(name),
            (Self::Exact(_), Self::Below(_)) => false,
            (Self::Below(outer), Self::Below(inner)) => outer == inner || is_below(inner, outer),
        }
    }
}

fn is_below(name: &Name, parent: &Name) -> bool {
    name.as_str()
        .strip_suffix(parent.as_str())
        .is_some_and(|labels| labels.ends_with('.'))
}

impl FromStr for NamePattern {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        match text.strip_prefix("*.") {
            Some(parent) => parent.parse().map(Self::Below),
            None => text.parse().map(Self::Exact),
        }
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => name.fmt(f),
            Self::Below(parent) => write!(f, "*.{parent}"),
        }
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Cidr(network) => network.fmt(f),
            Self::Name(pattern) => pattern.fmt(f),
            Self::DefaultRoute => f.write_str("default route"),
        }
    }
}

/// Reads an offer: addresses, then networks, then names, then the default route.
///
/// # Errors
/// [`ClaimError`], which names the bad entry.
pub fn from_offer(offer: &Offer) -> Result<Vec<Claim>, ClaimError> {
    let Offer {
        addresses,
        cidrs,
        names,
        default_route,
    } = offer;
    let count = addresses.len() + cidrs.len() + names.len() + usize::from(*default_route);
    if count > MAX_CLAIMS {
        return Err(ClaimError::TooMany(count));
    }
    let mut texts = addresses.iter().chain(cidrs).chain(names);
    if let Some(text) = texts.find(|text| text.len() > MAX_CLAIM_LEN) {
        return Err(ClaimError::TooLong(text.len()));
    }
    let addresses = addresses.iter().map(|text| address(text));
    let cidrs = cidrs.iter().map(|text| cidr(text));
    let names = names.iter().map(|text| Ok(Claim::Name(text.parse()?)));
    let default_route = default_route.then_some(Ok(Claim::DefaultRoute));
    addresses
        .chain(cidrs)
        .chain(names)
        .chain(default_route)
        .collect()
}

/// Returns the offer of these claims, in the order of [`from_offer`].
#[must_use]
pub fn to_offer<'a>(claims: impl IntoIterator<Item = &'a Claim>) -> Offer {
    let mut offer = Offer::default();
    for claim in claims {
        match claim {
            Claim::Address(address) => offer.addresses.push(address.to_canonical().to_string()),
            Claim::Cidr(network) => offer.cidrs.push(canonical(*network).to_string()),
            Claim::Name(pattern) => offer.names.push(pattern.to_string()),
            Claim::DefaultRoute => offer.default_route = true,
        }
    }
    offer
}

fn address(text: &str) -> Result<Claim, ClaimError> {
    let address: IpAddr = text
        .parse()
        .map_err(|_| ClaimError::BadAddress(text.to_owned()))?;
    Ok(Claim::Address(address.to_canonical()))
}

fn cidr(text: &str) -> Result<Claim, ClaimError> {
    let network = text
        .parse()
        .map_err(|_| ClaimError::BadCidr(text.to_owned()))?;
    Ok(Claim::Cidr(canonical(network)))
}

/// Returns the network without host bits, and in IPv4 where it lies within ::ffff:0:0/96.
#[must_use]
pub fn canonical(network: IpNet) -> IpNet {
    let network = network.trunc();
    let IpNet::V6(v6) = network else {
        return network;
    };
    let mapped = v6
        .prefix_len()
        .checked_sub(96)
        .zip(v6.addr().to_ipv4_mapped());
    match mapped.and_then(|(prefix, address)| Ipv4Net::new(address, prefix).ok()) {
        Some(v4) => IpNet::V4(v4),
        None => network,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::preface::tests::{any_address, any_name};

    fn any_claim() -> impl Strategy<Value = Claim> {
        let network = (any_address(), 0..=128_u8).prop_map(|(address, prefix)| {
            let longest = if address.is_ipv4() { 32 } else { 128 };
            canonical(IpNet::new(address, prefix % (longest + 1)).unwrap())
        });
        prop_oneof![
            any_address().prop_map(Claim::Address),
            network.prop_map(Claim::Cidr),
            any_name().prop_map(|name| Claim::Name(NamePattern::Exact(name))),
            any_name().prop_map(|name| Claim::Name(NamePattern::Below(name))),
            Just(Claim::DefaultRoute),
        ]
    }

    fn offer(addresses: &[&str], cidrs: &[&str], names: &[&str]) -> Offer {
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        Offer {
            addresses: owned(addresses),
            cidrs: owned(cidrs),
            names: owned(names),
            default_route: false,
        }
    }

    fn pattern(text: &str) -> NamePattern {
        text.parse().unwrap()
    }

    #[test]
    fn claims_have_one_form() {
        let offer = offer(
            &["::ffff:10.0.0.1", "FD00::0001"],
            &[
                "10.1.2.3/16",
                "::ffff:10.1.2.3/112",
                "fd00::1/64",
                "::ffff:0:0/95",
            ],
            &["Web.SVC.", "*.Svc.Cluster.Local"],
        );
        let claims = from_offer(&offer).unwrap();
        let texts: Vec<_> = claims.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "10.0.0.1",
                "fd00::1",
                "10.1.0.0/16",
                "10.1.0.0/16",
                "fd00::/64",
                "::fffe:0:0/95",
                "web.svc",
                "*.svc.cluster.local"
            ]
        );
    }

    #[test]
    fn errors_name_the_entry() {
        let error = |offer: &Offer| from_offer(offer).unwrap_err();
        let bad = "10.0.0.256".to_owned();
        assert_eq!(
            error(&offer(&[&bad], &[], &[])),
            ClaimError::BadAddress(bad)
        );
        let bad = "10.0.0.0/33".to_owned();
        assert_eq!(error(&offer(&[], &[&bad], &[])), ClaimError::BadCidr(bad));
        let bad = "10.0.0.1".to_owned();
        assert_eq!(error(&offer(&[], &[&bad], &[])), ClaimError::BadCidr(bad));
        for bad in ["*", "*.", "a.*.b", "*.*.b", "10.0.0.1"] {
            let error = error(&offer(&[], &[], &[bad]));
            assert!(matches!(error, ClaimError::BadName(_)), "{bad}: {error}");
        }
    }

    #[test]
    fn offers_are_bounded() {
        let longest = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(61));
        assert!(from_offer(&offer(&[], &[], &[&longest])).is_ok());
        let error = from_offer(&offer(&[], &[], &[&format!("*.{longest}")]));
        assert_eq!(error, Err(ClaimError::TooLong(255)));

        let mut max = offer(&["10.0.0.1"; 512], &["10.0.0.0/8"; 512], &[]);
        assert_eq!(from_offer(&max).unwrap().len(), MAX_CLAIMS);
        max.default_route = true;
        assert_eq!(from_offer(&max), Err(ClaimError::TooMany(1025)));
    }

    #[test]
    fn patterns_match_whole_labels() {
        let name = |text: &str| text.parse::<Name>().unwrap();
        let below = pattern("*.svc.local");
        assert!(below.matches(&name("a.svc.local")));
        assert!(below.matches(&name("a.b.svc.local")));
        assert!(!below.matches(&name("svc.local")));
        assert!(!below.matches(&name("asvc.local")));
        assert!(pattern("svc.local").matches(&name("svc.local")));
        assert!(!pattern("svc.local").matches(&name("a.svc.local")));
    }

    #[test]
    fn patterns_cover_narrower_ones() {
        for (outer, inner, covers) in [
            ("a.b", "a.b", true),
            ("a.b", "*.a.b", false),
            ("*.b", "a.b", true),
            ("*.b", "b", false),
            ("*.b", "*.b", true),
            ("*.b", "*.a.b", true),
            ("*.a.b", "*.b", false),
            ("*.b", "*.ab", false),
        ] {
            assert_eq!(
                pattern(outer).covers(&pattern(inner)),
                covers,
                "{outer} {inner}"
            );
        }
    }

    proptest! {
        #[test]
        fn round_trip(claims in prop::collection::vec(any_claim(), 0..20)) {
            let offer = to_offer(&claims);
            let read = from_offer(&offer).unwrap();
            prop_assert_eq!(to_offer(&read), offer);
            for claim in &claims {
                prop_assert!(read.contains(claim), "{} was lost", claim);
            }
        }

        #[test]
        fn any_text(address: String, cidr: String, name: String) {
            for offer in [
                offer(&[&address], &[], &[]),
                offer(&[], &[&cidr], &[]),
                offer(&[], &[], &[&name]),
            ] {
                if let Ok(claims) = from_offer(&offer) {
                    prop_assert_eq!(from_offer(&to_offer(&claims)), Ok(claims));
                }
            }
        }

        #[test]
        fn covering_is_matching_more(outer in any_name(), inner in any_name(), name in any_name()) {
            let name: Name = format!("{name}.{inner}.{outer}").parse().unwrap();
            let inner = NamePattern::Below(format!("{inner}.{outer}").parse().unwrap());
            let outer = NamePattern::Below(outer);
            prop_assert!(outer.covers(&inner) && inner.matches(&name) && outer.matches(&name));
        }
    }
}
