//! The halves of connections, with a proxy-server that is played by hand at the other end.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::{CONNECT, MAX_DATA, Packet};
use tunnel_proto::preface::DialResponse;

use super::session::{Asked, Session};
use super::stream::{KonnectivityRecv, KonnectivitySend, halves};
use crate::grpc::client::handshake;
use crate::grpc::server::serve;
use crate::grpc::{PacketReceiver, PacketSender, Settings};
use crate::metrics::{Segment, StreamMetrics};
use cpc_agent::extension::Answer;
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};

const SOON: Duration = Duration::from_secs(10);

/// A session that is read, and its server's end.
struct Pair {
    session: Rc<Session>,
    sender: PacketSender,
    receiver: PacketReceiver,
    asked: tokio::sync::mpsc::UnboundedReceiver<Asked>,
}

impl Pair {
    async fn new() -> Self {
        let (near, far) = UnixStream::pair().unwrap();
        let (accepted, server) = oneshot::channel();
        spawn_local(async move {
            let mut accepted = Some(accepted);
            let on_call = |call: crate::grpc::server::Call| {
                let halves = call.accept(&[]).unwrap();
                drop(accepted.take().unwrap().send(halves));
            };
            drop(
                serve(
                    far,
                    &Settings::AGENT,
                    CONNECT,
                    std::future::pending(),
                    on_call,
                )
                .await,
            );
        });
        let (mut channel, driver) = handshake(near, &Settings::AGENT, "cp:8091").await.unwrap();
        spawn_local(driver);
        let opened = channel.open(CONNECT, &[], SOON).await.unwrap();
        let (sender, receiver) = server.await.unwrap();

        let session = Session::new(StreamMetrics::default().tally(Segment::FromAgent), false);
        let (outbox, reader) = (session.outbox().clone(), session.clone());
        spawn_local(async move { outbox.drive(opened.sender).await });
        let mut packets = opened.receiver;
        let (to, asked) = tokio::sync::mpsc::unbounded_channel();
        spawn_local(async move {
            while let Ok(Some(packet)) = packets.next().await {
                if let Some(asked) = reader.handle(packet) {
                    drop(to.send(asked));
                }
                reader.released().await;
            }
        });
        Self {
            session,
            sender,
            receiver,
            asked,
        }
    }

    async fn send(&mut self, packet: Packet) {
        self.sender.send(&mut packet.frame()).await.unwrap();
    }

    async fn data(&mut self, connect_id: i64, data: Bytes) {
        self.send(Packet::Data { connect_id, data }).await;
    }

    async fn next(&mut self) -> Packet {
        let packet = timeout(SOON, self.receiver.next()).await;
        packet.unwrap().unwrap().unwrap()
    }

    async fn dial(&mut self, random: i64) -> (KonnectivitySend, KonnectivityRecv) {
        self.send(Packet::DialRequest {
            protocol: "tcp".to_owned(),
            address: "10.0.0.1:10250".to_owned(),
            random,
        })
        .await;
        let asked = timeout(SOON, self.asked.recv()).await.unwrap().unwrap();
        assert_eq!(asked.request.destination.to_string(), "10.0.0.1:10250");
        halves(&self.session, asked.stream)
    }

    /// A connection whose target was reached, the first of the stream.
    async fn connect(&mut self) -> (KonnectivitySend, KonnectivityRecv) {
        let (mut send, recv) = self.dial(7).await;
        send.answer(DialResponse::Connected).await;
        let answer = Packet::DialResponse {
            error: String::new(),
            connect_id: 1,
            random: 7,
        };
        assert_eq!(self.next().await, answer);
        (send, recv)
    }
}

fn closed(error: &str) -> Packet {
    Packet::CloseResponse {
        error: error.to_owned(),
        connect_id: 1,
    }
}

/// Reads everything until the end.
async fn read(recv: &mut KonnectivityRecv) -> (usize, RecvEnd) {
    let (mut bytes, mut chunks) = (0, Vec::new());
    loop {
        match timeout(SOON, recv.recv(&mut chunks)).await.unwrap() {
            Ok(()) => bytes += chunks.drain(..).map(|chunk| chunk.len()).sum::<usize>(),
            Err(end) => return (bytes, end),
        }
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async { timeout(3 * SOON, test).await.unwrap() });
}

