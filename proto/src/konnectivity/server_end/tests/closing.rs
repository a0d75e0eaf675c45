//! How connections end, from either side.

use super::*;

#[test]
fn what_came_before_the_close_is_read_before_the_end() {
    let mut bench = Bench::connected();
    bench.receive(data(1, b"he"));
    bench.receive(data(1, b""));
    bench.receive(data(1, b"llo"));
    bench.receive(closed(1));
    assert_eq!(bench.end.write_end(ONE), Some(WriteEnd::Gone));
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

#[test]
fn an_end_of_file_waits_for_the_barrier_and_for_quiet() {
    let mut bench = Bench::connected();
    bench.end.finish(ONE, bench.now);
    let barrier = bench.end.poll_transmit();
    assert_eq!(barrier, Some(close(-2)));
    assert_eq!(bench.end.connect_id(ONE), None, "nothing more is sent");
    bench.pass(Duration::from_secs(4)).unwrap();
    assert_eq!(bench.sent(), [], "the agent has not taken everything");

    bench.receive(closed(-2));
    bench.pass_answered(QUIET - Duration::from_millis(1));
    bench.receive(data(1, b"an answer"));
    bench.pass_answered(QUIET - Duration::from_millis(1));
    assert_eq!(bench.sent(), [], "the target was not quiet");
    bench.pass_answered(Duration::from_millis(1));
    assert_eq!(bench.sent(), [close(1)]);
    assert_eq!(bench.end.write_end(ONE), None);

    bench.receive(data(1, b", the rest"));
    bench.receive(closed(1));
    assert_eq!(bench.end.write_end(ONE), Some(WriteEnd::Closed));
    assert_eq!(bench.read(ONE), Ok(b"an answer, the rest".to_vec()));
    assert_eq!(bench.read(ONE), Err(ReadEnd::Finished));
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
        bench.pass_answered(takes + QUIET - Duration::from_millis(1));
        assert_eq!(bench.sent(), [], "{sent} {idle:?}");
        bench.pass_answered(Duration::from_millis(1));
        assert_eq!(bench.sent(), [close(1)], "{sent} {idle:?}");
    }
}

#[test]
fn an_agent_that_never_says_that_it_has_closed_is_not_waited_for() {
    let mut bench = Bench::connected();
    bench.end.finish(ONE, bench.now);
    bench.end.finish(TWO, bench.now);
    bench.end.release(TWO, bench.now);
    bench.pass_answered(QUIET);
    assert_eq!(bench.sent(), [close(1), close(2)]);
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
