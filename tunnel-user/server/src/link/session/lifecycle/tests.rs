use proptest::prelude::{Just, any, prop_oneof, proptest};
use proptest::strategy::Strategy;
use tunnel_proto::control::VERSION;
use tunnel_proto::session::SERVES_WHILE_DRAINING;

use super::*;

const PROCESS: InstanceId = InstanceId([7; 16]);

fn hello() -> Hello {
    Hello {
        version: VERSION,
        agent_id: "w1".into(),
        instance_id: PROCESS,
        node: "w1".into(),
        software_version: "1.2.3".into(),
        features: vec![SERVES_WHILE_DRAINING.into()],
        offer: vec![Claim::DefaultRoute],
        predecessor: None,
        incarnation: 0,
    }
}

fn verdict() -> Verdict {
    Verdict {
        accepted: vec![Claim::DefaultRoute],
        refused: Vec::new(),
        is_new: true,
    }
}

fn at(phase: Phase) -> Moment {
    Moment {
        now: Instant::now(),
        phase,
    }
}

fn draining() -> Moment {
    let now = Instant::now();
    Moment {
        now,
        phase: Phase::Draining(now + Duration::from_secs(9)),
    }
}

fn greet(lifecycle: &mut Lifecycle, at: Moment) -> Action {
    lifecycle.handle(Input::Agent(ServerEvent::Hello(hello())), at)
}

/// A session whose agent was welcomed.
fn serving() -> Lifecycle {
    let (mut lifecycle, at) = (Lifecycle::new(true), at(Phase::Running));
    greet(&mut lifecycle, at);
    lifecycle.handle(Input::Admitted(Ok(())), at);
    lifecycle.handle(Input::Registered(Some(verdict())), at);
    lifecycle
}

