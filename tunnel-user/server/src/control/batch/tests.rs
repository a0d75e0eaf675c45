use std::collections::BTreeSet;

use cpc_identity::{Identity, Role};
use cpc_transport::tunnel::{Path, Probe};
use proptest::prelude::{any, prop_oneof, proptest};
use proptest::strategy::Strategy as _;

use super::*;
use crate::routes::Trust;
use cpc_config::TunnelKind;
use cpc_config::server::RoutingConfig;

const FORGET: Duration = Duration::from_secs(60);

fn registry() -> Registry {
    let strategies = RoutingConfig::default().strategies;
    Registry::new(Grants::default(), &strategies, FORGET)
}

fn link(id: u64) -> Arc<LinkInfo> {
    let identity = Identity {
        trust_domain: "a".parse().unwrap(),
        role: Role::Agent,
        name: "w1".into(),
        addresses: vec!["10.99.1.2".parse().unwrap()],
    };
    let path = Path {
        remote: "127.0.0.1:1".parse().unwrap(),
        rtt: Duration::ZERO,
        mtu: None,
        since_packet: Duration::ZERO,
        since_data: Duration::ZERO,
    };
    LinkInfo::new(
        (LinkId(id), 0),
        TunnelKind::Quic,
        (identity, Trust::Granted),
        Probe::new(move || path),
    )
}

fn connect(id: u64) -> Change {
    Change::Connect {
        info: link(id),
        instance: InstanceId([id as u8; 16]),
        predecessor: None,
        offer: vec![Claim::Address("10.99.1.2".parse().unwrap())],
    }
}

/// The kinds of effects, in order.
fn kinds<T>(effects: &[Effect<T>]) -> String {
    let kind = |effect: &Effect<T>| match effect {
        Effect::Publish(_) => 'p',
        Effect::Succeed(..) => 's',
        Effect::Answer(..) => 'a',
    };
    effects.iter().map(kind).collect()
}

#[test]
fn verdicts_and_successions_follow_the_routes() {
    let mut registry = registry();
    let mut batch = Batch::new(&mut registry, Instant::now());
    batch.apply(connect(1), Some(1));
    batch.apply(connect(2), Some(2));
    let (changed, effects) = batch.finish();
    assert!(changed);
    assert_eq!(kinds(&effects), "pssaa");
    let Effect::Publish(snapshot) = &effects[0] else {
        panic!("{effects:?}");
    };
    let host = "10.99.1.2".parse().unwrap();
    let found = snapshot.routes.candidates(&"a".parse().unwrap(), &host);
    assert_eq!(found.unwrap()[0].id, LinkId(2));
    assert_eq!(snapshot.backends.all, 2);
    assert!(matches!(&effects[3], Effect::Answer(1, verdict) if verdict.accepted.len() == 1));
}

#[test]
fn an_offer_that_is_repeated_is_answered_and_publishes_nothing() {
    let mut registry = registry();
    let mut batch = Batch::new(&mut registry, Instant::now());
    batch.apply(connect(1), Some(1));
    batch.finish();
    let offer = |addr: &str| Change::Offer(LinkId(1), vec![Claim::Address(addr.parse().unwrap())]);
    for (addr, expected) in [("10.99.1.2", "a"), ("10.99.9.9", "pa"), ("10.99.9.9", "a")] {
        let mut batch = Batch::new(&mut registry, Instant::now());
        batch.apply(offer(addr), Some(2));
        assert_eq!(kinds(&batch.finish().1), expected, "{addr}");
    }
    // A session that is gone gets no answer.
    let mut batch = Batch::new(&mut registry, Instant::now());
    batch.apply(Change::Offer(LinkId(7), Vec::new()), Some(3));
    assert_eq!(kinds(&batch.finish().1), "");
}

#[test]
fn what_is_forgotten_is_published() {
    let mut registry = registry();
    let now = Instant::now();
    let mut batch = Batch::<()>::new(&mut registry, now);
    batch.apply(connect(1), None);
    batch.apply(Change::Disconnect(LinkId(1)), None);
    batch.finish();
    assert!(!Batch::<()>::new(&mut registry, now).finish().0);
    let later = now + FORGET;
    assert_eq!(
        kinds(&Batch::<()>::new(&mut registry, later).finish().1),
        "p"
    );
}

#[test]
fn the_pause_grows_with_the_work_up_to_a_bound() {
    assert_eq!(pause_after(Duration::ZERO), Duration::ZERO);
    assert_eq!(
        pause_after(Duration::from_millis(1)),
        Duration::from_millis(4)
    );
    assert_eq!(pause_after(Duration::from_secs(9)), MAX_PAUSE);
}

proptest! {
    /// Checks any batch: one snapshot at most, first of all; each arrival succeeds once, before any
    /// answer; each arrival is answered.
    #[test]
    fn effects_keep_their_order(
        changes in proptest::collection::vec(
            prop_oneof![
                (1..9u64).prop_map(connect),
                (1..9u64, any::<bool>()).prop_map(|(id, own)| {
                    let addr = if own { "10.99.1.2" } else { "10.99.9.9" };
                    Change::Offer(LinkId(id), vec![Claim::Address(addr.parse().unwrap())])
                }),
                (1..9u64).prop_map(|id| Change::Availability(LinkId(id))),
                (1..9u64).prop_map(|id| Change::Disconnect(LinkId(id))),
            ],
            0..20,
        ),
    ) {
        let mut registry = registry();
        let mut batch = Batch::new(&mut registry, Instant::now());
        let arrivals = { changes.iter().enumerate() }
            .filter(|(_, change)| matches!(change, Change::Connect { .. }))
            .map(|(number, _)| number);
        let arrivals: BTreeSet<_> = arrivals.collect();
        for (number, change) in changes.into_iter().enumerate() {
            batch.apply(change, Some(number));
        }
        let (changed, effects) = batch.finish();
        let kinds = kinds(&effects);
        let rest = kinds.strip_prefix('p');
        assert_eq!(rest.is_some(), changed);
        let rest = rest.unwrap_or(&kinds);
        let answers = rest.trim_start_matches('s');
        assert_eq!(rest.len() - answers.len(), arrivals.len());
        assert!(answers.chars().all(|kind| kind == 'a'), "{kinds}");
        let answered: BTreeSet<_> = effects.iter().filter_map(|effect| match effect {
            Effect::Answer(number, _) => Some(*number),
            _ => None,
        }).collect();
        assert!(answered.is_superset(&arrivals), "{arrivals:?} {answered:?}");
    }
}
