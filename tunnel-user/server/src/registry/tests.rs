use super::*;
use crate::routes::RouteError;
use cpc_config::TunnelKind;
use cpc_config::server::{GrantConfig, PolicyConfig, RoutingConfig};
use cpc_identity::{Identity, Role};
use cpc_transport::tunnel::{Path, Probe};
use futures_util::FutureExt;
use ipnet::IpNet;
use std::sync::atomic::Ordering;
use tunnel_proto::preface::Host;

const FORGET: Duration = Duration::from_secs(60);

fn registry() -> Registry {
    registry_with(&RoutingConfig::default().strategies)
}

fn registry_with(strategies: &[Strategy]) -> Registry {
    let nets = [
        "10.0.0.0/8",
        "10.1.0.0/16",
        "10.99.1.2/32",
        "10.244.0.0/16",
        "10.244.1.0/24",
    ];
    let grant = GrantConfig {
        identity: "spiffe://*/agent/gw*".into(),
        cidrs: nets.map(|net| net.parse().unwrap()).into(),
        names: vec!["*.svc".into()],
        default_route: true,
    };
    let grants = Grants::new(&PolicyConfig {
        grants: vec![grant],
    })
    .unwrap();
    Registry::new(grants, strategies, FORGET)
}

/// Returns a link of the agent called `name`.
pub(crate) fn link(id: u64, name: &str, address: &str) -> Arc<LinkInfo> {
    link_of(id, name, address, TunnelKind::Quic, Trust::Granted)
}

/// An agent of Konnectivity that is believed.
fn believed(id: u64) -> Arc<LinkInfo> {
    let name = format!("k{id}");
    link_of(
        id,
        &name,
        "192.0.2.1",
        TunnelKind::Konnectivity,
        Trust::Believed,
    )
}

fn link_of(id: u64, name: &str, address: &str, kind: TunnelKind, trust: Trust) -> Arc<LinkInfo> {
    link_over(id, name, address, (kind, trust), Duration::ZERO)
}

fn unheard_link(id: u64, name: &str, address: &str, unheard: Duration) -> Arc<LinkInfo> {
    link_over(
        id,
        name,
        address,
        (TunnelKind::Quic, Trust::Granted),
        unheard,
    )
}

fn link_over(
    id: u64,
    name: &str,
    address: &str,
    (kind, trust): (TunnelKind, Trust),
    unheard: Duration,
) -> Arc<LinkInfo> {
    let identity = Identity {
        trust_domain: "a".parse().unwrap(),
        role: Role::Agent,
        name: name.into(),
        addresses: vec![address.parse().unwrap()],
    };
    let path = Path {
        remote: "127.0.0.1:1".parse().unwrap(),
        rtt: Duration::ZERO,
        mtu: None,
        since_packet: unheard,
        since_data: unheard,
    };
    let probe = Probe::new(move || path);
    LinkInfo::new((LinkId(id), 0), kind, (identity, trust), probe)
}

fn claim(addr: &str) -> Vec<Claim> {
    vec![Claim::Address(addr.parse().unwrap())]
}

fn ask(registry: &Registry, tenant: &str, host: &str) -> Result<Vec<u64>, RouteError> {
    let host: Host = host.parse().unwrap();
    let found = registry
        .routes()
        .candidates(&tenant.parse().unwrap(), &host)?;
    Ok(found.iter().map(|l| l.id.0).collect())
}

#[test]
fn the_newest_process_takes_new_dials() {
    let mut registry = registry();
    let (old, new) = (link(1, "w1", "10.99.1.2"), link(2, "w1", "10.99.1.2"));
    registry.connect(old, InstanceId([1; 16]), claim("10.99.1.2"), Instant::now());
    registry.connect(
        new.clone(),
        InstanceId([2; 16]),
        claim("10.99.1.2"),
        Instant::now(),
    );
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2]));
    new.silent.store(true, Ordering::Relaxed);
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![1]));
}

