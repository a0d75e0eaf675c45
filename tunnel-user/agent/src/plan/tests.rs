//! The plan against servers that come, go and change what they speak.

use super::*;

const A: ([u8; 4], u16) = ([10, 0, 0, 1], 8132);
const B: ([u8; 4], u16) = ([10, 0, 0, 2], 8132);

fn endpoint(at: ([u8; 4], u16), kind: TunnelKind) -> ServerEndpoint {
    let address = at.into();
    ServerEndpoint { address, kind }
}

fn quic(at: ([u8; 4], u16)) -> ServerEndpoint {
    endpoint(at, TunnelKind::Quic)
}

fn grpc(at: ([u8; 4], u16)) -> ServerEndpoint {
    endpoint(at, TunnelKind::Konnectivity)
}

fn plan_of(addresses: &[([u8; 4], u16)], protocol: Protocol, now: Instant) -> Plan {
    let mut plan = Plan::default();
    let addresses = addresses.iter().map(|at| ((*at).into(), protocol));
    plan.set_addresses(&addresses.collect::<Vec<_>>(), now);
    plan
}

fn plan(addresses: &[([u8; 4], u16)], now: Instant) -> Plan {
    plan_of(addresses, Protocol::Quic, now)
}

fn welcome(
    plan: &mut Plan,
    at: ([u8; 4], u16),
    id: &str,
    instance: u8,
    tunnel: u64,
    count: u32,
    now: Instant,
) -> Verdict {
    let leads = ServerInfo {
        server: id.into(),
        instance: Some(InstanceId([instance; 16])),
        server_count: count,
    };
    plan.welcomed(quic(at), tunnel, leads, now, 0.5)
}

/// By a foreign server.
fn greet(
    plan: &mut Plan,
    at: ([u8; 4], u16),
    id: &str,
    tunnel: u64,
    count: u32,
    now: Instant,
) -> Verdict {
    let leads = ServerInfo {
        server: id.into(),
        instance: None,
        server_count: count,
    };
    plan.welcomed(grpc(at), tunnel, leads, now, 0.5)
}

#[test]
fn every_address_is_dialled_once_and_then_rests() {
    let now = Instant::now();
    let mut plan = plan(&[A, B], now);
    assert_eq!(plan.due(now), [quic(A), quic(B)]);
    assert!(plan.due(now).is_empty());
    assert_eq!(welcome(&mut plan, A, "s1", 1, 1, 2, now), Verdict::Keep);
    assert_eq!(welcome(&mut plan, B, "s2", 2, 2, 2, now), Verdict::Keep);
    assert_eq!(plan.next_timeout(), None);
}

#[test]
fn a_virtual_address_is_dialled_until_all_servers_are_found() {
    let mut now = Instant::now();
    let mut plan = plan(&[A], now);
    plan.due(now);
    welcome(&mut plan, A, "s1", 1, 1, 2, now);
    now = plan.next_timeout().unwrap();
    assert_eq!(plan.due(now), [quic(A)]);
    assert!(!plan.reached(quic(A), "s1", now, 0.5));
    now = plan.next_timeout().unwrap();
    assert_eq!(plan.due(now), [quic(A)]);
    assert!(plan.reached(quic(A), "s2", now, 0.5));
    assert_eq!(welcome(&mut plan, A, "s2", 2, 3, 2, now), Verdict::Keep);
    assert_eq!(plan.next_timeout(), None);
}

#[test]
fn a_lost_server_is_dialled_at_once_and_for_ever() {
    let mut now = Instant::now();
    let mut plan = plan(&[A], now);
    plan.due(now);
    welcome(&mut plan, A, "s1", 1, 1, 1, now);
    now += FASTEST;
    plan.ended(TunnelKind::Quic, "s1", 1, now, 0.99);
    assert!(plan.next_timeout().unwrap() - now < SPREAD);
    for _ in 0..50 {
        let next = plan.next_timeout().unwrap();
        assert!(next - now <= SLOWEST.mul_f64(1.25));
        now = next;
        assert_eq!(plan.due(now), [quic(A)]);
        plan.failed(quic(A), now, 0.99);
    }
}

