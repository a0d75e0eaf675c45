//! Each rule of a session by itself.

use std::time::Duration;

use super::pair::{LATENCY, Pair, hello, welcome};
use crate::close::CloseReason;
use crate::control::envelope::Message;
use crate::control::{self, Envelope, FrameError, Ping, Statistics, Version, encode};
use crate::route::{Claim, ClaimError, MAX_CLAIMS};
use crate::session::*;

const SECOND: Duration = Duration::from_secs(1);

fn frame(message: impl Into<Option<Message>>) -> Vec<u8> {
    encode(&Envelope {
        message: message.into(),
    })
    .unwrap()
    .to_vec()
}

fn claims(count: usize) -> Vec<Claim> {
    let names = (0..count).map(|n| format!("{}.{n}-svc", "a".repeat(60)).parse().unwrap());
    names.map(Claim::Name).collect()
}

/// Returns the server's reply to a session that begins with these bytes.
fn server_error(bytes: &[u8]) -> SessionError {
    let mut pair = Pair::new(usize::MAX);
    pair.server.handle_bytes(bytes, pair.now).unwrap_err()
}

#[test]
fn certificates_are_asked_for_and_answered_in_order() {
    use crate::certificate::{Issued, MAX_CSR};
    let mut pair = Pair::established(usize::MAX);
    for csr in [vec![1; MAX_CSR], vec![2]] {
        pair.agent.request_certificate(csr).unwrap();
    }
    pair.run(2 * LATENCY).unwrap();
    let asked = [vec![1; MAX_CSR], vec![2]].map(ServerEvent::CertificateRequest);
    let told: Vec<_> = pair
        .server_events
        .drain(..)
        .map(|(_, event)| event)
        .collect();
    assert_eq!(told, asked);
    let issued = Issued {
        chain: vec![vec![3; 800]],
        roots: vec![vec![4; 800], vec![5; 800]],
    };
    let answers = [Ok(issued), Err("this server issues none".to_owned())];
    for answer in &answers {
        pair.server.certificate(answer).unwrap();
    }
    pair.run(2 * LATENCY).unwrap();
    let told: Vec<_> = pair
        .agent_events
        .drain(..)
        .map(|(_, event)| event)
        .collect();
    assert_eq!(told, answers.map(AgentEvent::Certificate));
}

#[test]
fn a_request_out_of_bounds_or_turn_ends_the_session() {
    use crate::certificate::MAX_CSR;
    use crate::control::{CertificateRequest, JoinRequest};
    let request = |length| {
        frame(Message::CertificateRequest(CertificateRequest {
            csr: vec![0; length],
        }))
    };
    let mut pair = Pair::established(usize::MAX);
    let error = pair.server.handle_bytes(&request(MAX_CSR + 1), pair.now);
    assert!(matches!(error, Err(SessionError::Invalid { .. })));
    let before_hello = server_error(&request(1));
    assert_eq!(before_hello, SessionError::OutOfTurn("CertificateRequest"));
    let mut pair = Pair::established(usize::MAX);
    let join = frame(Message::JoinRequest(JoinRequest::default()));
    let error = pair.server.handle_bytes(&join, pair.now);
    assert_eq!(error, Err(SessionError::OutOfTurn("JoinRequest")));
}

#[test]
fn neither_side_waits_for_ever() {
    for silent_agent in [true, false] {
        let mut pair = Pair::new(usize::MAX);
        pair.to_server.dead = silent_agent;
        pair.to_agent.dead = !silent_agent;
        let error = pair.run(60 * SECOND).unwrap_err();
        assert_eq!(error, SessionError::HandshakeTimeout);
        assert_eq!(error.reason(), CloseReason::HandshakeTimeout);
        assert_eq!(pair.now - pair.start, 5 * SECOND);
    }
}

#[test]
fn a_server_that_decides_is_waited_for_by_the_agent_only() {
    let mut pair = Pair::new(usize::MAX);
    pair.welcoming = false;
    assert_eq!(pair.run(60 * SECOND), Err(SessionError::HandshakeTimeout));
    assert_eq!(pair.agent.poll_timeout(), None, "the agent gave up");
    assert_eq!(pair.server.poll_timeout(), None);
}

