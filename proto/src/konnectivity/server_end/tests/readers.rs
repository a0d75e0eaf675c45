//! Slow and stopped readers.

use super::*;

const CHUNK: &[u8] = &[7; 4096];

/// Fills the queue of [`ONE`], and returns the number of bytes.
fn fill(bench: &mut Bench) -> usize {
    let mut filled = 0;
    while bench.end.wants_packets() {
        bench.receive(data(1, CHUNK));
        filled += CHUNK.len();
    }
    bench.events();
    filled
}

#[test]
fn a_full_queue_holds_the_stream_until_there_is_room() {
    let mut bench = Bench::connected();
    let filled = fill(&mut bench);
    assert!((RECEIVE_QUEUE * 9 / 10..=RECEIVE_QUEUE + CHUNK.len()).contains(&filled));
    let mut read = 0;
    while !bench.end.wants_packets() {
        read += bench.read(ONE).unwrap().len();
    }
    assert!(read < RECEIVE_QUEUE / 4, "it goes on before all is read");
    bench.receive(closed(1));
    while let Ok(bytes) = bench.read(ONE) {
        read += bytes.len();
    }
    assert_eq!(read, filled);
}

#[test]
fn small_chunks_count_for_what_they_cost() {
    let mut bench = Bench::connected();
    let mut chunks = 0;
    while bench.end.wants_packets() {
        bench.receive(data(1, b"x"));
        chunks += 1;
    }
    assert!(chunks < RECEIVE_QUEUE / 32);
}

#[test]
fn a_reader_that_stops_loses_its_connection_and_no_other() {
    let mut bench = Bench::connected();
    fill(&mut bench);
    bench
        .pass(STALLED_AFTER - Duration::from_millis(1))
        .unwrap();
    assert!(!bench.end.wants_packets());
    bench.pass(Duration::from_millis(1)).unwrap();
    assert!(bench.end.wants_packets());
    assert_eq!(
        bench.events(),
        [Event::Stalled("one"), Event::Changed("one")]
    );
    assert_eq!(bench.end.reset_reason(ONE), Some(CloseReason::Stalled));
    assert_eq!(bench.sent(), [close(1)]);
    bench.receive(data(1, CHUNK));
    bench.receive(data(2, b"goes on"));
    assert_eq!(bench.read(TWO), Ok(b"goes on".to_vec()));
}

#[test]
fn a_slow_reader_keeps_its_connection() {
    let mut bench = Bench::connected();
    // Longer chunks than are read at once would be: the queue stays full for several reads.
    bench.receive(Packet::Data {
        connect_id: 1,
        data: vec![0; 8].into(),
    });
    for _ in 0..40 {
        bench.receive(Packet::Data {
            connect_id: 1,
            data: vec![0; RECEIVE_QUEUE / 40].into(),
        });
        if !bench.end.wants_packets() {
            break;
        }
    }
    for _ in 0..3 {
        bench.pass(STALLED_AFTER / 2).unwrap();
        assert_eq!(bench.end.reset_reason(ONE), None);
        bench.read(ONE).unwrap();
        fill(&mut bench);
    }
    bench.pass(STALLED_AFTER).unwrap();
    assert_eq!(bench.end.reset_reason(ONE), Some(CloseReason::Stalled));
}

#[test]
fn a_client_that_leaves_lets_the_stream_go_on() {
    let leave: [fn(&mut Bench); 3] = [
        |bench| bench.end.reset(ONE, CloseReason::PeerReset, bench.now),
        |bench| bench.end.release(ONE, bench.now),
        |bench| bench.end.stop(ONE, bench.now),
    ];
    for leave in leave {
        let mut bench = Bench::connected();
        fill(&mut bench);
        leave(&mut bench);
        assert!(bench.end.wants_packets());
        bench.receive(data(1, CHUNK));
        let unread = bench.end.connections.get(&ONE);
        assert!(unread.is_none_or(|connection| !connection.is_full()));
    }
}

#[test]
fn what_a_held_stream_hides_is_no_silence() {
    let mut bench = Bench::connected();
    bench.end.finish(TWO, bench.now);
    bench.pass(SILENT_AFTER - Duration::from_secs(1)).unwrap();
    fill(&mut bench);
    bench.pass(STALLED_AFTER - Duration::from_secs(1)).unwrap();
    assert_eq!(bench.events(), []);
    while !bench.end.wants_packets() {
        bench.read(ONE).unwrap();
    }
    bench.pass(SILENT_AFTER - Duration::from_secs(1)).unwrap();
    assert_eq!(bench.events(), []);
    bench.pass(Duration::from_secs(1)).unwrap();
    assert_eq!(bench.events(), [Event::Silent]);
}

#[test]
fn what_a_held_stream_hides_is_no_quiet() {
    let mut bench = Bench::connected();
    bench.end.finish(TWO, bench.now);
    bench.answer_barriers();
    fill(&mut bench);
    bench.pass(Duration::from_secs(5)).unwrap();
    while !bench.end.wants_packets() {
        bench.read(ONE).unwrap();
    }
    bench.pass_answered(QUIET / 2);
    assert_eq!(
        bench.sent(),
        [],
        "its answer may stand behind what was held"
    );
    bench.receive(data(2, b"here it is"));
    bench.pass_answered(QUIET);
    assert_eq!(bench.sent(), [close(2)]);
    assert_eq!(bench.read(TWO), Ok(b"here it is".to_vec()));
}