#[test]
fn a_server_that_ends_fresh_tunnels_is_dialled_at_a_pace() {
    let mut now = Instant::now();
    let mut plan = plan(&[A], now);
    for tunnel in 1..50 {
        assert_eq!(plan.due(now), [quic(A)]);
        welcome(&mut plan, A, "s1", 1, tunnel, 1, now);
        plan.ended(TunnelKind::Quic, "s1", tunnel, now, 0.0);
        let next = plan.next_timeout().unwrap();
        assert_eq!(next - now, FASTEST);
        now = next;
    }
}

#[test]
fn a_silent_server_is_dialled_beside_its_tunnel() {
    let now = Instant::now();
    let mut plan = plan(&[A], now);
    plan.due(now);
    welcome(&mut plan, A, "s1", 1, 1, 1, now);
    plan.changed(TunnelKind::Quic, "s1", 1, Health::Silent, now);
    let now = now + FASTEST;
    assert_eq!(plan.due(now), [quic(A)]);
    assert_eq!(welcome(&mut plan, A, "s1", 1, 2, 1, now), Verdict::Keep);
    // The old tunnel's end is no loss.
    plan.ended(TunnelKind::Quic, "s1", 1, now, 0.0);
    assert_eq!(plan.next_timeout(), None);
}

/// A draining server serves until its end, and refuses another tunnel: dialling it again would be in
/// vain.
#[test]
fn a_draining_server_is_dialled_when_it_has_left() {
    let now = Instant::now();
    let mut plan = plan(&[A], now);
    plan.due(now);
    welcome(&mut plan, A, "s1", 1, 1, 1, now);
    plan.changed(TunnelKind::Quic, "s1", 1, Health::Draining, now);
    assert_eq!(plan.next_timeout(), None);
    let now = now + 30 * FASTEST;
    plan.ended(TunnelKind::Quic, "s1", 1, now, 0.0);
    assert_eq!(plan.due(now), [quic(A)]);
    assert_eq!(welcome(&mut plan, A, "s1", 2, 2, 1, now), Verdict::Keep);
    assert_eq!(plan.next_timeout(), None);
}

/// A server of the same id at another address is found while the old one drains.
#[test]
fn the_successor_of_a_draining_server_is_found_elsewhere() {
    let now = Instant::now();
    let mut plan = plan(&[A, B], now);
    plan.due(now);
    welcome(&mut plan, A, "s1", 1, 1, 1, now);
    let other = welcome(&mut plan, B, "s1", 2, 2, 1, now);
    assert!(matches!(other, Verdict::Conflict(_)), "{other:?}");
    plan.changed(TunnelKind::Quic, "s1", 1, Health::Draining, now);
    let now = now + 30 * FASTEST;
    assert_eq!(plan.due(now), [quic(B)]);
    assert!(plan.reached(quic(B), "s1", now, 0.5));
    assert_eq!(welcome(&mut plan, B, "s1", 2, 3, 1, now), Verdict::Keep);
    assert!(plan.holds(TunnelKind::Quic, "s1", 3) && !plan.holds(TunnelKind::Quic, "s1", 1));
    // The end of the old one's tunnel is no loss.
    plan.ended(TunnelKind::Quic, "s1", 1, now, 0.0);
    assert_eq!(plan.next_timeout(), None);
}

#[test]
fn a_restarted_server_takes_the_place_of_its_former_process() {
    let now = Instant::now();
    let mut plan = plan(&[A], now);
    plan.due(now);
    welcome(&mut plan, A, "s1", 1, 1, 1, now);
    plan.changed(TunnelKind::Quic, "s1", 1, Health::Silent, now);
    plan.due(now + FASTEST);
    assert_eq!(welcome(&mut plan, A, "s1", 9, 2, 1, now), Verdict::Keep);
    assert!(plan.holds(TunnelKind::Quic, "s1", 2) && !plan.holds(TunnelKind::Quic, "s1", 1));
}

#[test]
fn of_two_servers_with_one_id_the_first_is_kept_while_it_lives() {
    let now = Instant::now();
    let mut plan = plan(&[A, B], now);
    plan.due(now);
    assert_eq!(welcome(&mut plan, A, "s1", 1, 1, 2, now), Verdict::Keep);
    let conflict = Verdict::Conflict(A.into());
    assert_eq!(welcome(&mut plan, B, "s1", 2, 2, 2, now), conflict);
    plan.changed(TunnelKind::Quic, "s1", 1, Health::Silent, now);
    assert_eq!(welcome(&mut plan, B, "s1", 2, 3, 2, now), Verdict::Keep);
}