/// A silent owner gives its address up to an agent that is heard, and does not get it back by being
/// heard again; of two that are heard the first keeps it.
#[test]
fn an_address_passes_on_when_its_owner_falls_silent() {
    let mut registry = registry();
    let now = Instant::now();
    let (one, two) = (link(1, "w1", "10.99.1.2"), link(2, "w9", "10.99.1.2"));
    registry.connect(one.clone(), InstanceId([1; 16]), claim("10.99.1.2"), now);
    registry.connect(two.clone(), InstanceId([2; 16]), claim("10.99.1.2"), now);
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![1]));
    one.silent.store(true, Ordering::Relaxed);
    registry.changed(LinkId(1), now);
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2]));
    one.silent.store(false, Ordering::Relaxed);
    registry.changed(LinkId(1), now);
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2]));

    // It was silent already.
    two.silent.store(true, Ordering::Relaxed);
    registry.disconnect(LinkId(1), now);
    registry.changed(LinkId(2), now);
    let three = link(3, "w1", "10.99.1.2");
    let verdict = registry.connect(three, InstanceId([3; 16]), claim("10.99.1.2"), now);
    assert_eq!(verdict.accepted, claim("10.99.1.2"));
}

/// Claiming an address has its owner asked for a life sign, unless it was heard a moment ago.
#[test]
fn a_claimed_address_has_its_owner_challenged() {
    for (unheard, challenged) in [(Duration::ZERO, false), (2 * RECENTLY, true)] {
        let mut registry = registry();
        let owner = unheard_link(1, "w1", "10.99.1.2", unheard);
        let two = link(2, "w9", "10.99.1.2");
        let now = Instant::now();
        registry.connect(owner.clone(), InstanceId([1; 16]), claim("10.99.1.2"), now);
        registry.connect(two, InstanceId([2; 16]), claim("10.99.1.2"), now);
        let is = owner.challenged.notified().now_or_never().is_some();
        assert_eq!(is, challenged, "{unheard:?}");
    }
}

/// Only an agent's own earlier process can be named its predecessor.
#[test]
fn a_predecessor_of_another_identity_is_not_believed() {
    let mut registry = registry();
    let now = Instant::now();
    let victim = link(1, "w1", "10.99.1.2");
    registry.connect(victim.clone(), InstanceId([1; 16]), claim("10.99.1.2"), now);
    let thief = link(2, "w9", "10.99.1.9");
    registry.connect(thief, InstanceId([2; 16]), claim("10.99.1.9"), now);
    registry.succeed(LinkId(2), Some(InstanceId([1; 16])));
    assert!(victim.replaced.notified().now_or_never().is_none());
    let successor = link(3, "w1", "10.99.1.2");
    registry.connect(successor, InstanceId([3; 16]), claim("10.99.1.2"), now);
    registry.succeed(LinkId(3), Some(InstanceId([1; 16])));
    assert!(victim.replaced.notified().now_or_never().is_some());
}

#[test]
fn a_node_address_has_one_owner() {
    let mut registry = registry();
    registry.connect(
        link(1, "w1", "10.99.1.2"),
        InstanceId([1; 16]),
        claim("10.99.1.2"),
        Instant::now(),
    );
    let verdict = registry.connect(
        link(2, "w9", "10.99.1.2"),
        InstanceId([2; 16]),
        claim("10.99.1.2"),
        Instant::now(),
    );
    assert!(verdict.accepted.is_empty());
    assert!(
        verdict.refused[0].why.contains("agent/w1"),
        "{:?}",
        verdict.refused
    );
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![1]));
}

#[test]
fn an_address_passes_on_when_its_owner_leaves() {
    let mut registry = registry();
    let (one, two) = (link(1, "w1", "10.99.1.2"), link(2, "w9", "10.99.1.2"));
    registry.connect(one, InstanceId([1; 16]), claim("10.99.1.2"), Instant::now());
    registry.connect(two, InstanceId([2; 16]), claim("10.99.1.2"), Instant::now());
    registry.disconnect(LinkId(1), Instant::now());
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2]));
}

#[test]
fn a_tenant_sees_its_own_agents_only() {
    let mut registry = registry();
    registry.connect(
        link(1, "w1", "10.99.1.2"),
        InstanceId([1; 16]),
        claim("10.99.1.2"),
        Instant::now(),
    );
    assert_eq!(ask(&registry, "b", "10.99.1.2"), Err(RouteError::NoRoute));
}

#[test]
fn a_departed_agent_is_remembered_then_forgotten() {
    let mut registry = registry();
    let start = Instant::now();
    registry.connect(
        link(1, "w1", "10.99.1.2"),
        InstanceId([1; 16]),
        claim("10.99.1.2"),
        Instant::now(),
    );
    registry.disconnect(LinkId(1), start);
    assert!(
        matches!(ask(&registry, "a", "10.99.1.2"), Err(RouteError::NoAgent(d)) if &*d.name == "w1")
    );
    assert!(!registry.expire(start + FORGET / 2));
    assert!(registry.expire(start + FORGET));
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Err(RouteError::NoRoute));
}

