//! Dials: each ends, and packets that fit no dial are answered or ignored.

use super::*;

#[test]
fn a_dial_asks_for_tcp_and_its_answer_names_the_connection() {
    let mut bench = Bench::new();
    bench.end.dial(ONE, "[fd00::1]:443".into(), "one").unwrap();
    assert_eq!(
        bench.sent(),
        [Packet::DialRequest {
            protocol: "tcp".into(),
            address: "[fd00::1]:443".into(),
            random: 1,
        }]
    );
    assert_eq!(bench.end.answer(ONE), None);
    assert_eq!(bench.end.connect_id(ONE), None);
    bench.receive(dialled(ONE, 7));
    assert_eq!(bench.events(), [Event::Changed("one")]);
    assert_eq!(bench.end.answer(ONE), Some(Answer::Connected));
    assert_eq!(bench.end.connect_id(ONE), Some(7));
}

#[test]
fn an_id_is_not_used_twice_at_once() {
    let mut bench = Bench::new();
    bench.end.dial(ONE, "w1:1".into(), "one").unwrap();
    let again = bench.end.dial(ONE, "w1:2".into(), "again");
    assert_eq!(again, Err(InUse(ONE)));
    assert_eq!(bench.sent().len(), 1);
    bench.end.release(ONE, bench.now);
    assert_eq!(bench.end.dial(ONE, "w1:2".into(), "again"), Ok(()));
}

#[test]
fn a_failed_dial_says_why() {
    let failed = |error: &str| Packet::DialResponse {
        error: error.into(),
        connect_id: 0,
        random: 1,
    };
    let taken = |id| dialled(ONE, id);
    for (answer, why) in [
        (failed("connection refused"), "connection refused"),
        (Packet::CloseDial { random: 1 }, "cancelled the dial"),
        (taken(0), "connect id 0"),
        (taken(-1), "connect id -1"),
        (taken(2), "connect id 2"),
    ] {
        let mut bench = Bench::new();
        bench.end.dial(TWO, "w1:2".into(), "two").unwrap();
        bench.receive(dialled(TWO, 2));
        bench.end.dial(ONE, "w1:1".into(), "one").unwrap();
        bench.receive(answer);
        let Some(Answer::Failed(text)) = bench.end.answer(ONE) else {
            panic!("{:?}", bench.end.answer(ONE));
        };
        assert!(text.contains(why), "{text}");
        bench.sent();
        bench.end.release(ONE, bench.now);
        assert_eq!(bench.sent(), [], "there is nothing to close");
        assert_eq!(bench.end.answer(TWO), Some(Answer::Connected));
        assert_eq!(bench.end.connect_id(TWO), Some(2));
    }
}

#[test]
fn a_long_excuse_is_cut() {
    let mut bench = Bench::new();
    bench.end.dial(ONE, "w1:1".into(), "one").unwrap();
    bench.receive(Packet::DialResponse {
        error: "\u{fc}".repeat(100_000),
        connect_id: 0,
        random: 1,
    });
    let Some(Answer::Failed(text)) = bench.end.answer(ONE) else {
        panic!("{:?}", bench.end.answer(ONE));
    };
    assert_eq!(text, "\u{fc}".repeat(2048), "4 KiB, in whole characters");
}

#[test]
fn an_answer_that_nobody_waits_for_is_closed() {
    let mut bench = Bench::new();
    bench.end.dial(ONE, "w1:1".into(), "one").unwrap();
    bench.sent();
    bench.end.release(ONE, bench.now);
    assert_eq!(bench.sent(), [Packet::CloseDial { random: 1 }]);
    bench.receive(dialled(ONE, 5));
    assert_eq!(bench.sent(), [close(5)]);
    // What the target says first is not worth another word.
    bench.receive(data(5, b"hello"));
    assert_eq!(bench.sent(), []);
    bench.receive(closed(5));
    bench.answer_barriers();
    assert!(bench.end.is_idle());
    bench.pass_answered(HEARTBEAT_IDLE);
    assert!(bench.end.ids.is_empty() && bench.end.closing.is_empty());
}

#[test]
fn a_failure_that_nobody_waits_for_is_ignored() {
    let mut bench = Bench::new();
    bench.sent();
    bench.receive(Packet::DialResponse {
        error: "connection refused".into(),
        connect_id: 0,
        random: 9,
    });
    bench.receive(Packet::CloseDial { random: 9 });
    assert_eq!(bench.sent(), []);
}

#[test]
fn a_second_answer_does_not_disturb_the_connection() {
    let mut bench = Bench::connected();
    bench.receive(dialled(ONE, 2));
    bench.receive(dialled(ONE, 1));
    assert_eq!(bench.sent(), [], "both are in use");
    bench.receive(dialled(ONE, 3));
    assert_eq!(bench.sent(), [close(3)]);
    bench.receive(data(1, b"x"));
    assert_eq!(bench.read(ONE), Ok(b"x".to_vec()));
}

#[test]
fn data_of_strangers_is_answered_once() {
    let mut bench = Bench::connected();
    bench.receive(data(0, b"none"));
    bench.receive(data(-1, b"a barrier"));
    bench.receive(closed(77));
    assert_eq!(bench.sent(), []);
    bench.receive(data(77, b"x"));
    bench.receive(data(77, b"y"));
    assert_eq!(bench.sent(), [close(77)]);
}

#[test]
fn what_no_agent_sends_is_ignored() {
    let mut bench = Bench::connected();
    bench.receive(Packet::Unknown(99));
    bench.receive(close(1));
    bench.receive(Packet::DialRequest {
        protocol: "tcp".into(),
        address: "control-plane:22".into(),
        random: 3,
    });
    assert_eq!(bench.sent(), []);
    assert_eq!(bench.events(), []);
    assert_eq!(bench.end.connect_id(ONE), Some(1));
}

#[test]
fn an_agent_may_not_name_strangers_for_ever() {
    let mut bench = Bench::connected();
    let mut id = 1000;
    let error = loop {
        id += 1;
        // It closes each as told, which must not make room for the next.
        let answered = bench.end.handle_packet(data(id, b"x"), bench.now);
        if let Err(error) = answered {
            break error;
        }
        bench.receive(closed(id));
        assert!(bench.end.ids.len() <= MAX_CLOSING + 2);
        assert!(bench.end.closing.len() <= MAX_CLOSING);
    };
    assert_eq!(error, StreamError::Flood);
    assert_eq!(error.reason(), CloseReason::ProtocolError);
}

#[test]
fn an_agent_drains() {
    let mut bench = Bench::connected();
    bench.receive(Packet::Drain);
    assert_eq!(bench.events(), [Event::Draining]);
    assert_eq!(bench.end.connect_id(ONE), Some(1), "what lives goes on");
}