#[test]
fn an_address_that_is_no_longer_resolved_is_not_dialled() {
    let now = Instant::now();
    let mut plan = plan(&[A, B], now);
    plan.set_addresses(&[(B.into(), Protocol::Quic)], now);
    assert_eq!(plan.due(now), [quic(B)]);
}

/// Dials `at` when it is next due, and lands on `id`.
fn walk(plan: &mut Plan, now: &mut Instant, id: &str, tunnel: u64, count: u32) -> Verdict {
    *now = plan.next_timeout().unwrap().max(*now);
    assert_eq!(plan.due(*now), [grpc(A)]);
    greet(plan, A, id, tunnel, count, *now)
}

#[test]
fn a_load_balancer_is_walked_until_the_foreign_servers_are_as_many_as_they_say() {
    let mut now = Instant::now();
    let start = now;
    let mut plan = plan_of(&[A], Protocol::Konnectivity, now);
    assert_eq!(walk(&mut plan, &mut now, "s1", 1, 3), Verdict::Keep);
    assert_eq!(walk(&mut plan, &mut now, "s1", 2, 3), Verdict::Decline);
    assert_eq!(walk(&mut plan, &mut now, "s2", 3, 3), Verdict::Keep);
    assert_eq!(walk(&mut plan, &mut now, "s2", 4, 3), Verdict::Decline);
    assert_eq!(walk(&mut plan, &mut now, "s3", 5, 3), Verdict::Keep);
    assert!(now - start < Duration::from_secs(10));
    // All are found; those that come later are found, too, without anyone's telling.
    assert!(plan.next_timeout().unwrap() - now > RECONCILE / 2);
    assert_eq!(walk(&mut plan, &mut now, "s4", 6, 4), Verdict::Keep);
    assert!(plan.next_timeout().unwrap() - now > RECONCILE / 2);
    // One that is lost is searched for at once.
    plan.ended(TunnelKind::Konnectivity, "s2", 3, now, 0.5);
    assert!(plan.next_timeout().unwrap() - now < SPREAD);
}

#[test]
fn leases_count_in_place_of_what_foreign_servers_say() {
    let mut now = Instant::now();
    let mut plan = plan_of(&[A], Protocol::Konnectivity, now);
    plan.set_leases(Some(0));
    walk(&mut plan, &mut now, "s1", 1, 5);
    assert_eq!((plan.server_count(), plan.next_timeout()), (1, None));
    plan.set_leases(Some(2));
    assert_eq!(walk(&mut plan, &mut now, "s2", 2, 1), Verdict::Keep);
    assert_eq!((plan.server_count(), plan.next_timeout()), (2, None));
}

#[test]
fn leases_and_what_foreign_servers_say_may_count_both() {
    let mut now = Instant::now();
    let mut plan = plan_of(&[A], Protocol::Konnectivity, now);
    plan.count_both();
    plan.set_leases(Some(1));
    walk(&mut plan, &mut now, "s1", 1, 2);
    assert_eq!(plan.server_count(), 2);
    plan.set_leases(Some(3));
    assert_eq!(plan.server_count(), 3);
}

#[test]
fn however_many_a_foreign_server_speaks_of_the_tunnels_are_bounded() {
    let now = Instant::now();
    let mut plan = plan_of(&[A], Protocol::Konnectivity, now);
    for tunnel in 0..2 * MAX_FOREIGN_SERVERS as u64 {
        greet(&mut plan, A, &format!("s{tunnel}"), tunnel, u32::MAX, now);
    }
    assert_eq!(plan.foreign.len(), MAX_FOREIGN_SERVERS);
    assert!(plan.next_timeout().unwrap() - now > RECONCILE / 2);
}

#[test]
fn where_quic_is_answered_grpc_is_not_tried() {
    let mut now = Instant::now();
    let mut plan = plan_of(&[A, B], Protocol::Auto, now);
    assert_eq!(plan.due(now), [quic(A), quic(B)]);
    welcome(&mut plan, A, "s1", 1, 1, 2, now);
    welcome(&mut plan, B, "s2", 1, 2, 2, now);
    assert_eq!(plan.next_timeout(), None);
    // A server that restarts is back before its fallback is due.
    now += FASTEST;
    plan.ended(TunnelKind::Quic, "s1", 1, now, 0.5);
    now += SPREAD;
    assert_eq!(plan.due(now), [quic(A), quic(B)]);
    assert!(!plan.reached(quic(B), "s2", now, 0.5));
    welcome(&mut plan, A, "s1", 2, 3, 2, now);
    assert_eq!(plan.next_timeout(), None);
}