#[test]
fn a_link_that_is_held_up_is_asked_last() {
    let mut registry = registry();
    for (id, name, address) in [(1, "gw1", "10.0.0.1"), (2, "gw2", "10.0.0.2")] {
        let net = vec![Claim::Cidr("10.244.0.0/16".parse().unwrap())];
        let link = link(id, name, address);
        link.held_up.store(id == 2, Ordering::Relaxed);
        link.streams.store(i64::from(id == 1), Ordering::Relaxed);
        registry.connect(link, InstanceId([id as u8; 16]), net, Instant::now());
    }
    assert_eq!(ask(&registry, "a", "10.244.0.1"), Ok(vec![1, 2]));
}

#[test]
fn the_longest_prefix_first_then_the_least_loaded() {
    let mut registry = registry();
    let cidr = |net: &str| vec![Claim::Cidr(net.parse().unwrap())];
    let busy = link(1, "gw1", "10.0.0.1");
    busy.streams.store(5, Ordering::Relaxed);
    registry.connect(
        busy,
        InstanceId([1; 16]),
        cidr("10.244.0.0/16"),
        Instant::now(),
    );
    registry.connect(
        link(2, "gw2", "10.0.0.2"),
        InstanceId([2; 16]),
        cidr("10.244.0.0/16"),
        Instant::now(),
    );
    registry.connect(
        link(3, "gw3", "10.0.0.3"),
        InstanceId([3; 16]),
        cidr("10.244.1.0/24"),
        Instant::now(),
    );
    registry.connect(
        link(4, "gw4", "10.0.0.4"),
        InstanceId([4; 16]),
        vec![Claim::DefaultRoute],
        Instant::now(),
    );
    assert_eq!(ask(&registry, "a", "10.244.1.9"), Ok(vec![3, 2, 1, 4]));
    assert_eq!(ask(&registry, "a", "10.244.2.9"), Ok(vec![2, 1, 4]));
    assert_eq!(ask(&registry, "a", "x.svc"), Ok(vec![4]));
    let routes = registry.routes();
    assert!(routes.verdicts().all(|(_, _, served)| served));
}

#[test]
fn another_policy_takes_claims_away_and_gives_them_back() {
    let mut registry = registry();
    let net = vec![Claim::Cidr("10.244.0.0/16".parse().unwrap())];
    registry.connect(
        link(1, "gw1", "10.0.0.1"),
        InstanceId([1; 16]),
        net,
        Instant::now(),
    );
    let before = std::mem::take(&mut registry.grants);
    registry.set_grants(Grants::default(), Instant::now());
    assert!(matches!(
        ask(&registry, "a", "10.244.0.1"),
        Err(RouteError::NoAgent(_))
    ));
    assert_eq!(registry.sessions().next().unwrap().refused.len(), 1);
    registry.set_grants(before, Instant::now());
    assert_eq!(ask(&registry, "a", "10.244.0.1"), Ok(vec![1]));
}

/// Agents that are granted a range together take no address in it from each other.
#[test]
fn a_longer_prefix_takes_nothing_from_those_who_share_a_range() {
    let mut registry = registry();
    let now = Instant::now();
    let net = |text: &str| vec![Claim::Cidr(text.parse().unwrap())];
    registry.connect(
        link(1, "gw1", "192.0.2.1"),
        InstanceId([1; 16]),
        net("10.0.0.0/8"),
        now,
    );
    for (claim, id) in [
        (net("10.96.0.10/32"), 2),
        (net("10.96.0.0/16"), 3),
        (claim("10.96.0.10"), 4),
    ] {
        let greedy = link(id, "gw2", "192.0.2.2");
        let verdict = registry.connect(greedy, InstanceId([2; 16]), claim, now);
        assert_eq!(verdict.refused.len(), 1, "{verdict:?}");
        assert_eq!(ask(&registry, "a", "10.96.0.10"), Ok(vec![1]));
    }
}

fn identifiers(text: &[&str]) -> Vec<Claim> {
    let claim = |text: &&str| match text.parse() {
        Ok(net) => Claim::Cidr(net),
        Err(_) => Claim::Address(text.parse().unwrap()),
    };
    text.iter().map(claim).collect()
}

