//! The connector's decisions, one at a time.

use std::time::Duration;

use super::*;
use cpc_config::TunnelKind;
use tunnel_proto::session::InstanceId;

const NAME: &str = "cp.example:8132";
const A: ([u8; 4], u16) = ([10, 0, 0, 1], 8132);
const B: ([u8; 4], u16) = ([10, 0, 0, 2], 8132);

/// A connector with its clock.
struct Agent {
    connector: Connector,
    now: Instant,
}

impl Agent {
    /// One name leads to `addresses`; they are being dialled as 1, 2 and so on.
    fn new(protocol: Protocol, addresses: &[([u8; 4], u16)]) -> Self {
        let connector = Connector::new([(NAME.into(), protocol)], 1, false);
        let now = Instant::now();
        let mut agent = Self { connector, now };
        agent.resolve(Ok(addresses));
        agent
    }

    fn resolve(&mut self, answer: Result<&[([u8; 4], u16)], &str>) -> Vec<Action> {
        let answer = answer.map(|addresses| addresses.iter().map(|at| (*at).into()).collect());
        let answer = answer.map_err(ToOwned::to_owned);
        self.handle(Event::Resolved(NAME.into(), answer))
    }

    fn handle(&mut self, event: Event) -> Vec<Action> {
        self.connector.handle(event, self.now, 0.5);
        std::iter::from_fn(|| self.connector.poll_action()).collect()
    }

    fn after(&mut self, time: Duration) -> Vec<Action> {
        self.now += time;
        self.handle(Event::Timeout)
    }

    fn welcome(&mut self, number: u64, server: &str, instance: u8) -> Vec<Action> {
        self.handle(Event::Welcomed(number, info(server, instance)))
    }

    fn end(&mut self, number: u64, reason: CloseReason) -> Vec<Action> {
        self.handle(Event::Ended(number, TunnelEnd::new(reason, "test")))
    }
}

fn info(server: &str, instance: u8) -> ServerInfo {
    ServerInfo {
        server: server.into(),
        instance: Some(InstanceId([instance; 16])),
        server_count: 1,
    }
}

fn dials(actions: &[Action]) -> Vec<(u64, ServerEndpoint, u8)> {
    let dial = |action: &Action| match action {
        Action::Dial(dial) => Some((dial.number, dial.endpoint, dial.slot)),
        _ => None,
    };
    actions.iter().filter_map(dial).collect()
}

fn quic(address: ([u8; 4], u16)) -> ServerEndpoint {
    ServerEndpoint {
        address: address.into(),
        kind: TunnelKind::Quic,
    }
}

#[test]
fn a_resolved_server_is_dialled_introduced_and_kept() {
    let mut agent = Agent::new(Protocol::Quic, &[]);
    let actions = agent.resolve(Ok(&[A]));
    assert_eq!(dials(&actions), [(1, quic(A), 0)]);
    let [Action::Dial(Dial { server, .. })] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert_eq!(&**server, NAME);
    let actions = agent.handle(Event::Reached(1, "s1".into()));
    assert!(matches!(actions[..], [Action::Introduce(1)]), "{actions:?}");
    let actions = agent.welcome(1, "s1", 1);
    assert!(matches!(actions[..], [Action::Keep(1)]), "{actions:?}");
    assert!(agent.connector.has_tunnels());
    assert_eq!(agent.connector.server_count(), 1);
    assert_eq!(agent.connector.poll_timeout(), None);
}

#[test]
fn a_second_way_to_one_process_is_declined_before_it_is_introduced() {
    let mut agent = Agent::new(Protocol::Quic, &[A, B]);
    agent.welcome(1, "s1", 1);
    let actions = agent.welcome(2, "s1", 1);
    assert!(matches!(actions[..], [Action::Decline(2)]), "{actions:?}");
    agent.end(1, CloseReason::LinkLost);
    let dialled = dials(&agent.after(Duration::from_secs(2)));
    assert_eq!(dialled, [(3, quic(A), 0), (4, quic(B), 0)]);
    agent.welcome(3, "s1", 1);
    let actions = agent.handle(Event::Reached(4, "s1".into()));
    assert!(matches!(actions[..], [Action::Decline(4)]), "{actions:?}");
}

#[test]
fn two_servers_with_one_id_are_a_complaint() {
    let mut agent = Agent::new(Protocol::Quic, &[A, B]);
    agent.welcome(1, "s1", 1);
    let actions = agent.welcome(2, "s1", 2);
    let [
        Action::Log(Notice::NotReached { error, .. }),
        Action::Decline(2),
    ] = &actions[..]
    else {
        panic!("{actions:?}");
    };
    assert_eq!(
        error,
        "10.0.0.1:8132 is a server s1 too; give each an id of its own"
    );
}