#[test]
fn grpc_takes_over_and_makes_way_when_quic_is_back() {
    let mut now = Instant::now();
    let mut plan = plan_of(&[A], Protocol::Auto, now);
    plan.due(now);
    welcome(&mut plan, A, "s1", 1, 1, 1, now);
    now += FASTEST;
    plan.ended(TunnelKind::Quic, "s1", 1, now, 0.0);
    assert_eq!(plan.due(now), [quic(A)]);
    plan.failed(quic(A), now, 0.99);
    now += HEAD_START;
    assert_eq!(plan.due(now), [grpc(A)]);
    // Three ids of one server.
    greet(&mut plan, A, "s1", 2, 3, now);
    for (id, tunnel) in [("s1-2", 3), ("s1-3", 4)] {
        now += 2 * FASTEST;
        assert!(plan.due(now).contains(&grpc(A)));
        assert_eq!(greet(&mut plan, A, id, tunnel, 3, now), Verdict::Keep);
        plan.failed(quic(A), now, 0.5);
    }
    assert!(plan.superseded().is_empty());
    // QUIC goes on being tried.
    assert!(plan.next_timeout().unwrap() - now <= SLOWEST.mul_f64(1.25));
    now += SLOWEST.mul_f64(1.25);
    assert_eq!(plan.due(now), [quic(A)]);
    welcome(&mut plan, A, "s1", 2, 5, 1, now);
    let mut ending = plan.superseded();
    ending.sort_unstable();
    assert_eq!(ending, [2, 3, 4]);
    assert!(plan.superseded().is_empty());
    assert_eq!(plan.next_timeout(), None);
}

#[test]
fn a_silent_quic_tunnel_is_backed_by_grpc_at_once_and_until_it_is_heard_again() {
    let now = Instant::now();
    let mut plan = plan_of(&[A], Protocol::Auto, now);
    plan.due(now);
    welcome(&mut plan, A, "s1", 1, 1, 1, now);
    plan.changed(TunnelKind::Quic, "s1", 1, Health::Silent, now);
    assert!(plan.due(now).contains(&grpc(A)));
    assert_eq!(greet(&mut plan, A, "s1", 2, 1, now), Verdict::Keep);
    plan.changed(TunnelKind::Quic, "s1", 1, Health::Live, now);
    assert_eq!(plan.superseded(), [2]);
}

#[test]
fn behind_one_address_some_may_speak_quic_and_some_not() {
    let mut now = Instant::now();
    let mut plan = plan_of(&[A], Protocol::Auto, now);
    plan.due(now);
    welcome(&mut plan, A, "new", 1, 1, 2, now);
    now += HEAD_START;
    // QUIC knows of a second server and does not find it.
    assert!(plan.due(now).contains(&grpc(A)));
    assert_eq!(greet(&mut plan, A, "new-2", 2, 6, now), Verdict::Decline);
    now += SLOWEST;
    assert!(plan.due(now).contains(&grpc(A)));
    assert_eq!(greet(&mut plan, A, "old", 3, 2, now), Verdict::Keep);
    assert!(plan.superseded().is_empty());
    assert_eq!(plan.server_count(), 2);
    plan.failed(quic(A), now, 0.5);
    now += SLOWEST;
    assert_eq!(plan.due(now), [quic(A)], "gRPC rests");
}

#[test]
fn a_namesake_elsewhere_is_another_server() {
    let now = Instant::now();
    let mut plan = plan_of(&[A, B], Protocol::Auto, now);
    plan.due(now + HEAD_START);
    greet(&mut plan, A, "cp", 1, 2, now);
    greet(&mut plan, B, "cp-2", 2, 2, now);
    welcome(&mut plan, A, "cp", 1, 3, 2, now);
    assert_eq!(plan.superseded(), [1]);
}

