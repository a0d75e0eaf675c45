use std::time::Duration;

use proptest::prelude::*;

use super::*;

const BOUNDS: Bounds = Bounds {
    at_once: 64,
    per_second: 10,
    burst: 20,
    ipv4_prefix: 32,
    ipv6_prefix: 56,
};

/// Starts and ends handshakes until the limiter refuses one.
fn until_refused(
    sources: &SourceLimiter,
    address: &str,
    is_proven: bool,
    now: Instant,
) -> (u32, Verdict) {
    let address = address.parse().unwrap();
    for done in 0..10_000 {
        match sources.judge(address, is_proven, now) {
            Verdict::Enter(place) => place.charge(now),
            verdict => return (done, verdict),
        }
    }
    panic!("no bound");
}

#[test]
fn a_source_has_its_burst_and_then_its_rate() {
    let start = Instant::now();
    let sources = SourceLimiter::new(BOUNDS, start);
    let (first, verdict) = until_refused(&sources, "192.0.2.1", true, start);
    assert_eq!(first, 20);
    assert!(matches!(verdict, Verdict::Refuse(Overload::Rate)));
    let later = start + Duration::from_secs(1);
    assert_eq!(until_refused(&sources, "192.0.2.1", true, later).0, 10);
    let quiet = start + Duration::from_secs(3600);
    assert_eq!(until_refused(&sources, "192.0.2.1", true, quiet).0, 20);
}

#[test]
fn others_are_not_charged_for_it() {
    let start = Instant::now();
    let sources = SourceLimiter::new(BOUNDS, start);
    until_refused(&sources, "192.0.2.1", true, start);
    // Another one may share one counter of two, not both, but by a chance of one in 8 million.
    assert_eq!(until_refused(&sources, "192.0.2.2", true, start).0, 20);
}

#[test]
fn a_source_is_a_prefix() {
    let start = Instant::now();
    let sources = SourceLimiter::new(BOUNDS, start);
    until_refused(&sources, "2001:db8:0:1200::1", true, start);
    let same = "2001:db8:0:12ff:ffff::9";
    assert_eq!(until_refused(&sources, same, true, start).0, 0);
    assert_eq!(
        until_refused(&sources, "2001:db8:0:1300::1", true, start).0,
        20
    );

    until_refused(&sources, "::ffff:192.0.2.1", true, start);
    assert_eq!(until_refused(&sources, "192.0.2.1", true, start).0, 0);

    let everybody = Bounds {
        ipv4_prefix: 0,
        ..BOUNDS
    };
    let sources = SourceLimiter::new(everybody, start);
    until_refused(&sources, "192.0.2.1", true, start);
    assert_eq!(until_refused(&sources, "198.51.100.1", true, start).0, 0);
}

/// A peer that forges another's address can't use up the share of that address.
#[test]
fn half_of_a_bucket_is_for_proven_addresses() {
    let start = Instant::now();
    let sources = SourceLimiter::new(BOUNDS, start);
    let (forged, verdict) = until_refused(&sources, "192.0.2.1", false, start);
    assert!(forged <= 10);
    assert!(matches!(verdict, Verdict::Prove));
    assert!(until_refused(&sources, "192.0.2.1", true, start).0 >= 10);
    // Refused handshakes cost nothing, and without a proof no peer gets one.
    let verdict = sources.judge("192.0.2.1".parse().unwrap(), false, start);
    assert!(matches!(verdict, Verdict::Prove));
}

#[test]
fn those_who_are_not_charged_come_as_often_as_they_like() {
    let start = Instant::now();
    let sources = SourceLimiter::new(BOUNDS, start);
    for _ in 0..1000 {
        let verdict = sources.judge("192.0.2.1".parse().unwrap(), true, start);
        assert!(matches!(verdict, Verdict::Enter(_)));
    }
}

/// Returns the permits that a source gets for a number of handshakes.
fn hold(sources: &SourceLimiter, address: &str, now: Instant) -> Vec<HandshakePermit> {
    let address = address.parse().unwrap();
    let next = || match sources.judge(address, true, now) {
        Verdict::Enter(place) => Some(place),
        _ => None,
    };
    std::iter::from_fn(next).take(1000).collect()
}

#[test]
fn a_source_leaves_as_many_places_as_it_has() {
    let start = Instant::now();
    let sources = SourceLimiter::new(BOUNDS, start);
    let first = hold(&sources, "192.0.2.1", start);
    assert_eq!(first.len(), 32);
    let verdict = sources.judge("192.0.2.1".parse().unwrap(), true, start);
    assert!(matches!(verdict, Verdict::Refuse(Overload::Share)));
    let second = hold(&sources, "192.0.2.2", start);
    assert_eq!(second.len(), 16);
    drop(first);
    assert_eq!(sources.in_use(), 16);
    assert!(!hold(&sources, "192.0.2.1", start).is_empty());
    drop(second);
    assert_eq!(sources.in_use(), 0);
}

#[test]
fn a_busy_port_wants_addresses_proven() {
    let start = Instant::now();
    let sources = SourceLimiter::new(BOUNDS, start);
    let stranger = "198.51.100.1".parse().unwrap();
    let places: Vec<_> = (0..4)
        .map(|n| {
            let verdict = sources.judge(IpAddr::from([192, 0, 2, n]), true, start);
            assert!(matches!(verdict, Verdict::Enter(_)));
            verdict
        })
        .collect();
    assert!(matches!(
        sources.judge(stranger, false, start),
        Verdict::Prove
    ));
    assert!(matches!(
        sources.judge(stranger, true, start),
        Verdict::Enter(_)
    ));
    drop(places);
    assert!(matches!(
        sources.judge(stranger, false, start),
        Verdict::Enter(_)
    ));
}

proptest! {
    /// For any order of events: no source gets more than its burst and its rate, ended handshakes
    /// do not count, and the total stays within its bound.
    #[test]
    fn bounds_are_kept(steps in prop::collection::vec((0_u8..4, any::<bool>(), 0_u64..300, any::<bool>()), 1..400)) {
        let start = Instant::now();
        let sources = SourceLimiter::new(BOUNDS, start);
        let (mut now, mut begun, mut held) = (start, [0_u32; 4], Vec::new());
        for (who, is_proven, wait, stays) in steps {
            now += Duration::from_millis(wait);
            if let Verdict::Enter(place) = sources.judge(IpAddr::from([192, 0, 2, who]), is_proven, now) {
                place.charge(now);
                begun[usize::from(who)] += 1;
                if stays { held.push(place) } else { held.clear() }
            }
            prop_assert_eq!(sources.in_use(), held.len());
            prop_assert!(held.len() <= BOUNDS.at_once);
            let max = 20.0 + now.duration_since(start).as_secs_f64() * 10.0;
            prop_assert!(begun.iter().all(|begun| f64::from(*begun) <= max + 0.001));
        }
        drop(held);
        prop_assert_eq!(sources.in_use(), 0);
    }
}