#[test]
fn strategies_decide_in_their_order() {
    use Strategy::{Default, DefaultRoute, DestHost};
    for (strategies, near, far) in [
        (&[DestHost, DefaultRoute][..], Ok(vec![1, 2]), Ok(vec![2])),
        (&[DefaultRoute, DestHost], Ok(vec![2, 1]), Ok(vec![2])),
        (&[DestHost], Ok(vec![1]), Err(RouteError::NoRoute)),
        (&[Default], Ok(vec![3, 2, 1]), Ok(vec![3, 2, 1])),
        (&[DestHost, Default], Ok(vec![1, 3, 2]), Ok(vec![3, 2, 1])),
    ] {
        let mut registry = registry_with(strategies);
        let offers = [
            identifiers(&["10.0.0.1", "10.1.0.0/16"]),
            vec![Claim::DefaultRoute],
            Vec::new(),
        ];
        for (id, offer) in (1..).zip(offers) {
            registry.connect(believed(id), InstanceId([0; 16]), offer, Instant::now());
        }
        for host in ["10.0.0.1", "10.1.2.3"] {
            assert_eq!(ask(&registry, "a", host), near, "{strategies:?} {host}");
        }
        for host in ["10.2.0.1", "elsewhere"] {
            assert_eq!(ask(&registry, "a", host), far, "{strategies:?} {host}");
        }
        let routes = registry.routes();
        let reachable = |host: &str| {
            let covers = |(_, net, served): (_, IpNet, bool)| {
                net.contains(&host.parse::<std::net::IpAddr>().unwrap())
                    .then_some((net.prefix_len(), served))
            };
            let found = routes.verdicts().filter_map(covers).max();
            found.is_some_and(|(_, served)| served)
        };
        assert_eq!(reachable("10.0.0.1"), near.is_ok(), "{strategies:?}");
        assert_eq!(reachable("10.2.0.1"), far.is_ok(), "{strategies:?}");
    }
}

#[test]
fn who_is_believed_shares_an_address() {
    let mut registry = registry();
    for id in [1, 2] {
        let verdict = registry.connect(
            believed(id),
            InstanceId([0; 16]),
            claim("10.99.1.2"),
            Instant::now(),
        );
        assert!(verdict.refused.is_empty());
    }
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2, 1]));
}

#[test]
fn a_certificate_displaces_a_grant() {
    let mut registry = registry();
    let granted = link(1, "gw1", "192.0.2.1");
    let now = Instant::now();
    registry.connect(granted, InstanceId([1; 16]), claim("10.99.1.2"), now);
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![1]));
    let own = link(2, "w1", "10.99.1.2");
    registry.connect(own, InstanceId([2; 16]), claim("10.99.1.2"), now);
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2]));
    assert_eq!(registry.sessions[&LinkId(1)].refused.len(), 1);
    registry.disconnect(LinkId(2), now);
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![1]));
}

#[test]
fn agents_of_one_service_account_serve_side_by_side() {
    let mut registry = registry();
    for id in [1, 2] {
        let info = link_of(
            id,
            "gw",
            "192.0.2.1",
            TunnelKind::Konnectivity,
            Trust::Granted,
        );
        let (process, now) = (InstanceId([id as u8; 16]), Instant::now());
        registry.connect(info, process, vec![Claim::DefaultRoute], now);
    }
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2, 1]));
}

/// A link of Konnectivity, or a native one where its release takes dials while it drains.
#[test]
fn a_draining_agent_is_the_last_resort() {
    for kind in [TunnelKind::Konnectivity, TunnelKind::Quic] {
        let mut registry = registry();
        let of = |id, name| link_of(id, name, "192.0.2.1", kind, Trust::Believed);
        let (old, new) = (of(1, "w1"), of(2, "w2"));
        for info in [&old, &new] {
            let now = Instant::now();
            registry.connect(info.clone(), InstanceId([0; 16]), claim("10.99.1.2"), now);
        }
        old.serves_while_draining.store(true, Ordering::Relaxed);
        old.draining.store(true, Ordering::Relaxed);
        assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2, 1]));
        new.silent.store(true, Ordering::Relaxed);
        assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![1]));
        assert!(registry.routes().verdicts().all(|(_, _, served)| served));
        assert_eq!(registry.backends().all, 1);

        old.serves_while_draining.store(false, Ordering::Relaxed);
        let absence = |answer| match answer {
            Err(RouteError::NoAgent(departed)) => departed.absence,
            other => panic!("{other:?}"),
        };
        let asked = ask(&registry, "a", "10.99.1.2");
        assert_eq!(absence(asked), Absence::Silent, "the newest one tells");
        registry.disconnect(LinkId(2), Instant::now());
        let asked = ask(&registry, "a", "10.99.1.2");
        assert_eq!(absence(asked), Absence::Draining);
    }
}