#[test]
fn the_servers_close_comes_behind_all_that_it_sent() {
    run(async {
        let mut pair = Pair::new().await;
        let (send, mut recv) = pair.connect().await;
        for _ in 0..20 {
            pair.data(1, vec![1; MAX_DATA].into()).await;
        }
        pair.send(Packet::CloseRequest { connect_id: 1 }).await;
        assert_eq!(pair.next().await, closed(""), "at once");
        assert_eq!(read(&mut recv).await, (20 * MAX_DATA, RecvEnd::Finished));
        assert_eq!(
            send.stopped().await,
            SendEnd::Stopped(CloseReason::PeerGone)
        );
        drop(send);
        assert!(pair.session.is_empty());
    });
}

#[test]
fn the_targets_end_comes_behind_all_that_it_sent() {
    run(async {
        let mut pair = Pair::new().await;
        let (mut send, mut recv) = pair.connect().await;
        let mut left = 3 * MAX_DATA + 1;
        send.send(&mut vec![2; left].into()).await.unwrap();
        send.finish();
        assert_eq!(send.stopped().await, SendEnd::Acknowledged);
        assert_eq!(read(&mut recv).await, (0, RecvEnd::Finished));
        while left > 0 {
            let Packet::Data {
                connect_id: 1,
                data,
            } = pair.next().await
            else {
                panic!("no data");
            };
            left -= data.len();
        }
        assert_eq!(pair.next().await, closed(""));
    });
}

#[test]
fn a_connection_that_is_dropped_is_reset() {
    run(async {
        let mut pair = Pair::new().await;
        drop(pair.connect().await);
        assert_eq!(pair.next().await, closed(&CloseReason::Aborted.to_string()));
        let (mut send, _recv) = pair.dial(8).await;
        let refused = DialResponse::Refused {
            reason: CloseReason::ConnectionRefused,
            detail: String::new(),
        };
        send.answer(refused).await;
        drop(send);
        let answer = Packet::DialResponse {
            error: "dial tcp 10.0.0.1:10250: connect: connection refused".to_owned(),
            connect_id: 0,
            random: 8,
        };
        assert_eq!(pair.next().await, answer);
    });
}

#[test]
fn a_dial_that_is_given_up_is_stopped() {
    run(async {
        let mut pair = Pair::new().await;
        let (send, _recv) = pair.dial(7).await;
        pair.send(Packet::CloseDial { random: 7 }).await;
        let stopped = timeout(SOON, send.stopped()).await.unwrap();
        assert_eq!(stopped, SendEnd::Stopped(CloseReason::Cancelled));
    });
}

#[test]
fn a_target_that_takes_its_time_holds_up_the_stream_and_loses_nothing() {
    run(async {
        let mut pair = Pair::new().await;
        let (_send, mut recv) = pair.connect().await;
        let sent = 5 << 20;
        let mut packets = Packet::Data {
            connect_id: 1,
            data: vec![3; 3 << 20].into(),
        }
        .frame();
        pair.sender.send(&mut packets).await.unwrap();
        let sender = spawn_local(async move {
            pair.data(1, vec![3; 2 << 20].into()).await;
            pair.send(Packet::CloseRequest { connect_id: 1 }).await;
            pair
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!sender.is_finished(), "nothing is read meanwhile");
        assert_eq!(read(&mut recv).await, (sent, RecvEnd::Finished));
        sender.await.unwrap();
    });
}

#[test]
fn a_stream_that_is_lost_takes_its_connections_with_it() {
    run(async {
        let mut pair = Pair::new().await;
        let (mut send, mut recv) = pair.connect().await;
        pair.session.end(CloseReason::LinkLost);
        assert_eq!(
            read(&mut recv).await,
            (0, RecvEnd::Link(CloseReason::LinkLost))
        );
        let lost = Err(SendEnd::Link(CloseReason::LinkLost));
        assert_eq!(send.send(&mut Bytes::from_static(b"late")).await, lost);
        drop((send, recv));
        assert!(pair.session.is_empty());
    });
}
