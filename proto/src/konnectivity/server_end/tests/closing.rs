//! The end of connections, from either side.

use super::*;

#[test]
fn what_came_before_the_close_is_read_before_the_end() {
    let mut bench = Bench::connected();
    bench.receive(data(1, b"he"));
    bench.receive(data(1, b""));
    bench.receive(data(1, b"llo"));
    bench.receive(closed(1));
    assert_eq!(bench.end.write_end(ONE), Some(WriteEnd::ClosedByTarget));
    assert_eq!(bench.end.connect_id(ONE), None);
    assert_eq!(bench.end.reset_reason(ONE), None);
    assert_eq!(bench.read(ONE), Ok(b"hello".to_vec()));
    assert_eq!(bench.read(ONE), Err(ReadEnd::Finished));
    bench.end.finish(ONE, bench.now);
    bench.end.release(ONE, bench.now);
    assert_eq!(bench.sent(), [], "it is closed already");
    assert_eq!(bench.end.ids.len(), 1);
}

#[test]
fn a_close_with_an_error_is_a_reset() {
    let mut bench = Bench::connected();
    bench.receive(Packet::CloseResponse {
        error: "unrecognized connectID".into(),
        connect_id: 1,
    });
    let reason = CloseReason::PeerReset;
    assert_eq!(bench.end.reset_reason(ONE), Some(reason));
    assert_eq!(bench.end.write_end(ONE), Some(WriteEnd::Reset(reason)));
    assert_eq!(bench.read(ONE), Err(ReadEnd::Reset(reason)));
}

const MOMENT: Duration = Duration::from_millis(1);

/// The client may or may not read on, and its target has begun to answer.
#[test]
fn the_rest_of_an_answer_is_waited_for_until_the_target_is_quiet() {
    let mut bench = Bench::connected();
    bench.end.sent(ONE, 5, bench.now);
    bench.receive(data(1, b"an "));
    bench.pass_answered(QUIET - MOMENT);
    bench.end.finish(ONE, bench.now);
    let barrier = bench.end.poll_transmit();
    assert!(matches!(barrier, Some(Packet::CloseRequest { connect_id }) if connect_id < 0));
    assert_eq!(bench.end.connect_id(ONE), None, "nothing more is sent");
    bench.receive(data(1, b"answer"));
    bench.pass(Duration::from_secs(4)).unwrap();
    assert_eq!(bench.sent(), [], "the agent has not taken everything");

    bench.receive(data(1, b""));
    bench.answer_barriers();
    bench.pass_answered(QUIET - MOMENT);
    bench.receive(data(1, b", the rest"));
    bench.pass_answered(QUIET - MOMENT);
    assert_eq!(bench.sent(), [], "the target was not quiet");
    bench.pass_answered(MOMENT);
    assert_eq!(bench.sent(), [close(1)]);
    assert_eq!(bench.end.write_end(ONE), None);

    bench.receive(closed(1));
    assert_eq!(bench.end.write_end(ONE), Some(WriteEnd::Closed));
    assert_eq!(bench.read(ONE), Ok(b"an answer, the rest".to_vec()));
    assert_eq!(bench.read(ONE), Err(ReadEnd::Finished));
}

/// All data within the documented time counts, with any delay and any pauses.
#[test]
fn an_answer_is_waited_for_where_none_has_come() {
    for known_to_read in [false, true] {
        let mut bench = Bench::connected();
        bench.end.sent(ONE, 5, bench.now);
        if known_to_read {
            bench.receive(data(1, b"more follows"));
            bench.pass_answered(QUIET * 3);
            bench.end.finish_half(ONE, bench.now);
        } else {
            bench.end.finish(ONE, bench.now);
        }
        bench.answer_barriers();
        for _ in 0..3 {
            bench.pass_answered(LINGER / 4);
            assert_eq!(bench.sent(), []);
            bench.receive(data(1, b"late"));
        }
        bench.pass_answered(LINGER / 4 - MOMENT);
        assert_eq!(bench.sent(), []);
        bench.pass_answered(MOMENT);
        assert_eq!(bench.sent(), [close(1)]);
    }
}

/// The target learns of the end as soon as the agent has taken everything off the stream.
#[test]
fn nothing_is_waited_for_where_nothing_is_under_way() {
    let idle = |bench: &mut Bench| {
        bench.end.sent(ONE, 5, bench.now);
        bench.receive(data(1, b"answered"));
        bench.pass_answered(QUIET);
        bench.end.finish(ONE, bench.now);
    };
    let left = |bench: &mut Bench| {
        bench.end.sent(ONE, 5, bench.now);
        bench.end.finish(ONE, bench.now);
        bench.end.stop(ONE, bench.now);
    };
    let left_before = |bench: &mut Bench| {
        bench.end.sent(ONE, 5, bench.now);
        bench.end.stop(ONE, bench.now);
        bench.end.finish(ONE, bench.now);
    };
    let goodbye = |bench: &mut Bench| {
        bench.end.sent(ONE, 5, bench.now);
        bench.end.note_session_end(ONE);
        bench.end.finish(ONE, bench.now);
    };
    let ways: [&dyn Fn(&mut Bench); 4] = [&idle, &left, &left_before, &goodbye];
    for (n, finish) in ways.into_iter().enumerate() {
        let mut bench = Bench::connected();
        finish(&mut bench);
        assert_eq!(bench.sent(), [], "{n}: the agent may hold something");
        bench.pass_answered(MOMENT);
        assert_eq!(bench.sent(), [close(1)], "{n}");
    }
}

