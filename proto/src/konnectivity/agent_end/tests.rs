//! The agent's end against the rules of the protocol, and against any packets of a server.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;

const TARGET: &str = "10.0.0.1:10250";

fn dial(random: i64) -> Packet {
    Packet::DialRequest {
        protocol: "tcp".to_owned(),
        address: TARGET.to_owned(),
        random,
    }
}

fn dial_response(error: &str, connect_id: i64, random: i64) -> Packet {
    Packet::DialResponse {
        error: error.to_owned(),
        connect_id,
        random,
    }
}

fn data(connect_id: i64, bytes: usize) -> Packet {
    Packet::Data {
        connect_id,
        data: Bytes::from(vec![7; bytes]),
    }
}

fn close(connect_id: i64) -> Packet {
    Packet::CloseRequest { connect_id }
}

fn closed(error: &str, connect_id: i64) -> Packet {
    Packet::CloseResponse {
        error: error.to_owned(),
        connect_id,
    }
}

fn sent(agent: &mut AgentEnd) -> Vec<Packet> {
    std::iter::from_fn(|| agent.poll_transmit()).collect()
}

/// Returns an agent with open connections 1 to `n`, whose dials have the numbers from 101 on.
fn open(n: i64, now: Instant) -> AgentEnd {
    let mut agent = AgentEnd::default();
    for id in 1..=n {
        agent.handle(dial(100 + id), now);
        agent.dialled(id);
    }
    sent(&mut agent);
    agent
}

/// A server of ours ends its half alone. The target goes on until its end, or until its data has no
/// reader.
#[test]
fn a_half_ends_without_the_other() {
    let now = Instant::now();
    for target_ends in [true, false] {
        let mut agent = open(1, now).with_halves(true);
        agent.handle(data(1, 5), now);
        let half = agent.handle(data(1, 0), now);
        assert_eq!(half, Some(Command::FinishHalf { id: 1 }));
        assert_eq!(agent.handle(data(1, 0), now), None, "it ends once");
        assert_eq!(agent.handle(data(1, 3), now), None, "and nothing follows");
        agent.taken(1, 5, 1, now);
        assert_eq!(sent(&mut agent), []);
        if target_ends {
            agent.finish(1);
        } else {
            let whole = agent.handle(close(1), now);
            assert_eq!(whole, Some(Command::Finish { id: 1 }));
        }
        assert_eq!(sent(&mut agent), [closed("", 1)]);
        assert!(agent.is_empty());
    }
    // To any other server DATA without data says nothing.
    assert_eq!(open(1, now).handle(data(1, 0), now), None);
}

#[test]
fn every_dial_takes_the_next_id_whatever_becomes_of_it() {
    let now = Instant::now();
    let mut agent = AgentEnd::default();
    for (packet, id) in [(dial(11), 1), (dial(12), 2)] {
        let Some(Command::Dial {
            id: given,
            destination,
            ..
        }) = agent.handle(packet, now)
        else {
            panic!("no dial");
        };
        assert_eq!((given, destination.to_string().as_str()), (id, TARGET));
    }
    let refused = "dial tcp 10.0.0.1:10250: connect: connection refused";
    agent.dial_failed(1, refused.to_owned());
    agent.dialled(2);
    assert_eq!(
        sent(&mut agent),
        [dial_response(refused, 0, 11), dial_response("", 2, 12)]
    );

    let other = |protocol: &str, address: &str| Packet::DialRequest {
        protocol: protocol.to_owned(),
        address: address.to_owned(),
        random: 13,
    };
    for wrong in [
        other("udp", TARGET),
        other("tcp", "10.0.0.1"),
        other("tcp", "a b:1"),
    ] {
        assert_eq!(agent.handle(wrong, now), None);
        assert!(matches!(
            &sent(&mut agent)[..],
            [Packet::DialResponse { error, connect_id: 0, random: 13 }] if !error.is_empty()
        ));
    }
    assert!(matches!(
        agent.handle(dial(14), now),
        Some(Command::Dial {
            id: 6,
            random: 14,
            ..
        })
    ));
}

