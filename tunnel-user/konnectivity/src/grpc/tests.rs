//! Both sides over a pair of Unix sockets: order, credit, and every way to end.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{pending, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::net::UnixStream;
use tokio::sync::{Notify, oneshot};
use tokio::task::{LocalSet, spawn_local};
use tunnel_proto::konnectivity::{CONNECT, DecodeError, MAX_DATA, MAX_MESSAGE, Packet, data_head};

use super::client::{CallError, Channel, Opened, handshake};
use super::server::{Call, serve};
use super::*;
use cpc_datapath::Budget;

const PATIENCE: Duration = Duration::from_secs(10);

/// Within which nothing more happens: what was to happen has happened.
const QUIET: Duration = Duration::from_millis(100);

const SETTINGS: Settings = Settings::AGENT;

/// The calls that a server was made.
#[derive(Clone, Default)]
struct Calls {
    waiting: Rc<RefCell<VecDeque<Call>>>,
    came: Rc<Notify>,
}

impl Calls {
    async fn next(&self) -> Call {
        loop {
            if let Some(call) = self.waiting.borrow_mut().pop_front() {
                return call;
            }
            self.came.notified().await;
        }
    }
}

/// A connection; `stopping` is the server's.
async fn connect(stopping: impl Future<Output = ()> + 'static) -> (Channel, Calls) {
    let (near, far) = UnixStream::pair().unwrap();
    let calls = Calls::default();
    let given = calls.clone();
    spawn_local(async move {
        let on_call = move |call| {
            given.waiting.borrow_mut().push_back(call);
            given.came.notify_one();
        };
        // A client that leaves is an error here, and no matter.
        let _ = serve(far, &SETTINGS, CONNECT, stopping, on_call).await;
    });
    let (channel, driver) = handshake(near, &SETTINGS, "server:8091").await.unwrap();
    spawn_local(driver);
    (channel, calls)
}

/// A call on a connection of its own: what either side holds of it.
async fn call() -> (Opened, (PacketSender, PacketReceiver)) {
    let (mut channel, calls) = connect(pending()).await;
    let server = async { calls.next().await.accept(&[]).unwrap() };
    let (opened, server) = tokio::join!(channel.open(CONNECT, &[], PATIENCE), server);
    (opened.unwrap(), server)
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        timeout(3 * PATIENCE, test).await.unwrap();
    });
}

fn data(connect_id: i64, length: usize) -> Packet {
    Packet::Data {
        connect_id,
        data: vec![7; length].into(),
    }
}

/// Sends until the peer gives no more credit; returns how many bytes left.
async fn send_until_blocked(sender: &mut PacketSender, rest: &mut Bytes) -> usize {
    let before = rest.len();
    assert!(timeout(QUIET, sender.send(rest)).await.is_err());
    before - rest.len()
}

#[test]
fn headers_come_at_once_and_the_status_last() {
    run(async {
        let (mut channel, calls) = connect(pending()).await;
        let server = async {
            let call = calls.next().await;
            assert_eq!(call.metadata("agentid").collect::<Vec<_>>(), ["a", "b"]);
            call.accept(&[("serverid", "s"), ("servercount", "2")])
                .unwrap()
        };
        let metadata = [("agentid", "a"), ("agentid", "b")];
        let opened = channel.open(CONNECT, &metadata, PATIENCE);
        let (opened, (mut sender, mut receiver)) = tokio::join!(opened, server);
        let mut opened = opened.unwrap();
        assert_eq!(opened.headers["serverid"], "s");
        assert_eq!(opened.headers["servercount"], "2");

        opened
            .sender
            .send(&mut Packet::Drain.frame())
            .await
            .unwrap();
        assert_eq!(receiver.next().await.unwrap(), Some(Packet::Drain));
        opened.sender.finish(&Status::ok());
        assert_eq!(receiver.next().await.unwrap(), None);

        sender.send(&mut data(1, 9).frame()).await.unwrap();
        sender.finish(&Status::new(Code::UNAVAILABLE, "gone"));
        drop((sender, receiver));
        assert_eq!(opened.receiver.next().await.unwrap(), Some(data(1, 9)));
        let end = opened.receiver.next().await.unwrap_err();
        assert!(matches!(end, StreamEnd::Status(s) if s == Status::new(Code::UNAVAILABLE, "gone")));
    });
}

