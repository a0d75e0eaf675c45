//! What a claim stands for.

use ipnet::IpNet;
use tunnel_proto::route::Claim;

use crate::server::routes::{DEFAULT_ROUTES, Entry, LinkInfo, Routes};
use crate::tls::TrustDomain;

/// Whether a node address stands in an agent's certificate.
pub(super) fn certified(info: &LinkInfo, claim: &Claim) -> bool {
    let own = |addr| {
        let mut addresses = info.identity.addresses.iter();
        addresses.any(|own| own.to_canonical() == addr)
    };
    matches!(claim, Claim::Address(addr) if own(*addr))
}

pub(super) fn key(info: &LinkInfo, claim: &Claim) -> super::Key {
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
