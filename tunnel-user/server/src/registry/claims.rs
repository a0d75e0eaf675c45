//! The normal form of a claim.

use ipnet::IpNet;
use tunnel_proto::route::Claim;

use crate::routes::{DEFAULT_ROUTES, Entry, LinkInfo, Routes};
use cpc_identity::TrustDomain;

/// A claim within its tenant.
pub(super) type Key = (TrustDomain, Claim);

/// Whether a node address stands in an agent's certificate.
pub(super) fn certified(info: &LinkInfo, claim: &Claim) -> bool {
    let own = |addr| {
        let mut addresses = info.identity.addresses.iter();
        addresses.any(|own| own.to_canonical() == addr)
    };
    matches!(claim, Claim::Address(addr) if own(*addr))
}

/// Returns the normal form of a claim: a network of one address is that address, and has one owner like
/// it.
pub(super) fn alone(claim: Claim) -> Claim {
    match claim {
        Claim::Cidr(net) if net.prefix_len() == net.max_prefix_len() => Claim::Address(net.addr()),
        claim => claim,
    }
}

/// Returns the node addresses among `claims`.
pub(super) fn addresses<'a>(
    info: &'a LinkInfo,
    claims: &'a [Claim],
) -> impl Iterator<Item = Key> + use<'a> {
    let addresses = claims.iter().filter(|c| matches!(c, Claim::Address(_)));
    addresses.map(|claim| key(info, claim))
}

pub(super) fn key(info: &LinkInfo, claim: &Claim) -> Key {
    (info.identity.trust_domain.clone(), claim.clone())
}

pub(super) fn for_entries(
    routes: &mut Routes,
    tenant: &TrustDomain,
    claim: &Claim,
    mut change: impl FnMut(&mut Entry),
) {
    let routes = routes.tenants.entry(tenant.clone()).or_default();
    match claim {
        Claim::Address(addr) => change(routes.prefixes.entry(IpNet::from(*addr)).or_default()),
        Claim::Cidr(net) => change(routes.prefixes.entry(net.trunc()).or_default()),
        Claim::Name(name) => change(routes.names.entry(name.clone()).or_default()),
        Claim::DefaultRoute => {
            for net in DEFAULT_ROUTES {
                change(routes.prefixes.entry(net).or_default());
            }
        }
    }
}