#[test]
fn a_foreign_server_that_was_asked_for_is_held_beside_quic() {
    let now = Instant::now();
    let mut plan = Plan::default();
    let both = [Protocol::Quic, Protocol::Konnectivity].map(|p| (A.into(), p));
    plan.set_addresses(&both, now);
    assert_eq!(plan.due(now), [quic(A), grpc(A)]);
    welcome(&mut plan, A, "s1", 1, 1, 1, now);
    assert_eq!(greet(&mut plan, A, "s1", 2, 1, now), Verdict::Keep);
    assert!(plan.superseded().is_empty());
}

#[test]
fn several_tunnels_to_a_server_come_one_behind_the_other() {
    let mut now = Instant::now();
    let mut plan = plan(&[A], now);
    plan.set_tunnels(3);
    for tunnel in 1..=3 {
        assert_eq!(plan.due(now), [quic(A)], "{tunnel}");
        assert!(plan.reached(quic(A), "s1", now, 0.5));
        let verdict = welcome(&mut plan, A, "s1", 1, tunnel, 1, now);
        assert_eq!(verdict, Verdict::Keep, "{tunnel}");
    }
    assert_eq!(plan.next_timeout(), None);
    assert!((1..=3).all(|tunnel| plan.holds(TunnelKind::Quic, "s1", tunnel)));
    assert_eq!(plan.server_count(), 1);

    // One is lost, and dialled again; one falls silent, and another takes its place.
    now += FASTEST;
    plan.ended(TunnelKind::Quic, "s1", 2, now, 0.0);
    assert_eq!(plan.due(now), [quic(A)]);
    assert_eq!(welcome(&mut plan, A, "s1", 1, 4, 1, now), Verdict::Keep);
    plan.changed(TunnelKind::Quic, "s1", 3, Health::Silent, now);
    now = plan.next_timeout().unwrap();
    assert_eq!(plan.due(now), [quic(A)]);
    assert_eq!(welcome(&mut plan, A, "s1", 1, 5, 1, now), Verdict::Keep);
    assert!(!plan.holds(TunnelKind::Quic, "s1", 3));
    assert_eq!(plan.next_timeout(), None);
}

#[test]
fn enough_tunnels_to_a_server_are_enough_from_any_address() {
    let now = Instant::now();
    let mut plan = plan(&[A, B], now);
    plan.set_tunnels(2);
    assert_eq!(plan.due(now), [quic(A), quic(B)]);
    assert_eq!(welcome(&mut plan, A, "s1", 1, 1, 1, now), Verdict::Keep);
    assert_eq!(welcome(&mut plan, B, "s1", 1, 2, 1, now), Verdict::Keep);
    assert_eq!(welcome(&mut plan, B, "s1", 1, 3, 1, now), Verdict::Decline);
    // Its successor at either address takes the place of both.
    assert_eq!(
        welcome(&mut plan, A, "s1", 2, 4, 1, now),
        Verdict::Conflict(B.into())
    );
    plan.ended(TunnelKind::Quic, "s1", 2, now, 0.5);
    assert_eq!(welcome(&mut plan, A, "s1", 2, 5, 1, now), Verdict::Keep);
    assert!(!plan.holds(TunnelKind::Quic, "s1", 1));
}

#[test]
fn a_virtual_address_is_dialled_until_every_server_has_its_tunnels() {
    let mut now = Instant::now();
    let mut plan = plan(&[A], now);
    plan.set_tunnels(2);
    for (tunnel, server) in [(1, "s1"), (2, "s2"), (3, "s1")] {
        assert_eq!(plan.due(now), [quic(A)]);
        let instance = server.as_bytes()[1];
        let verdict = welcome(&mut plan, A, server, instance, tunnel, 2, now);
        assert_eq!(verdict, Verdict::Keep);
        now = plan.next_timeout().unwrap();
    }
    // It leads to one that has enough.
    assert_eq!(plan.due(now), [quic(A)]);
    assert!(!plan.reached(quic(A), "s1", now, 0.5));
    now = plan.next_timeout().unwrap();
    assert_eq!(plan.due(now), [quic(A)]);
    assert!(plan.reached(quic(A), "s2", now, 0.5));
    let verdict = welcome(&mut plan, A, "s2", b'2', 4, 2, now);
    assert_eq!(verdict, Verdict::Keep);
    assert_eq!(plan.next_timeout(), None);
}