#[test]
fn a_refusal_ends_the_session() {
    let mut pair = Pair::new(usize::MAX);
    pair.welcoming = false;
    pair.run(2 * LATENCY).unwrap();
    let error = pair
        .server
        .refuse(CloseReason::IdentityRefused, "unknown trust domain");
    assert_eq!(error.reason(), CloseReason::IdentityRefused);
    assert_eq!(error.to_string(), "refused: unknown trust domain");
    pair.server.welcome(welcome(), pair.now).unwrap();
    assert_eq!(pair.server.poll_transmit(), None);
    assert_eq!(pair.server.poll_timeout(), None);
    pair.server
        .handle_bytes(&[0xff; 8], pair.now)
        .expect("a closed session ignores bytes");
}

#[test]
fn a_living_peer_is_never_silent_and_its_distance_is_known() {
    let mut pair = Pair::established(usize::MAX);
    pair.agent.note_traffic(pair.now);
    pair.run(600 * SECOND).unwrap();
    assert_eq!(pair.agent_events, []);
    assert_eq!(pair.server_events, []);
    assert_eq!(pair.agent.rtt(), Some(2 * LATENCY));
    assert_eq!(pair.server.rtt(), Some(2 * LATENCY));
    assert!(pair.now - pair.server.last_heard() <= 2 * SECOND);
}

#[test]
fn a_dead_peer_is_silent_sooner_with_traffic() {
    // The pair is established two latencies after the server heard the Hello.
    let at_once = 7 * SECOND + 2 * LATENCY;
    for (traffic, limit) in [
        (None, 10 * SECOND),
        (Some(0), 5 * SECOND / 2),
        (Some(2), 5 * SECOND / 2),
        (Some(7), at_once),
        (Some(12), 10 * SECOND),
    ] {
        let mut pair = Pair::established(usize::MAX);
        pair.to_server.dead = true;
        let heard = pair.server.last_heard();
        if let Some(traffic) = traffic {
            pair.run(traffic * SECOND).unwrap();
            pair.server.note_traffic(pair.now);
        }
        pair.run(60 * SECOND).unwrap();
        let silent = pair.start + pair.server_events[0].0;
        assert_eq!(silent - heard, limit, "{traffic:?}");
        assert_eq!(pair.server_events.len(), 1);
        assert_eq!(pair.server_events[0].1, ServerEvent::Silent);
    }
}

#[test]
fn a_dead_peer_that_is_challenged_is_silent_within_the_limit() {
    for limit in [SECOND, LATENCY] {
        let mut pair = Pair::established(usize::MAX);
        pair.run(60 * SECOND).unwrap();
        pair.to_server.dead = true;
        let asked = pair.now;
        pair.server.challenge(limit, asked);
        // A further one changes nothing.
        pair.run(LATENCY).unwrap();
        pair.server.challenge(limit, pair.now);
        pair.run(60 * SECOND).unwrap();
        let [(at, ServerEvent::Silent)] = pair.server_events[..] else {
            panic!("{:?}", pair.server_events);
        };
        // A path that takes longer is left its three round trips of twice the latency.
        let limit = limit.max(6 * LATENCY);
        assert_eq!(pair.start + at - asked, limit);
    }
}

#[test]
fn a_living_peer_that_is_challenged_answers() {
    let mut pair = Pair::established(usize::MAX);
    for _ in 0..10 {
        pair.server.challenge(SECOND, pair.now);
        pair.run(SECOND / 3).unwrap();
    }
    pair.run(60 * SECOND).unwrap();
    assert_eq!(pair.server_events, []);

    let mut early = Pair::new(usize::MAX);
    early.server.challenge(Duration::ZERO, early.now);
    early.run(SECOND).unwrap();
    let is_silent = |(_, event): &(_, ServerEvent)| *event == ServerEvent::Silent;
    assert!(!early.server_events.iter().any(is_silent));
}

#[test]
fn traffic_of_long_ago_does_not_count() {
    let Timers {
        silent_busy,
        silent_idle,
        ..
    } = Timers::default();
    for (ago, limit) in [(7, silent_busy), (8, silent_idle)] {
        let mut pair = Pair::established(usize::MAX);
        pair.server.note_traffic(pair.now);
        // Something is heard this long after the traffic, and nothing more.
        pair.run(ago * SECOND).unwrap();
        pair.to_server.dead = true;
        pair.server.handle_bytes(&frame(None), pair.now).unwrap();
        let heard = pair.now;
        pair.run(60 * SECOND).unwrap();
        let silent = pair.start + pair.server_events[0].0;
        assert_eq!(silent - heard, limit, "{ago}");
    }
}

