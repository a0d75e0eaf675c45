//! Stuck agents, and idle ones.

use super::*;

#[test]
fn an_agent_is_asked_at_once_and_lives_by_its_answer() {
    let mut bench = Bench::new();
    assert_eq!(bench.end.poll_transmit(), Some(close(-1)));
    assert_eq!(bench.events(), []);
    for wrong in [-2, i64::MIN, 1] {
        bench.receive(closed(wrong));
        assert_eq!(bench.events(), [], "{wrong} was not asked");
    }
    bench.receive(closed(-1));
    assert_eq!(bench.events(), [Event::Alive]);
    bench.receive(closed(-1));
    assert_eq!(bench.events(), [], "once");
}

#[test]
fn an_idle_agent_is_asked_now_and_then() {
    let mut bench = Bench::new();
    bench.receive(closed(-1));
    bench.end.poll_transmit();
    for seq in 2..5 {
        bench.pass(HEARTBEAT_IDLE).unwrap();
        assert_eq!(bench.end.poll_transmit(), Some(close(-seq)));
        assert_eq!(bench.end.poll_transmit(), None);
        bench.receive(closed(-seq));
    }
}

#[test]
fn a_dial_to_an_idle_agent_asks_at_once() {
    let mut bench = Bench::new();
    bench.receive(closed(-1));
    bench.events();
    bench.pass(HEARTBEAT_BUSY).unwrap();
    bench.end.dial(ONE, "w1:1".into(), "one").unwrap();
    bench.pass(SILENT_AFTER).unwrap();
    assert_eq!(bench.events(), [Event::Silent]);
}

#[test]
fn a_wedged_agent_is_silent_within_seconds_and_lost_within_a_minute() {
    let mut bench = Bench::connected();
    bench.pass(HEARTBEAT_BUSY + SILENT_AFTER).unwrap();
    assert_eq!(bench.events(), [Event::Silent]);
    // What comes from targets says nothing of whether the agent still takes packets.
    bench.receive(data(1, b"x"));
    assert_eq!(bench.events(), [Event::Changed("one")]);
    let mut asked = 0;
    while let Some(packet) = bench.end.poll_transmit() {
        assert_eq!(packet, close(-2));
        asked += 1;
    }
    assert_eq!(asked, 1, "one question is enough");
    let lost = bench.pass(LOST_AFTER);
    assert_eq!(lost, Err(StreamError::Lost));
    assert_eq!(StreamError::Lost.reason(), CloseReason::IdleTimeout);
}

#[test]
fn an_agent_comes_back() {
    let mut bench = Bench::connected();
    bench.pass(LOST_AFTER - Duration::from_secs(1)).unwrap();
    assert_eq!(bench.events(), [Event::Silent]);
    bench.answer_barriers();
    assert_eq!(bench.events(), [Event::Alive]);
    bench.pass_answered(LOST_AFTER * 2);
    assert_eq!(bench.events(), []);
}