#[test]
fn an_error_is_logged_once_and_again_after_a_success() {
    let mut agent = Agent::new(Protocol::Quic, &[A]);
    let mut number = 1;
    let mut fail = |agent: &mut Agent| {
        let actions = agent.handle(Event::Failed(number, format!("no answer from {number}")));
        let dialled = dials(&agent.after(Duration::from_secs(20)));
        number = dialled[0].0;
        let logged = |action: &Action| matches!(action, Action::Log(Notice::NotReached { .. }));
        (actions.iter().filter(|it| logged(it)).count(), number)
    };
    assert_eq!(fail(&mut agent).0, 1);
    let (logged, number) = fail(&mut agent);
    assert_eq!(logged, 0);
    agent.welcome(number, "s1", 1);
    agent.end(number, CloseReason::LinkLost);
    let dialled = dials(&agent.after(Duration::from_secs(20)));
    let failed = Event::Failed(dialled[0].0, "no answer from 9".into());
    let actions = agent.handle(failed);
    assert!(matches!(
        actions[..],
        [Action::Log(Notice::NotReached {
            is_reached: false,
            ..
        })]
    ));
}

#[test]
fn a_resolver_that_fails_is_logged_once_and_changes_nothing() {
    let mut agent = Agent::new(Protocol::Quic, &[A]);
    let actions = agent.resolve(Err("timed out"));
    let [Action::Log(Notice::Unresolved { error, .. })] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert_eq!(error, "timed out");
    assert!(agent.resolve(Err("timed out")).is_empty());
    agent.handle(Event::Failed(1, "lost".into()));
    assert_eq!(dials(&agent.after(Duration::from_secs(2))).len(), 1);
    agent.resolve(Ok(&[A]));
    assert_eq!(agent.resolve(Err("timed out")).len(), 1);
}

#[test]
fn a_foreign_tunnel_is_retired_once_where_a_native_one_does_the_same() {
    let mut agent = Agent::new(Protocol::Auto, &[A]);
    let dialled = dials(&agent.after(Duration::from_secs(1)));
    let [(foreign, endpoint, _)] = dialled[..] else {
        panic!("{dialled:?}");
    };
    assert_eq!(endpoint.kind, TunnelKind::Konnectivity);
    let mut server = info("s1", 1);
    server.instance = None;
    agent.handle(Event::Welcomed(foreign, server));
    let actions = agent.welcome(1, "s1", 1);
    let [
        Action::Keep(1),
        Action::Log(Notice::Superseded { .. }),
        Action::Retire(retired),
    ] = actions[..]
    else {
        panic!("{actions:?}");
    };
    assert_eq!(retired, foreign);
    let actions = agent.handle(Event::Changed(foreign, Health::Live));
    assert!(actions.is_empty(), "{actions:?}");
}

#[test]
fn a_silent_tunnel_that_was_replaced_is_retired_when_it_is_heard_again() {
    let mut agent = Agent::new(Protocol::Quic, &[A]);
    agent.welcome(1, "s1", 1);
    agent.handle(Event::Changed(1, Health::Silent));
    let dialled = dials(&agent.after(Duration::from_secs(2)));
    assert_eq!(dialled, [(2, quic(A), 1)]);
    agent.welcome(2, "s1", 1);
    let actions = agent.handle(Event::Changed(1, Health::Live));
    assert!(matches!(actions[..], [Action::Retire(1)]), "{actions:?}");
    let actions = agent.end(1, CloseReason::Replaced);
    assert!(matches!(
        actions[..],
        [Action::Log(Notice::Ended {
            is_intended: true,
            ..
        })]
    ));
}

/// Two silent tunnels are more than the one that is wanted: both lose their place to a third.
#[test]
fn no_silent_tunnel_keeps_a_place_that_another_needs() {
    let mut agent = Agent::new(Protocol::Quic, &[A, B]);
    agent.welcome(1, "s1", 1);
    agent.handle(Event::Changed(1, Health::Draining));
    agent.welcome(2, "s1", 1);
    agent.handle(Event::Changed(1, Health::Silent));
    agent.handle(Event::Changed(2, Health::Silent));
    let dialled = dials(&agent.after(Duration::from_secs(2)));
    agent.welcome(dialled[0].0, "s1", 1);
    let actions = agent.handle(Event::Changed(2, Health::Live));
    assert!(matches!(actions[..], [Action::Retire(2)]), "{actions:?}");
}

#[test]
fn a_draining_agent_keeps_what_it_has_and_dials_nothing() {
    let mut agent = Agent::new(Protocol::Quic, &[A, B]);
    agent.welcome(1, "s1", 1);
    agent.handle(Event::Draining);
    agent.handle(Event::Failed(2, "lost".into()));
    agent.end(1, CloseReason::LinkLost);
    assert_eq!(agent.connector.poll_timeout(), None);
    assert!(agent.after(Duration::from_secs(60)).is_empty());
}

#[test]
fn an_ending_agent_closes_its_tunnels_and_declines_late_ones() {
    let mut agent = Agent::new(Protocol::Quic, &[A, B]);
    agent.welcome(1, "s1", 1);
    let actions = agent.handle(Event::Stopping(CloseReason::Draining));
    assert!(matches!(
        actions[..],
        [Action::Close(1, CloseReason::Draining)]
    ));
    let actions = agent.welcome(2, "s2", 2);
    assert!(matches!(actions[..], [Action::Decline(2)]), "{actions:?}");
    agent.end(1, CloseReason::Draining);
    assert!(!agent.connector.has_tunnels());
}