#[test]
fn a_peer_that_is_heard_again_is_alive() {
    let mut pair = Pair::established(usize::MAX);
    pair.to_agent.stalled = true;
    pair.run(20 * SECOND).unwrap();
    pair.to_agent.stalled = false;
    pair.run(20 * SECOND).unwrap();
    let events: Vec<_> = pair.agent_events.iter().map(|(_, event)| event).collect();
    assert_eq!(events, [&AgentEvent::Silent, &AgentEvent::Alive]);
    assert_eq!(pair.server_events, [], "the other direction was up");
}

#[test]
fn the_agent_meets_a_wish_for_a_shorter_heartbeat_only() {
    for (wish, expected) in [(0, 2000), (500, 500), (1, 100), (60_000, 2000)] {
        let now = std::time::Instant::now();
        let mut agent = AgentSession::new(hello(), Timers::default(), now).unwrap();
        let heartbeat = Duration::from_millis(wish);
        let welcome = Welcome {
            heartbeat,
            ..welcome()
        };
        agent
            .handle_bytes(&frame(Message::Welcome((&welcome).into())), now)
            .unwrap();
        assert_eq!(
            agent.poll_timeout(),
            Some(now + Duration::from_millis(expected)),
            "{wish}"
        );
    }
}

#[test]
fn what_is_said_early_waits_for_the_welcome() {
    let mut pair = Pair::new(1);
    pair.agent.offer(claims(2)).unwrap();
    pair.agent.drain(SECOND, CloseReason::Shutdown).unwrap();
    pair.server.drain(2 * SECOND, CloseReason::Drained).unwrap();
    pair.run(10 * LATENCY).unwrap();

    let deadline = pair.start + 3 * LATENCY + SECOND;
    assert_eq!(
        pair.server_events,
        [
            (LATENCY, ServerEvent::Hello(hello())),
            (3 * LATENCY, ServerEvent::Offer(claims(2))),
            (
                3 * LATENCY,
                ServerEvent::Draining {
                    deadline,
                    reason: CloseReason::Shutdown
                }
            ),
        ]
    );
    let deadline = pair.start + 2 * LATENCY + 2 * SECOND;
    let verdict = AgentEvent::Verdict {
        accepted: claims(2),
        refused: Vec::new(),
    };
    assert_eq!(
        pair.agent_events,
        [
            (2 * LATENCY, AgentEvent::Welcomed(welcome())),
            (
                2 * LATENCY,
                AgentEvent::Draining {
                    deadline,
                    reason: CloseReason::Drained
                }
            ),
            (4 * LATENCY, verdict),
        ]
    );
}

#[test]
fn statistics_arrive() {
    let mut pair = Pair::established(usize::MAX);
    let statistics = Statistics {
        active_connections: 3,
        dials: 9,
        ..Statistics::default()
    };
    pair.agent.statistics(statistics).unwrap();
    pair.run(LATENCY).unwrap();
    assert_eq!(
        pair.server_events,
        [(4 * LATENCY, ServerEvent::Statistics(statistics))]
    );
}

#[test]
fn a_drain_for_an_unknown_reason_is_a_drain() {
    let mut pair = Pair::established(usize::MAX);
    let drain = control::Drain {
        deadline_ms: u32::MAX,
        reason: 0x4ff,
    };
    pair.agent
        .handle_bytes(&frame(Message::Drain(drain)), pair.now)
        .unwrap();
    let deadline = pair.now + Duration::from_millis(u32::MAX.into());
    let reason = CloseReason::Drained;
    assert_eq!(
        pair.agent.poll_event(),
        Some(AgentEvent::Draining { deadline, reason })
    );
}

#[test]
fn unknown_messages_are_life_signs_and_nothing_else() {
    let mut pair = Pair::new(usize::MAX);
    pair.server.handle_bytes(&frame(None), pair.now).unwrap();
    let mut pair = Pair::established(usize::MAX);
    pair.run(SECOND).unwrap();
    // Message 100 of a later release.
    pair.agent
        .handle_bytes(b"\x05\xa2\x06\x02\x08\x01", pair.now)
        .unwrap();
    assert_eq!(pair.agent.last_heard(), pair.now);
    assert_eq!(pair.agent.poll_event(), None);
    assert_eq!(pair.agent.poll_transmit(), None);
}