#[test]
fn a_receiver_that_takes_nothing_stops_its_sender_until_it_does() {
    run(async {
        let (mut opened, (_sender, mut receiver)) = call().await;
        let all = 200;
        let mut rest = BytesMut::new();
        for _ in 0..all {
            rest.put(data(1, MAX_DATA).frame());
        }
        let mut rest = rest.freeze();
        let sent = send_until_blocked(&mut opened.sender, &mut rest).await;
        assert!(sent >= SETTINGS.stream_window as usize);
        assert!(sent <= SETTINGS.stream_window as usize + SEND_BUFFER);

        // Credit returns with what is taken, and with no more than that.
        for _ in 0..16 {
            assert_eq!(receiver.next().await.unwrap(), Some(data(1, MAX_DATA)));
        }
        let more = send_until_blocked(&mut opened.sender, &mut rest).await;
        assert!((1..=16 * (MAX_DATA + 100)).contains(&more), "{more}");

        let taken = async {
            for _ in 16..all {
                assert_eq!(receiver.next().await.unwrap(), Some(data(1, MAX_DATA)));
            }
        };
        let (sent, ()) = tokio::join!(opened.sender.send(&mut rest), taken);
        sent.unwrap();
    });
}

#[test]
fn a_message_may_be_longer_than_the_window_but_not_too_long() {
    run(async {
        let (mut opened, (_sender, mut receiver)) = call().await;
        let long = data(1, MAX_MESSAGE - 100);
        let mut frame = long.frame();
        let (sent, received) = tokio::join!(opened.sender.send(&mut frame), receiver.next());
        sent.unwrap();
        assert_eq!(received.unwrap(), Some(long));

        let mut head = data_head(1, MAX_MESSAGE);
        opened.sender.send(&mut head).await.unwrap();
        let end = receiver.next().await.unwrap_err();
        assert!(matches!(end, StreamEnd::Packet(DecodeError::TooLong(_))));
        assert_eq!(end.reason(), CloseReason::ProtocolError);
    });
}

#[test]
fn a_message_that_is_not_complete_is_charged() {
    run(async {
        let (mut opened, (_sender, mut receiver)) = call().await;
        let budget = Budget::new(1 << 30);
        receiver.charge_to(&budget);
        let mut frame = data(1, MAX_MESSAGE - 100).frame();
        let (sent, received) = tokio::join!(opened.sender.send(&mut frame), receiver.next());
        sent.unwrap();
        assert!(received.unwrap().is_some());
        assert_eq!(budget.used(), 0);

        let budget = Budget::new(1 << 20);
        receiver.charge_to(&budget);
        let mut frame = data(2, MAX_MESSAGE - 100).frame();
        let sends = async {
            let _ = opened.sender.send(&mut frame).await;
        };
        let end = tokio::select! {
            end = receiver.next() => end.unwrap_err(),
            () = sends => unreachable!("it has no credit for all of it"),
        };
        assert!(matches!(end, StreamEnd::NoMemory), "{end}");
        assert_eq!(end.reason(), CloseReason::MemoryLimit);
        drop(receiver);
        assert_eq!(budget.used(), 0);
    });
}

#[test]
fn a_stream_that_ends_within_a_packet_is_no_orderly_end() {
    run(async {
        let (mut opened, (_sender, mut receiver)) = call().await;
        let mut frame = data(1, 100).frame().slice(..50);
        opened.sender.send(&mut frame).await.unwrap();
        opened.sender.finish(&Status::ok());
        let end = receiver.next().await.unwrap_err();
        assert!(matches!(end, StreamEnd::Truncated));
    });
}