#[test]
fn ids_that_name_nothing_are_answered_as_the_peer_does() {
    let now = Instant::now();
    let mut agent = AgentEnd::default();
    agent.handle(dial(1), now);
    // A dial is no connection yet.
    for id in [1, 9, -1, i64::MAX] {
        assert_eq!(agent.handle(data(id, 1), now), None);
        assert_eq!(agent.handle(close(id), now), None);
        assert_eq!(
            sent(&mut agent),
            [
                closed("unrecognized connectID", id),
                closed("Unknown connectID", id)
            ]
        );
    }
    assert_eq!(agent.handle(data(0, 1), now), None);
    assert_eq!(sent(&mut agent), []);
}

#[test]
fn a_close_is_answered_at_once_and_loses_nothing_that_was_delivered() {
    let now = Instant::now();
    let mut agent = open(1, now);
    assert!(matches!(
        agent.handle(data(1, 10), now),
        Some(Command::Deliver { id: 1, data }) if data.len() == 10
    ));
    assert_eq!(agent.handle(close(1), now), Some(Command::Finish { id: 1 }));
    assert_eq!(sent(&mut agent), [closed("", 1)]);
    // The target's own end comes later, and has no effect.
    agent.taken(1, 10, 1, now);
    agent.finish(1);
    assert_eq!(sent(&mut agent), []);
    assert!(agent.is_empty());
}

#[test]
fn a_target_that_ends_is_reported_once() {
    let now = Instant::now();
    let mut agent = open(2, now);
    agent.finish(1);
    agent.reset(1, "late");
    agent.reset(2, "broken");
    assert_eq!(sent(&mut agent), [closed("", 1), closed("broken", 2)]);
    assert_eq!(agent.handle(close(1), now), None);
    assert_eq!(sent(&mut agent), [closed("Unknown connectID", 1)]);
}

#[test]
fn a_dial_is_given_up_by_its_number_before_and_after_its_answer() {
    let now = Instant::now();
    let mut agent = open(1, now);
    agent.handle(dial(102), now);
    let reason = CloseReason::Cancelled;
    let given_up = |id| Some(Command::Abort { id, reason });

    assert_eq!(
        agent.handle(Packet::CloseDial { random: 102 }, now),
        given_up(2)
    );
    agent.dialled(2);
    assert_eq!(sent(&mut agent), [], "nobody waits for the answer");

    assert_eq!(
        agent.handle(Packet::CloseDial { random: 101 }, now),
        given_up(1)
    );
    assert_eq!(sent(&mut agent), [closed("", 1)]);
    assert_eq!(agent.handle(Packet::CloseDial { random: 101 }, now), None);
}

#[test]
fn a_number_that_is_used_again_names_the_later_dial() {
    let now = Instant::now();
    let mut agent = AgentEnd::default();
    agent.handle(dial(5), now);
    agent.handle(dial(5), now);
    agent.dial_failed(1, "no".to_owned());
    assert_eq!(sent(&mut agent), [dial_response("no", 0, 5)]);
    assert!(matches!(
        agent.handle(Packet::CloseDial { random: 5 }, now),
        Some(Command::Abort { id: 2, .. })
    ));
}

#[test]
fn at_the_limits_dials_are_refused_in_words_that_servers_know() {
    let now = Instant::now();
    let limits = Limits {
        dials: 1,
        connections: 2,
    };
    let mut agent = AgentEnd::new(limits);
    let refused = |agent: &mut AgentEnd| {
        let [Packet::DialResponse { error, .. }] = &sent(agent)[..] else {
            panic!("no answer");
        };
        assert_eq!(text::reason(error), CloseReason::Overloaded, "{error}");
    };
    assert!(agent.handle(dial(1), now).is_some());
    assert_eq!(agent.handle(dial(2), now), None);
    refused(&mut agent);
    agent.dialled(1);
    assert!(agent.handle(dial(3), now).is_some());
    agent.dialled(3);
    sent(&mut agent);
    assert_eq!(agent.handle(dial(4), now), None);
    refused(&mut agent);
    agent.finish(1);
    sent(&mut agent);
    assert!(agent.handle(dial(5), now).is_some());
}