#[test]
fn another_major_version_is_refused_whatever_else_it_says() {
    let version = Version { major: 2, minor: 7 };
    let strange = control::Hello {
        version: Some(version),
        ..control::Hello::default()
    };
    let error = server_error(&frame(Message::Hello(strange)));
    assert_eq!(error, SessionError::UnsupportedVersion(version));
    assert_eq!(error.reason(), CloseReason::UnsupportedVersion);

    let mut pair = Pair::new(usize::MAX);
    let strange = Welcome {
        version,
        ..welcome()
    };
    let error = pair
        .agent
        .handle_bytes(&frame(Message::Welcome((&strange).into())), pair.now)
        .unwrap_err();
    assert_eq!(error, SessionError::UnsupportedVersion(version));

    let later = Hello {
        version: Version { major: 1, minor: 9 },
        ..hello()
    };
    let mut pair = Pair::new(usize::MAX);
    pair.server
        .handle_bytes(&frame(Message::Hello((&later).into())), pair.now)
        .unwrap();
    assert_eq!(pair.server.poll_event(), Some(ServerEvent::Hello(later)));
}

#[test]
fn messages_out_of_turn_end_the_session() {
    let hello = || Message::Hello((&hello()).into());
    let ping = || Message::Ping(Ping { seq: 1 });
    assert_eq!(
        server_error(&frame(ping())),
        SessionError::OutOfTurn("Ping")
    );
    let twice = [frame(hello()), frame(hello())].concat();
    assert_eq!(server_error(&twice), SessionError::OutOfTurn("Hello"));
    let hasty = [
        frame(hello()),
        frame(Message::Routes(control::Routes::default())),
    ]
    .concat();
    assert_eq!(server_error(&hasty), SessionError::OutOfTurn("Routes"));

    let mut pair = Pair::established(usize::MAX);
    let error = pair
        .agent
        .handle_bytes(&frame(hello()), pair.now)
        .unwrap_err();
    assert_eq!(error, SessionError::OutOfTurn("Hello"));
    assert_eq!(error.reason(), CloseReason::ProtocolError);
    let statistics = frame(Message::Statistics(Statistics::default()));
    pair.agent
        .handle_bytes(&statistics, pair.now)
        .expect("a closed session ignores bytes");
}

#[test]
fn fields_are_bounded() {
    let good = || control::Hello::from(&hello());
    let error = |hello| match server_error(&frame(Message::Hello(hello))) {
        SessionError::Invalid {
            message: "Hello",
            error,
        } => error,
        other => panic!("{other}"),
    };
    let length = MAX_TEXT + 1;
    assert_eq!(
        error(control::Hello {
            node: "n".repeat(length),
            ..good()
        }),
        MessageError::TextTooLong {
            field: "the node",
            length
        }
    );
    assert_eq!(
        error(control::Hello {
            agent_id: "a\nb".to_owned(),
            ..good()
        }),
        MessageError::ControlCharacters {
            field: "the agent's id"
        }
    );
    assert_eq!(
        error(control::Hello {
            instance_id: vec![0; 15],
            ..good()
        }),
        MessageError::InstanceId(15)
    );
    assert_eq!(
        error(control::Hello {
            predecessor: vec![0; 17],
            ..good()
        }),
        MessageError::InstanceId(17)
    );
    assert_eq!(
        error(control::Hello {
            features: vec![String::new(); MAX_FEATURES + 1],
            ..good()
        }),
        MessageError::TooManyFeatures(MAX_FEATURES + 1)
    );
    let offer = control::Offer {
        names: vec!["a".to_owned(); MAX_CLAIMS + 1],
        ..Default::default()
    };
    assert_eq!(
        error(control::Hello {
            offer: Some(offer),
            ..good()
        }),
        MessageError::Claim(ClaimError::TooMany(MAX_CLAIMS + 1))
    );

    let mut pair = Pair::new(usize::MAX);
    let none = Welcome {
        server_count: 0,
        ..welcome()
    };
    let error = pair
        .agent
        .handle_bytes(&frame(Message::Welcome((&none).into())), pair.now);
    let expected = SessionError::Invalid {
        message: "Welcome",
        error: MessageError::NoServers,
    };
    assert_eq!(error, Err(expected));
}

