//! Memory that a peer may make the other end hold.

use std::future::ready;

use futures_util::FutureExt;

use super::*;

const TUNNEL: u64 = 4 << 20;

async fn bounded(bytes: u64) -> (Pair, Budget) {
    let budget = Budget::new(bytes);
    let memory = MemoryBounds::new(budget.clone(), TUNNEL);
    (Pair::within(memory, ready).await, budget)
}

/// Fills a stream's window, without a reader.
async fn pour(pair: &Pair, send: &mut Send) {
    let mut much = pattern(8 << 20, 1);
    while much.len() > (7 << 20) + 1000 {
        let sent = timeout(Duration::from_millis(10), send.send(&mut much)).await;
        if let Ok(end) = sent {
            return assert!(end.is_err());
        }
    }
    // Until all of it has come.
    let (mut before, mut same) = (0, 0);
    while same < 5 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let held = pair.agent.held();
        same = if held == before && held > 0 {
            same + 1
        } else {
            0
        };
        before = held;
    }
}

#[test]
fn what_waits_for_a_reader_is_charged_and_given_back() {
    run_alone(async || {
        let (pair, budget) = bounded(1 << 30).await;
        let ((mut send, _recv), (_agents_send, mut agents_recv)) = pair.stream().await;
        pour(&pair, &mut send).await;
        let held = budget.used();
        assert!((1 << 20..2 << 20).contains(&held), "{held}");
        take(&mut agents_recv, 1 << 19).await.unwrap();
        drop((send, agents_recv));
        tokio::task::yield_now().await;
        assert!(budget.used() < 1 << 20, "{}", budget.used());
    });
}

/// The stream that holds most ends at the bound of a tunnel, with the reason; the others go on.
#[test]
fn a_tunnel_that_holds_too_much_loses_its_largest_stream() {
    run_alone(async || {
        let (pair, budget) = bounded(1 << 30).await;
        let mut stopped = Vec::new();
        for _ in 0..6 {
            let mut stream = pair.stream().await;
            pour(&pair, &mut stream.0.0).await;
            stopped.push(stream);
        }
        assert!(budget.used() <= TUNNEL, "{}", budget.used());
        let (mut server, mut agent) = pair.stream().await;
        server.0.send(&mut pattern(100_000, 2)).await.unwrap();
        assert!(take(&mut agent.1, 100_000).await.unwrap() == pattern(100_000, 2));
        let mut ended = 0;
        for ((send, mut recv), (agents_send, mut agents_recv)) in stopped {
            let over = RecvEnd::Reset(CloseReason::MemoryLimit);
            if take(&mut agents_recv, 1).await == Err(over) {
                ended += 1;
                assert_eq!(agents_recv.reset().now_or_never(), None);
                let end = SendEnd::Stopped(CloseReason::MemoryLimit);
                assert_eq!(agents_send.stopped().await, end);
                assert_eq!(send.stopped().await, end);
                assert_eq!(take(&mut recv, 1).await, Err(over));
            }
        }
        assert!((2..=4).contains(&ended), "{ended}");
    });
}

#[test]
fn a_full_budget_leaves_tunnels_that_hold_little() {
    run_alone(async || {
        let (pair, budget) = bounded(2 << 20).await;
        let mut stopped = pair.stream().await;
        pour(&pair, &mut stopped.0.0).await;
        let mut other = pair.stream().await;
        pour(&pair, &mut other.0.0).await;
        assert!(budget.used() <= 2 << 20);
        let (mut server, mut agent) = pair.stream().await;
        server.0.send(&mut pattern(10_000, 2)).await.unwrap();
        assert!(take(&mut agent.1, 10_000).await.unwrap() == pattern(10_000, 2));
    });
}

/// Streams that are given up while their peer still sends count until it has ended them.
#[test]
fn streams_that_are_given_up_and_ended_leave_nothing() {
    run_alone(async || {
        let (pair, budget) = bounded(1 << 30).await;
        for _ in 0..2000 {
            let (server, agent) = pair.stream().await;
            drop(server);
            drop(agent);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        let (mut server, mut agent) = pair.stream().await;
        server.0.send(&mut pattern(100, 2)).await.unwrap();
        take(&mut agent.1, 100).await.unwrap();
        assert_eq!(budget.used(), 0);
    });
}

/// A stream that its peer stops after it was finished, and before all of it has arrived, is reset.
#[test]
fn a_stream_that_is_stopped_after_its_end_is_reset() {
    run(async |pair| {
        let ((mut send, _recv), (_agents_send, agents_recv)) = pair.stream().await;
        // All of it is taken at once, and more than goes into the first flight of packets.
        send.go_first();
        send.send(&mut pattern(500_000, 1)).await.unwrap();
        send.finish();
        drop(agents_recv);
        let end = SendEnd::Stopped(CloseReason::Aborted);
        assert_eq!(send.stopped().await, end);
        assert_eq!(pair.agent.resets(), 0);
        drop(send);
        for _ in 0..500 {
            if pair.agent.resets() == 1 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not reset");
    });
}
