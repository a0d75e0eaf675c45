//! Routing: the look-up of an address, which every connection does, and the publication of the routes,
//! which every change of an agent does.

// A benchmark that can't be set up should stop.
#![allow(clippy::expect_used, missing_docs)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpc_config::TunnelKind;
use cpc_config::server::{GrantConfig, PolicyConfig, RoutingConfig};
use cpc_identity::{Identity, Role};
use cpc_server::grants::Grants;
use cpc_server::registry::Registry;
use cpc_server::routes::{LinkId, LinkInfo, Trust};
use cpc_transport::tunnel::{Path, Probe};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use ipnet::IpNet;
use tunnel_proto::preface::Host;
use tunnel_proto::route::Claim;
use tunnel_proto::session::InstanceId;

/// Number of routes that one agent offers.
const OFFER: u32 = 1000;

/// Returns the network of route `number`.
fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + (number << 6))
}

/// Returns the networks of each agent, by its number.
fn offers(routes: u32) -> impl Iterator<Item = (u64, impl Iterator<Item = IpNet>)> {
    (0..routes).step_by(OFFER as usize).map(move |first| {
        let networks = (first..routes.min(first + OFFER)).map(|number| {
            let network = format!("{}/26", address(number));
            network.parse().expect("a network")
        });
        (u64::from(first) + 1, networks)
    })
}

/// Creates a registry with so many routes.
fn registry(routes: u32) -> Registry {
    let policy = PolicyConfig {
        grants: offers(routes)
            .map(|(id, networks)| GrantConfig {
                identity: format!("spiffe://cluster.local/agent/w{id}"),
                cidrs: networks.collect(),
                names: Vec::new(),
                default_route: false,
            })
            .collect(),
    };
    let grants = Grants::new(&policy).expect("grants");
    let strategies = RoutingConfig::default().strategies;
    let mut registry = Registry::new(grants, &strategies, Duration::from_secs(60));
    for (id, networks) in offers(routes) {
        registry.connect(
            link(id),
            InstanceId([1; 16]),
            networks.map(Claim::Cidr).collect(),
            Instant::now(),
        );
    }
    registry
}

fn link(id: u64) -> Arc<LinkInfo> {
    let identity = Identity {
        trust_domain: "cluster.local".parse().expect("a name"),
        role: Role::Agent,
        name: format!("w{id}").into(),
        addresses: vec![IpAddr::from([192, 0, 2, 1])],
    };
    let probe = Probe::new(|| Path {
        remote: ([127, 0, 0, 1], 1).into(),
        rtt: Duration::ZERO,
        mtu: None,
        since_packet: Duration::ZERO,
        since_data: Duration::ZERO,
    });
    LinkInfo::new(
        (LinkId(id), 0),
        TunnelKind::Quic,
        (identity, Trust::Granted),
        probe,
    )
}

fn routing(criterion: &mut Criterion) {
    let tenant = "cluster.local".parse().expect("a name");
    let mut group = criterion.benchmark_group("routing");
    group.sample_size(20);
    for count in [10, 1000, 10_000, 100_000] {
        let registry = registry(count);
        let routes = registry.routes();
        let host: Host = address(count / 2).to_string().parse().expect("a host");
        assert!(
            routes.candidates(&tenant, &host).is_ok(),
            "nobody serves it"
        );
        group.bench_function(BenchmarkId::new("look up", count), |bencher| {
            bencher.iter(|| routes.candidates(black_box(&tenant), black_box(&host)));
        });
        group.bench_function(BenchmarkId::new("publish", count), |bencher| {
            bencher.iter(|| registry.routes());
        });
    }
    group.finish();
}

criterion_group!(benches, routing);
criterion_main!(benches);