/// A process that drains takes no dials while its successor is there.
#[test]
fn a_draining_process_leaves_dials_to_its_successor() {
    let mut registry = registry();
    let (old, new) = (link(1, "w1", "10.99.1.2"), link(2, "w1", "10.99.1.2"));
    for (info, instance) in [(&old, 1), (&new, 2)] {
        let now = Instant::now();
        info.serves_while_draining.store(true, Ordering::Relaxed);
        registry.connect(
            info.clone(),
            InstanceId([instance; 16]),
            claim("10.99.1.2"),
            now,
        );
    }
    old.draining.store(true, Ordering::Relaxed);
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2]));
    registry.disconnect(LinkId(2), Instant::now());
    assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![1]));
}

/// Reported absence of an agent that does not serve a destination any more.
#[test]
fn an_absent_agent_is_told_from_one_that_serves_something_else() {
    let mut registry = registry();
    let now = Instant::now();
    let absence = |registry: &Registry| match ask(registry, "a", "10.99.1.2") {
        Err(RouteError::NoAgent(departed)) => departed,
        other => panic!("{other:?}"),
    };
    let unheard = Duration::from_secs(600);
    let silent = unheard_link(1, "w1", "10.99.1.2", unheard);
    silent.silent.store(true, Ordering::Relaxed);
    registry.connect(silent, InstanceId([1; 16]), claim("10.99.1.2"), now);
    let said = absence(&registry);
    assert_eq!(said.absence, Absence::Silent);
    assert!(said.last_seen.elapsed().unwrap() >= unheard);

    registry.disconnect(LinkId(1), now);
    let said = absence(&registry);
    assert_eq!(said.absence, Absence::Disconnected);
    assert!(said.last_seen.elapsed().unwrap() >= unheard);

    let moved = link(2, "w1", "10.99.1.9");
    registry.connect(moved, InstanceId([2; 16]), claim("10.99.1.9"), now);
    assert_eq!(absence(&registry).absence, Absence::Elsewhere);
    registry.disconnect(LinkId(2), now);
    assert_eq!(absence(&registry).absence, Absence::Disconnected);
}

#[test]
fn agents_are_counted_by_what_each_strategy_may_choose() {
    use Strategy::{Default, DefaultRoute, DestHost};
    let mut registry = registry_with(&[DestHost, DefaultRoute, Default]);
    let now = Instant::now();
    let both = || vec![Claim::DefaultRoute, claim("10.99.1.2").remove(0)];
    registry.connect(believed(1), InstanceId([1; 16]), both(), now);
    let counts = |registry: &Registry| {
        let backends = registry.backends();
        let counts = backends.by_strategy.iter().map(|(_, count)| *count);
        (backends.all, counts.collect::<Vec<_>>())
    };
    assert_eq!(counts(&registry), (1, vec![1, 1, 1]));
    // Another stream of the same agent is no other agent.
    let info = &registry.sessions().next().unwrap().info;
    let (identity, trust) = (info.identity.clone(), info.trust);
    let path = info.probe.path();
    let again = LinkInfo::new(
        (LinkId(2), 0),
        TunnelKind::Konnectivity,
        (identity, trust),
        Probe::new(move || path),
    );
    registry.connect(again, InstanceId([1; 16]), both(), now);
    assert_eq!(counts(&registry), (1, vec![1, 1, 1]));
    let silent = link(3, "w1", "10.99.1.3");
    registry.connect(silent.clone(), InstanceId([3; 16]), claim("10.99.1.3"), now);
    assert_eq!(counts(&registry), (2, vec![2, 1, 1]));
    silent.silent.store(true, Ordering::Relaxed);
    assert_eq!(counts(&registry), (1, vec![1, 1, 1]));
}

#[tokio::test]
async fn an_identity_with_too_many_links_loses_the_oldest() {
    let mut registry = registry();
    let now = Instant::now();
    let links: Vec<_> = (1..=MAX_LINKS as u64 + 2)
        .map(|id| link(id, "w1", "10.0.0.1"))
        .collect();
    for link in &links {
        registry.connect(link.clone(), InstanceId([1; 16]), Vec::new(), now);
    }
    let told = links.iter().map(|link| async {
        let told = tokio::time::timeout(Duration::from_millis(1), link.replaced.notified());
        told.await.is_ok()
    });
    let mut ended = 0;
    for told in told {
        ended += usize::from(told.await);
    }
    assert_eq!(ended, 2);
    let one_more = link(1000, "w2", "10.0.0.2");
    registry.connect(one_more, InstanceId([1; 16]), Vec::new(), now);
}