#[test]
fn cancelling_loses_nothing() {
    run(async {
        let (mut opened, (_sender, mut receiver)) = call().await;
        let packets: Vec<_> = (1..400).map(|n| data(n, 20_000)).collect();
        let mut frames: VecDeque<_> = packets.iter().map(Packet::frame).collect();
        let mut received = Vec::new();
        while received.len() < packets.len() {
            // Either is given up after one look.
            poll_fn(|cx| {
                if let Some(frame) = frames.front_mut()
                    && pin!(opened.sender.send(frame)).poll(cx).is_ready()
                {
                    frames.pop_front();
                }
                if let Poll::Ready(next) = pin!(receiver.next()).poll(cx) {
                    received.push(next.unwrap().unwrap());
                }
                Poll::Ready(())
            })
            .await;
            tokio::task::yield_now().await;
        }
        assert_eq!(received, packets);
    });
}

#[test]
fn dropped_halves_reset_the_stream() {
    run(async {
        let (mut opened, server) = call().await;
        drop(server);
        let end = opened.receiver.next().await.unwrap_err();
        assert!(matches!(end, StreamEnd::Reset(Reason::CANCEL)), "{end}");
        let end = opened.sender.reset().await;
        assert!(matches!(end, StreamEnd::Reset(Reason::CANCEL)), "{end}");

        let (opened, (mut sender, mut receiver)) = call().await;
        drop(opened);
        assert!(matches!(
            sender.reset().await,
            StreamEnd::Reset(Reason::CANCEL)
        ));
        let end = sender.send(&mut Packet::Drain.frame()).await.unwrap_err();
        assert!(matches!(end, StreamEnd::Reset(Reason::CANCEL)), "{end}");
        let end = receiver.next().await.unwrap_err();
        assert_eq!(end.reason(), CloseReason::PeerReset);
    });
}

#[test]
fn a_lost_connection_is_no_reset() {
    run(async {
        let (near, far) = UnixStream::pair().unwrap();
        let calls = Calls::default();
        let given = calls.clone();
        let server = spawn_local(async move {
            let on_call = move |call| {
                given.waiting.borrow_mut().push_back(call);
                given.came.notify_one();
            };
            let _ = serve(far, &SETTINGS, CONNECT, pending(), on_call).await;
        });
        let (mut channel, driver) = handshake(near, &SETTINGS, "server").await.unwrap();
        spawn_local(driver);
        let taken = async { calls.next().await.accept(&[]).unwrap() };
        let (opened, _taken) = tokio::join!(channel.open(CONNECT, &[], PATIENCE), taken);
        server.abort();
        let end = opened.unwrap().receiver.next().await.unwrap_err();
        assert_eq!(end.reason(), CloseReason::LinkLost, "{end}");
    });
}

#[test]
fn what_is_not_served_is_answered() {
    run(async {
        let (mut channel, _calls) = connect(pending()).await;
        let refused = channel.open("/Other/Method", &[], PATIENCE).await;
        let Err(CallError::End(StreamEnd::Status(status))) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(status.code, Code::UNIMPLEMENTED);
        // No call of gRPC at all, and then one that nobody takes up.
        for (content_type, expected) in [("text/plain", 415), ("application/grpc+proto", 0)] {
            let request = http::Request::post("https://server/AgentService/Connect")
                .header("content-type", content_type)
                .body(())
                .unwrap();
            let (response, _stream) = channel.requests.send_request(request, true).unwrap();
            let status = timeout(QUIET, response).await;
            let status = status.map_or(0, |answer| answer.unwrap().status().as_u16());
            assert_eq!(status, expected, "{content_type}");
        }
        let unanswered = channel.open(CONNECT, &[], QUIET).await;
        assert!(matches!(unanswered, Err(CallError::Unanswered(QUIET))));
    });
}

#[test]
fn a_server_that_stops_takes_no_new_calls_and_keeps_the_old() {
    run(async {
        let (stop, stopping) = oneshot::channel::<()>();
        let stopping = async {
            let _ = stopping.await;
        };
        let (mut channel, calls) = connect(stopping).await;
        let server = async { calls.next().await.accept(&[]).unwrap() };
        let (opened, (_, mut receiver)) =
            tokio::join!(channel.open(CONNECT, &[], PATIENCE), server);
        let mut opened = opened.unwrap();
        stop.send(()).unwrap();
        sleep(QUIET).await;
        assert!(channel.open(CONNECT, &[], PATIENCE).await.is_err());
        opened
            .sender
            .send(&mut Packet::Drain.frame())
            .await
            .unwrap();
        assert_eq!(receiver.next().await.unwrap(), Some(Packet::Drain));
    });
}