#[test]
fn a_target_that_takes_something_blocks_the_stream_and_one_that_does_not_is_reset() {
    let start = Instant::now();
    let mut agent = open(2, start);
    agent.handle(data(2, MAX_QUEUED - 2 * PACKET_COST), start);
    assert!(!agent.is_blocked());
    agent.handle(data(1, MAX_QUEUED), start);
    assert!(agent.is_blocked());

    // Slow, but on its way: a little every 9 s.
    let mut now = start;
    for _ in 0..5 {
        now += Duration::from_secs(9);
        assert_eq!(agent.handle_timeout(now), None);
        agent.taken(1, 8, 0, now);
        assert!(agent.is_blocked());
    }
    assert_eq!(agent.poll_timeout(), Some(now + STALL_TIMEOUT));
    // What another one takes is no progress of this one.
    agent.taken(2, 1000, 0, now + Duration::from_secs(5));
    now += STALL_TIMEOUT;
    let reason = CloseReason::Stalled;
    assert_eq!(
        agent.handle_timeout(now),
        Some(Command::Abort { id: 1, reason })
    );
    assert!(matches!(
        &sent(&mut agent)[..],
        [Packet::CloseResponse { error, connect_id: 1 }] if !error.is_empty()
    ));
    assert!(!agent.is_blocked());
    assert_eq!(agent.poll_timeout(), None);
    assert!(matches!(
        agent.handle(data(2, 1), now),
        Some(Command::Deliver { id: 2, .. })
    ));
}

#[test]
fn a_blocked_stream_goes_on_when_there_is_room_or_nobody_to_wait_for() {
    let now = Instant::now();
    let release: [fn(&mut AgentEnd, Instant); 4] = [
        |agent, now| agent.taken(1, MAX_QUEUED, 1, now),
        |agent, _| agent.stop(1),
        |agent, _| agent.finish(1),
        |agent, _| agent.reset(1, "broken"),
    ];
    for release in release {
        let mut agent = open(1, now);
        agent.handle(data(1, MAX_QUEUED), now);
        assert!(agent.is_blocked());
        release(&mut agent, now);
        assert!(!agent.is_blocked());
    }
}

#[test]
fn small_packets_count_with_the_memory_that_they_take() {
    let now = Instant::now();
    let mut agent = open(1, now);
    let mut packets = 0;
    while !agent.is_blocked() {
        agent.handle(data(1, 1), now);
        packets += 1;
    }
    assert!(packets <= MAX_QUEUED / PACKET_COST);
}

#[test]
fn a_target_that_takes_no_more_may_still_send() {
    let now = Instant::now();
    let mut agent = open(1, now);
    agent.stop(1);
    assert_eq!(agent.handle(data(1, 10), now), None);
    assert_eq!(sent(&mut agent), []);
    agent.finish(1);
    assert_eq!(sent(&mut agent), [closed("", 1)]);
}

#[test]
fn a_drain_is_said_once_and_dials_go_on() {
    let now = Instant::now();
    let mut agent = AgentEnd::default();
    agent.drain();
    agent.drain();
    assert_eq!(sent(&mut agent), [Packet::Drain]);
    assert!(agent.handle(dial(1), now).is_some());
}

#[test]
fn what_is_not_for_an_agent_is_ignored() {
    let now = Instant::now();
    let mut agent = open(1, now);
    for packet in [
        dial_response("", 1, 1),
        closed("", 1),
        Packet::Drain,
        Packet::Unknown(99),
    ] {
        assert_eq!(agent.handle(packet, now), None);
    }
    assert_eq!(sent(&mut agent), []);
    assert_eq!(agent.len(), 1);
}

/// One event of a server, a target or the clock.
#[derive(Debug, Clone)]
enum Step {
    Packet(Packet),
    Dialled(i64),
    Failed(i64),
    Taken(i64, usize),
    Stop(i64),
    Finish(i64),
    Reset(i64),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let id = -1..12_i64;
    prop_oneof![
        (0..6_i64).prop_map(|random| Step::Packet(dial(random))),
        (0..6_i64).prop_map(|random| Step::Packet(Packet::CloseDial { random })),
        (id.clone(), 0..3 * MAX_QUEUED / 4).prop_map(|(id, n)| Step::Packet(data(id, n))),
        id.clone().prop_map(|id| Step::Packet(close(id))),
        id.clone().prop_map(Step::Dialled),
        id.clone().prop_map(Step::Failed),
        (id.clone(), 0..MAX_QUEUED).prop_map(|(id, n)| Step::Taken(id, n)),
        id.clone().prop_map(Step::Stop),
        id.clone().prop_map(Step::Finish),
        id.prop_map(Step::Reset),
        (0..8_u64).prop_map(Step::Wait),
    ]
}