#[test]
fn further_tunnels_of_an_agent_come_behind_other_agents() {
    let mut registry = registry();
    let now = Instant::now();
    let range = vec![Claim::Cidr("10.1.0.0/16".parse().unwrap())];
    for id in 1..=5 {
        registry.connect(
            link(id, "gw1", "192.0.2.1"),
            InstanceId([1; 16]),
            range.clone(),
            now,
        );
    }
    let other = link(6, "gw2", "192.0.2.2");
    other.streams.store(100, Ordering::Relaxed);
    registry.connect(other, InstanceId([2; 16]), range, now);
    let host = Host::Ip("10.1.2.3".parse().unwrap());
    let found = registry.routes().candidates(&"a".parse().unwrap(), &host);
    let found: Vec<_> = found.unwrap().iter().map(|link| link.id.0).collect();
    assert_eq!(found, [5, 6, 4, 3]);
}

/// Node addresses of a range, as many as `count`.
fn many(range: u8, count: u16) -> Vec<Claim> {
    let address = |n: u16| [10, range, n.to_be_bytes()[0], n.to_be_bytes()[1]];
    (0..count)
        .map(|n| Claim::Address(address(n).into()))
        .collect()
}

#[test]
fn two_agents_can_not_fill_the_table_of_routes() {
    let now = Instant::now();
    let mut registry = registry().bounded(RouteBounds {
        all: 100,
        per_tenant: None,
        per_agent: 30,
    });
    // A single address of a range that several may serve is granted to nobody.
    let own = [
        ("gw1", "10.1.0.0/16"),
        ("gw1", "10.2.0.0/16"),
        ("gw2", "10.3.0.0/16"),
        ("gw3", "10.4.0.0/16"),
    ];
    let own = own.map(|(name, net)| GrantConfig {
        identity: format!("spiffe://a/agent/{name}"),
        cidrs: vec![net.parse().unwrap()],
        names: Vec::new(),
        default_route: false,
    });
    let policy = PolicyConfig { grants: own.into() };
    registry.set_grants(Grants::new(&policy).unwrap(), now);
    let connect = |registry: &mut Registry, id, name: &str, offer| {
        registry.connect(
            link(id, name, "192.0.2.1"),
            InstanceId([id as u8; 16]),
            offer,
            now,
        )
    };
    let verdict = connect(&mut registry, 1, "gw1", many(1, 50));
    assert_eq!((verdict.accepted.len(), verdict.refused.len()), (30, 20));
    let why = &verdict.refused[0].why;
    assert!(
        why.contains("30") && why.ends_with("(limits.routes_per_agent)"),
        "{why}"
    );
    // Another tunnel of the same agent serves the same, and no more.
    let verdict = connect(&mut registry, 2, "gw1", many(1, 50));
    assert_eq!(verdict.accepted.len(), 30);
    let verdict = connect(&mut registry, 3, "gw1", many(2, 50));
    assert_eq!(verdict.accepted.len(), 0);
    connect(&mut registry, 4, "gw2", many(3, 50));
    // Three quarters are one tenant's, and what stands in a certificate comes first.
    let mut offer = many(4, 50);
    offer.push(Claim::Address("192.0.2.1".parse().unwrap()));
    let verdict = connect(&mut registry, 5, "gw3", offer.clone());
    assert_eq!(verdict.accepted.len(), 15);
    assert!(verdict.accepted.contains(&offer[50]));
    assert!(verdict.refused[0].why.ends_with("(limits.routes)"));
    let (taken, refused) = registry.take_usage();
    assert_eq!(taken, (75, 75));
    let of = |limit| refused.iter().filter(|it| **it == limit).count();
    assert_eq!(
        (of(Limit::RoutesPerAgent), of(Limit::Routes)),
        (20 + 20 + 50 + 20, 36)
    );
    assert!(registry.take_usage().1.is_empty());
    // What an agent offers again has room: it is its own.
    let again = registry.offer(LinkId(5), offer, now).unwrap();
    assert_eq!(again.accepted.len(), 15);
    // Who was refused has what somebody else has left.
    registry.disconnect(LinkId(4), now);
    assert_eq!(registry.sessions[&LinkId(5)].claims.len(), 30);
    assert_eq!(registry.take_usage().0, (60, 60));
    for id in [1, 2, 3, 5] {
        registry.disconnect(LinkId(id), now);
    }
    assert_eq!(registry.take_usage().0, (0, 0));
}