#[test]
fn a_peer_that_does_not_speak_http2_is_not_waited_for() {
    run(async {
        let (near, far) = UnixStream::pair().unwrap();
        near.try_write(b"CONNECT 10.0.0.1:443 HTTP/1.1\r\n\r\n")
            .unwrap();
        let served = serve(far, &SETTINGS, CONNECT, pending(), |_| {});
        assert!(served.await.is_err());
    });
}

#[test]
fn an_outbox_is_fair_and_keeps_the_order_of_each() {
    run(async {
        let (mut opened, (sender, _receiver)) = call().await;
        let outbox = Outbox::new();
        let driven = outbox.clone();
        spawn_local(async move { driven.drive(sender).await });
        let total = 3 << 20;
        let all: Bytes = (0..total).map(|n: usize| n as u8).collect();
        for id in 1..=3 {
            let (outbox, mut sent) = (outbox.clone(), all.clone());
            spawn_local(async move {
                outbox.send(id, &mut sent).await.unwrap();
                outbox.push(&Packet::CloseRequest { connect_id: id });
            });
        }
        let mut received = [0; 3];
        let mut closed = 0;
        while closed < 3 {
            match opened.receiver.next().await.unwrap().unwrap() {
                Packet::Data { connect_id, data } => {
                    let count = &mut received[connect_id as usize - 1];
                    let expected = (*count..).map(|n: usize| n as u8);
                    assert!(data.iter().copied().eq(expected.take(data.len())));
                    *count += data.len();
                }
                Packet::CloseRequest { connect_id } => {
                    assert_eq!(received[connect_id as usize - 1], total);
                    closed += 1;
                }
                other => panic!("{other:?}"),
            }
            // The first fills the queue before the others come, and keeps that lead.
            let (most, least) = (received.iter().max(), received.iter().min());
            let lead = most.unwrap() - least.unwrap();
            assert!(lead <= 256 << 10, "{received:?}");
        }
    });
}

#[test]
fn an_outbox_that_is_not_read_waits_with_data_and_gives_up_on_control() {
    run(async {
        let (opened, (sender, _receiver)) = call().await;
        let outbox = Outbox::new();
        let driven = outbox.clone();
        let driver = spawn_local(async move { driven.drive(sender).await });
        let mut rest = Bytes::from(vec![7; 8 << 20]);
        assert!(timeout(QUIET, outbox.send(1, &mut rest)).await.is_err());
        let queued = (8 << 20) - rest.len();
        let most = SETTINGS.stream_window as usize + SEND_BUFFER + (128 << 10);
        assert!(queued <= most, "{queued}");

        for id in 0..1_000_000 {
            outbox.push(&Packet::CloseRequest { connect_id: id });
        }
        assert!(matches!(outbox.ended().await, StreamEnd::Unread));
        assert!(matches!(driver.await.unwrap(), StreamEnd::Unread));
        let refused = outbox.send(1, &mut rest).await.unwrap_err();
        assert!(matches!(refused, StreamEnd::Unread));
        drop(opened);
    });
}

#[test]
fn what_is_in_an_outbox_leaves_before_its_end() {
    run(async {
        let (mut opened, (sender, _receiver)) = call().await;
        let outbox = Outbox::new();
        let mut bytes = Bytes::from(vec![7; 100_000]);
        outbox.send(1, &mut bytes).await.unwrap();
        outbox.finish(Status::new(Code::UNAVAILABLE, ""));
        outbox.push(&Packet::Drain);
        spawn_local(async move { outbox.drive(sender).await });
        let mut received = 0;
        let end = loop {
            match opened.receiver.next().await {
                Ok(Some(Packet::Data { data, .. })) => received += data.remaining(),
                other => break other,
            }
        };
        assert_eq!(received, 100_000);
        assert!(matches!(end, Err(StreamEnd::Status(_))), "{end:?}");
    });
}