proptest! {
    /// For any order of events: dials get one answer, connections end once, no data reaches an
    /// ended one, every close gets an answer, the counts balance, and the stream is not blocked
    /// without end.
    #[test]
    fn any_order_of_events(steps in proptest::collection::vec(step(), 0..200)) {
        let limits = Limits { dials: 3, connections: 6 };
        let mut agent = AgentEnd::new(limits);
        let mut now = Instant::now();
        // By id: what is owed an answer, and what lives.
        let mut dialling = HashMap::new();
        let mut open = HashSet::new();
        for step in steps {
            let asked = matches!(step, Step::Packet(Packet::DialRequest { .. }));
            let close = match step {
                Step::Packet(Packet::CloseRequest { connect_id }) => Some(connect_id),
                _ => None,
            };
            let failed = match step {
                Step::Failed(id) | Step::Reset(id) => id,
                _ => 0,
            };
            let command = match step {
                // A driver reads nothing then.
                Step::Packet(_) if agent.is_blocked() => continue,
                Step::Packet(packet) => agent.handle(packet, now),
                Step::Dialled(id) => { agent.dialled(id); None }
                Step::Failed(id) => { agent.dial_failed(id, "no".to_owned()); None }
                Step::Taken(id, n) => { agent.taken(id, n, 1, now); None }
                Step::Stop(id) => { agent.stop(id); None }
                Step::Finish(id) => { agent.finish(id); None }
                Step::Reset(id) => { agent.reset(id, "broken"); None }
                Step::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    agent.handle_timeout(now)
                }
            };
            let packets = sent(&mut agent);
            prop_assert!(packets.len() <= 1);
            if asked && packets.is_empty() {
                prop_assert!(
                    matches!(command, Some(Command::Dial { .. })),
                    "a dial is begun or refused"
                );
            }
            if let Some(id) = close {
                let answered = matches!(
                    packets[..],
                    [Packet::CloseResponse { connect_id, .. }] if connect_id == id
                );
                prop_assert!(answered);
            }
            match &command {
                Some(Command::Dial { id, random, .. }) => {
                    prop_assert!(dialling.insert(*id, *random).is_none());
                }
                Some(Command::Deliver { id, data }) => {
                    prop_assert!(open.contains(id) && !data.is_empty());
                }
                Some(Command::FinishHalf { .. }) => prop_assert!(false, "it knows of no halves"),
                Some(Command::Finish { id }) => prop_assert!(open.remove(id)),
                Some(Command::Abort { id, .. }) => {
                    prop_assert!(open.remove(id) || dialling.remove(id).is_some());
                }
                None => {}
            }
            match &packets[..] {
                [Packet::DialResponse { connect_id, random, error }] if error.is_empty() => {
                    prop_assert_eq!(dialling.remove(connect_id), Some(*random));
                    prop_assert!(open.insert(*connect_id));
                }
                // Of a dial that failed, or that was never begun.
                [Packet::DialResponse { random, .. }] if !asked => {
                    prop_assert_eq!(dialling.remove(&failed), Some(*random));
                }
                [Packet::CloseResponse { connect_id, .. }] => drop(open.remove(connect_id)),
                _ => {}
            }
            prop_assert_eq!(agent.len(), dialling.len() + open.len());
            prop_assert_eq!(agent.dials, dialling.len());
            prop_assert!(agent.dials <= limits.dials && agent.len() <= limits.connections);
            prop_assert!(agent.by_random.len() <= agent.len());
            prop_assert_eq!(agent.poll_timeout().is_some(), agent.is_blocked());
            if let Some(blocked) = &agent.blocked {
                prop_assert!(agent.connections[&blocked.id].queued >= MAX_QUEUED);
                prop_assert!(blocked.until > now && blocked.until <= now + STALL_TIMEOUT);
            }
        }
        now += STALL_TIMEOUT;
        agent.handle_timeout(now);
        prop_assert!(!agent.is_blocked());
    }
}