/// A lingering connection whose client leaves waits no longer.
#[test]
fn a_client_that_leaves_ends_the_wait() {
    let mut bench = Bench::connected();
    bench.end.sent(ONE, 5, bench.now);
    bench.end.finish_half(ONE, bench.now);
    bench.pass_answered(LINGER / 2);
    assert_eq!(bench.sent(), []);
    bench.end.release(ONE, bench.now);
    assert_eq!(bench.sent(), [close(1)]);
    bench.pass_answered(LINGER);
    assert_eq!(bench.sent(), [], "it is told once");
    assert_eq!(bench.end.write_end(ONE), None, "and has its time to close");
    bench.receive(closed(1));
    assert_eq!(bench.end.connections.len(), 1);
}

/// A session that ended within the connection and goes on does expect answers.
#[test]
fn what_follows_a_goodbye_is_a_request() {
    let mut bench = Bench::connected();
    bench.end.note_session_end(ONE);
    bench.end.sent(ONE, 5, bench.now);
    bench.end.finish(ONE, bench.now);
    bench.pass_answered(LINGER - MOMENT);
    assert_eq!(bench.sent(), []);
    bench.pass_answered(MOMENT);
    assert_eq!(bench.sent(), [close(1)]);
}

#[test]
fn a_target_has_time_for_what_the_agent_may_hold() {
    let second = Duration::from_secs(1);
    for (sent, idle, takes) in [
        (2 * SLOWEST_TARGET as usize, Duration::ZERO, second * 2),
        (2 * SLOWEST_TARGET as usize, second, second),
        (2 * SLOWEST_TARGET as usize, second * 9, Duration::ZERO),
        (usize::MAX, Duration::ZERO, second * 75 / 16),
    ] {
        let mut bench = Bench::connected();
        bench.end.sent(ONE, sent, bench.now);
        bench.pass_answered(idle);
        bench.end.finish(ONE, bench.now);
        bench.end.stop(ONE, bench.now);
        bench.pass_answered(takes.saturating_sub(MOMENT));
        let early = takes.is_zero().then(|| close(1));
        assert_eq!(bench.sent(), Vec::from_iter(early), "{sent} {idle:?}");
        bench.pass_answered(MOMENT);
        let late = (!takes.is_zero()).then(|| close(1));
        assert_eq!(bench.sent(), Vec::from_iter(late), "{sent} {idle:?}");
    }
}

/// An agent that supports halves learns of the half at once, and of the whole when there is no
/// reader.
#[test]
fn an_agent_that_knows_of_halves_is_told_at_once() {
    let connected = || {
        let mut bench = Bench::connected();
        bench.end = bench.end.with_halves(true);
        bench.end.sent(ONE, 5, bench.now);
        bench
    };
    let mut bench = connected();
    bench.end.finish(ONE, bench.now);
    assert_eq!(bench.sent(), [data(1, b"")]);
    assert_eq!(bench.end.connect_id(ONE), None, "nothing more is sent");
    bench.pass_answered(LINGER * 10);
    bench.receive(data(1, b"much later"));
    assert_eq!(bench.sent(), []);
    bench.receive(closed(1));
    assert_eq!(bench.end.write_end(ONE), Some(WriteEnd::Closed));
    assert_eq!(bench.read(ONE), Ok(b"much later".to_vec()));
    assert_eq!(bench.read(ONE), Err(ReadEnd::Finished));

    let mut bench = connected();
    bench.end.finish_half(ONE, bench.now);
    bench.end.stop(ONE, bench.now);
    assert_eq!(bench.sent(), [data(1, b""), close(1)]);
    bench.end.release(ONE, bench.now);
    assert_eq!(bench.sent(), []);

    let mut bench = connected();
    bench.end.stop(ONE, bench.now);
    assert_eq!(bench.sent(), []);
    bench.end.finish(ONE, bench.now);
    assert_eq!(bench.sent(), [data(1, b""), close(1)]);

    for finished in [false, true] {
        let mut bench = connected();
        if finished {
            bench.end.finish(ONE, bench.now);
            bench.sent();
        }
        bench.end.reset(ONE, CloseReason::PeerReset, bench.now);
        assert_eq!(bench.sent(), [close(1)]);
    }
}