#[test]
fn an_oversized_message_is_refused_at_its_length() {
    let error = server_error(&[0x80, 0x01, 0x00, 0x01]);
    assert_eq!(error, SessionError::Frame(FrameError::TooLong(65_537)));
    assert_eq!(error.reason(), CloseReason::ProtocolError);
}

#[test]
fn an_offer_that_does_not_fit_is_not_sent_and_does_no_harm() {
    let mut pair = Pair::established(usize::MAX);
    let error = pair.agent.offer(claims(1000)).unwrap_err();
    assert!(matches!(error, SessionError::Unsendable(_)), "{error}");
    pair.agent.offer(claims(500)).unwrap();
    pair.run(3 * LATENCY).unwrap();
    assert_eq!(
        pair.server_events,
        [(4 * LATENCY, ServerEvent::Offer(claims(500)))]
    );
    assert_eq!(pair.agent_events.len(), 1);

    let greedy = Hello {
        offer: claims(1000),
        ..hello()
    };
    let error = AgentSession::new(greedy, Timers::default(), pair.now).unwrap_err();
    assert!(matches!(error, SessionError::Unsendable(_)), "{error}");
}

#[test]
fn refusals_that_do_not_fit_are_left_out() {
    let refused = vec![
        Refusal {
            claim: "c".repeat(300),
            why: "w\n".repeat(200)
        };
        5000
    ];
    let wire = control::Welcome::from(&Welcome {
        refused,
        accepted: claims(100),
        ..welcome()
    });
    let mut pair = Pair::new(usize::MAX);
    pair.agent
        .handle_bytes(&frame(Message::Welcome(wire)), pair.now)
        .unwrap();
    let Some(AgentEvent::Welcomed(welcome)) = pair.agent.poll_event() else {
        panic!()
    };
    assert_eq!(welcome.accepted, claims(100));
    assert!(
        (50..200).contains(&welcome.refused.len()),
        "{}",
        welcome.refused.len()
    );
    assert_eq!(welcome.refused[0].claim, "c".repeat(MAX_TEXT));
    assert!(welcome.refused[0].why.starts_with("w?w?"));
}

#[test]
fn a_peer_that_does_not_read_its_answers_is_left() {
    let mut pair = Pair::established(usize::MAX);
    let pings = frame(Message::Ping(Ping { seq: u64::MAX })).repeat(1000);
    let mut sent = 0;
    let error = loop {
        sent += pings.len();
        assert!(sent < 2 * MAX_QUEUED, "the queue grows without bound");
        if let Err(error) = pair.server.handle_bytes(&pings, pair.now) {
            break error;
        }
    };
    assert_eq!(error, SessionError::Backlog);
    assert_eq!(error.reason(), CloseReason::ProtocolError);
    let queued: usize = std::iter::from_fn(|| pair.server.poll_transmit())
        .map(|b| b.len())
        .sum();
    assert!(queued <= MAX_QUEUED);
}

#[test]
fn a_peer_that_reads_its_answers_may_ask_for_ever() {
    let mut pair = Pair::established(usize::MAX);
    let pings = frame(Message::Ping(Ping { seq: u64::MAX })).repeat(1000);
    for _ in 0..(2 * MAX_QUEUED / pings.len()) {
        pair.server.handle_bytes(&pings, pair.now).unwrap();
        assert_eq!(
            std::iter::from_fn(|| pair.server.poll_transmit()).count(),
            1000
        );
    }
}

#[test]
fn a_late_or_invented_pong_does_not_change_the_round_trip_time() {
    let mut pair = Pair::established(usize::MAX);
    let pong = |seq| frame(Message::Pong(control::Pong { seq }));
    pair.agent.handle_bytes(&pong(0), pair.now).unwrap();
    pair.agent.handle_bytes(&pong(9), pair.now).unwrap();
    assert_eq!(pair.agent.rtt(), None);
    pair.run(60 * SECOND).unwrap();
    let asked = (1..100).map(pong);
    asked.for_each(|pong| pair.agent.handle_bytes(&pong, pair.now).unwrap());
    assert_eq!(pair.agent.rtt(), Some(2 * LATENCY));
}