fn refusal(action: Action) -> CloseReason {
    match action {
        Action::Refuse(reason, _) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_agent_is_welcomed_once_its_routes_are_in_force() {
    let (mut lifecycle, at) = (Lifecycle::new(false), at(Phase::Running));
    assert_eq!(greet(&mut lifecycle, at), Action::Admit);
    let registration = Registration {
        process: (PROCESS, None),
        incarnation: 0,
        offer: vec![Claim::DefaultRoute],
        serves_while_draining: true,
        holds_sessions: false,
    };
    let admitted = lifecycle.handle(Input::Admitted(Ok(())), at);
    assert_eq!(admitted, Action::Register(registration));
    let greeting = Greeting {
        instance: PROCESS,
        version: "1.2.3".into(),
        offered: 1,
    };
    let registered = lifecycle.handle(Input::Registered(Some(verdict())), at);
    assert_eq!(registered, Action::Welcome(verdict(), greeting));
}

#[test]
fn a_draining_server_takes_in_who_has_no_other_tunnel_to_it() {
    for (found, refused) in [(true, true), (false, false)] {
        let (mut lifecycle, at) = (Lifecycle::new(false), draining());
        assert_eq!(greet(&mut lifecycle, at), Action::FindProcess(PROCESS));
        let action = lifecycle.handle(Input::ProcessFound(found), at);
        match refused {
            true => assert_eq!(refusal(action), CloseReason::Shutdown),
            false => assert_eq!(action, Action::Admit),
        }
    }
}

#[test]
fn each_refusal_has_its_reason() {
    let (mut lifecycle, at) = (Lifecycle::new(false), at(Phase::Running));
    greet(&mut lifecycle, at);
    let full = lifecycle.handle(Input::Admitted(Err("full".into())), at);
    assert_eq!(full, Action::Refuse(CloseReason::Overloaded, "full".into()));

    let mut lifecycle = Lifecycle::new(false);
    greet(&mut lifecycle, at);
    lifecycle.handle(Input::Admitted(Ok(())), at);
    let ending = lifecycle.handle(Input::Registered(None), at);
    assert_eq!(refusal(ending), CloseReason::Shutdown);

    let replaced = serving().handle(Input::Replaced, at);
    assert_eq!(refusal(replaced), CloseReason::Replaced);
}

#[test]
fn a_drain_counts_once_and_a_replaced_tunnel_takes_no_dials() {
    for (reason, takes_dials) in [
        (CloseReason::Shutdown, true),
        (CloseReason::Replaced, false),
    ] {
        let (mut lifecycle, at) = (serving(), at(Phase::Running));
        let mut drain = || {
            let deadline = at.now;
            let event = ServerEvent::Draining { deadline, reason };
            lifecycle.handle(Input::Agent(event), at)
        };
        let expected = Action::SetDraining {
            reason,
            takes_dials,
        };
        assert_eq!(drain(), expected);
        assert_eq!(drain(), Action::Wait);
    }
}

#[test]
fn certificates_are_issued_at_intervals_by_servers_that_issue() {
    let mut lifecycle = serving();
    let start = Instant::now();
    let mut request = |after: Duration| {
        let at = Moment {
            now: start + after,
            phase: Phase::Running,
        };
        lifecycle.handle(Input::Agent(ServerEvent::CertificateRequest(vec![1])), at)
    };
    assert_eq!(request(Duration::ZERO), Action::Issue(vec![1]));
    let early = request(REQUEST_INTERVAL / 2);
    assert!(
        matches!(early, Action::SendCertificate(Err(_))),
        "{early:?}"
    );
    // The refused request counts as well.
    let early = request(REQUEST_INTERVAL);
    assert!(
        matches!(early, Action::SendCertificate(Err(_))),
        "{early:?}"
    );
    assert_eq!(request(2 * REQUEST_INTERVAL), Action::Issue(vec![1]));

    let mut without = Lifecycle::new(false);
    let event = ServerEvent::CertificateRequest(vec![1]);
    let refused = without.handle(Input::Agent(event), at(Phase::Running));
    assert!(
        matches!(refused, Action::SendCertificate(Err(_))),
        "{refused:?}"
    );
}

#[test]
fn a_server_that_drains_tells_for_how_long() {
    let at = draining();
    let action = serving().handle(Input::PhaseChanged, at);
    assert_eq!(action, Action::Drain(Duration::from_secs(9)));
}

fn inputs() -> impl Strategy<Value = Vec<(u8, bool, bool)>> {
    let input = prop_oneof![
        // A session proceeds more often than by chance.
        3 => (0..4u8, any::<bool>(), Just(false)),
        1 => (0..12u8, any::<bool>(), any::<bool>()),
    ];
    proptest::collection::vec(input, 0..40)
}

fn input(number: u8, yes: bool) -> Input {
    match number {
        0 => Input::Agent(ServerEvent::Hello(hello())),
        1 => Input::ProcessFound(yes),
        2 => Input::Admitted(if yes { Ok(()) } else { Err("full".into()) }),
        3 => Input::Registered(yes.then(verdict)),
        4 => Input::Agent(ServerEvent::Offer(Vec::new())),
        5 => Input::Judged(yes.then(verdict)),
        6 => Input::Agent(if yes {
            ServerEvent::Silent
        } else {
            ServerEvent::Alive
        }),
        7 => Input::Agent(ServerEvent::CertificateRequest(vec![1])),
        8 => Input::Issued(Err("no".into())),
        9 => Input::Challenged,
        10 => Input::Replaced,
        _ => Input::PhaseChanged,
    }
}

proptest! {
    /// Checks any order of events: Welcome comes once at most, after the permit and the
    /// registration, each of which is requested once at most; nothing follows a refusal.
    #[test]
    fn a_session_keeps_its_order(inputs in inputs()) {
        let mut lifecycle = Lifecycle::new(true);
        let (mut admits, mut registers, mut welcomes, mut over) = (0, 0, 0, false);
        for (number, yes, drains) in inputs {
            let at = if drains { draining() } else { at(Phase::Running) };
            let action = lifecycle.handle(input(number, yes), at);
            assert!(!over || action == Action::Wait, "{action:?}");
            match action {
                Action::Admit => admits += 1,
                Action::Register(_) => registers += 1,
                Action::Welcome(..) => {
                    welcomes += 1;
                    assert!(number == 3 && yes);
                }
                Action::Refuse(..) => over = true,
                _ => {}
            }
            assert!(admits <= 1 && registers <= admits && welcomes <= registers);
        }
    }
}