#[test]
fn an_agent_that_never_says_that_it_has_closed_is_not_waited_for() {
    let mut bench = Bench::connected();
    bench.end.finish(ONE, bench.now);
    bench.end.finish(TWO, bench.now);
    bench.end.release(TWO, bench.now);
    bench.pass_answered(QUIET);
    assert_eq!(bench.sent(), [close(2), close(1)]);
    bench.pass_answered(CLOSED_AFTER - Duration::from_millis(1));
    assert_eq!(bench.end.write_end(ONE), None);
    bench.pass_answered(QUIET * 2);
    let end = WriteEnd::Reset(CloseReason::ProtocolError);
    assert_eq!(bench.end.write_end(ONE), Some(end));
    assert_eq!(bench.sent(), [], "it was told already");
    bench.end.release(ONE, bench.now);
    assert!(bench.end.is_idle());
}

#[test]
fn a_target_that_never_stops_is_closed_all_the_same() {
    let mut bench = Bench::connected();
    let start = bench.now;
    bench.receive(data(1, b"tick"));
    bench.end.finish(ONE, bench.now);
    bench.answer_barriers();
    while bench.sent() != [close(1)] {
        bench.receive(data(1, b"tick"));
        assert!(bench.read(ONE).is_ok());
        bench.pass_answered(Duration::from_millis(100));
    }
    let took = bench.now - start;
    assert!((LINGER..LINGER + QUIET).contains(&took), "{took:?}");
}

#[test]
fn a_target_that_closes_meanwhile_has_closed_in_order() {
    let mut bench = Bench::connected();
    bench.end.finish(ONE, bench.now);
    bench.receive(closed(1));
    assert_eq!(bench.end.write_end(ONE), Some(WriteEnd::Closed));
    bench.pass_answered(LINGER);
    assert_eq!(bench.sent(), []);
}

#[test]
fn a_reset_closes_at_once_and_drops_what_follows() {
    let mut bench = Bench::connected();
    bench.receive(data(1, b"unread"));
    bench.end.reset(ONE, CloseReason::PeerReset, bench.now);
    assert_eq!(bench.sent(), [close(1)]);
    bench.receive(data(1, b"on its way"));
    bench.end.reset(ONE, CloseReason::PeerReset, bench.now);
    assert_eq!(bench.sent(), [], "it is told once, and answered nothing");
    let end = Err(ReadEnd::Reset(CloseReason::PeerReset));
    assert_eq!(bench.read(ONE), end);
    bench.receive(closed(1));
    assert_eq!(bench.read(ONE), end, "the first end stands");
    bench.end.release(ONE, bench.now);
    bench.pass_answered(HEARTBEAT_BUSY * 2);
    assert_eq!(bench.end.ids.len(), 1);
    assert_eq!(bench.end.connections.len(), 1);
}

#[test]
fn a_reset_while_it_lingers_cuts_that_short() {
    let mut bench = Bench::connected();
    bench.end.finish(ONE, bench.now);
    bench.end.reset(ONE, CloseReason::PeerReset, bench.now);
    assert_eq!(bench.sent(), [close(1)]);
    bench.pass_answered(LINGER);
    assert_eq!(bench.sent(), [], "it is not told again");
}

#[test]
fn an_agent_that_never_says_closed_leaves_nothing_behind() {
    let mut bench = Bench::connected();
    for dial in [ONE, TWO] {
        bench.end.release(dial, bench.now);
    }
    assert_eq!(bench.sent(), [close(1), close(2)]);
    assert!(bench.end.is_idle());
    bench.pass_answered(HEARTBEAT_IDLE * 2);
    assert!(bench.end.ids.is_empty() && bench.end.closing.is_empty());
}

#[test]
fn a_finished_connection_is_closed_in_order_though_nobody_waits() {
    let mut bench = Bench::connected();
    bench.end.finish(ONE, bench.now);
    bench.end.release(ONE, bench.now);
    assert_eq!(bench.sent(), []);
    bench.answer_barriers();
    bench.receive(data(1, b"unwanted"));
    bench.pass_answered(QUIET);
    assert_eq!(bench.sent(), [close(1)]);
    bench.receive(closed(1));
    assert_eq!(bench.end.connections.len(), 1);
    assert_eq!(bench.end.ids.len(), 1);
}

#[test]
fn a_lost_link_ends_everything_and_keeps_what_arrived() {
    let mut bench = Bench::connected();
    bench.end.dial(DialId(3), "w1:3".into(), "three").unwrap();
    bench.end.finish(TWO, bench.now);
    bench.end.release(TWO, bench.now);
    bench.receive(data(1, b"arrived"));
    bench.events();
    bench.end.close_all(CloseReason::LinkLost);
    assert_eq!(bench.events().len(), 3);
    assert_eq!(bench.read(ONE), Ok(b"arrived".to_vec()));
    let link = ReadEnd::Link(CloseReason::LinkLost);
    assert_eq!(bench.read(ONE), Err(link));
    assert_eq!(
        bench.end.write_end(ONE),
        Some(WriteEnd::Link(CloseReason::LinkLost))
    );
    assert_eq!(bench.end.answer(DialId(3)), Some(Answer::Ended(link)));
    bench.end.release(ONE, bench.now);
    bench.end.release(DialId(3), bench.now);
    assert!(bench.end.is_idle());
}
