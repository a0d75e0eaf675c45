//! A client on one side of a pair of Unix sockets, the socket on the other: what each sees.

use std::future::pending;
use std::io::IoSlice;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::timeout;
use tunnel_proto::konnectivity::PROXY;

use super::*;
use crate::grpc::Settings;
use crate::grpc::client::{Opened, handshake};
use crate::grpc::server::serve;

const PATIENCE: Duration = Duration::from_secs(10);

/// Within which nothing more happens: what was to happen has happened.
const QUIET: Duration = Duration::from_millis(100);

const RANDOM: i64 = 4711;

struct Client {
    call: Opened,
    id: i64,
}

impl Client {
    async fn send(&mut self, packet: Packet) {
        self.call.sender.send(&mut packet.frame()).await.unwrap();
    }

    async fn data(&mut self, connect_id: i64, data: &'static [u8]) {
        let data = Bytes::from_static(data);
        self.send(Packet::Data { connect_id, data }).await;
    }

    async fn next(&mut self) -> Result<Option<Packet>, StreamEnd> {
        timeout(PATIENCE, self.call.receiver.next()).await.unwrap()
    }

    async fn expect(&mut self, packet: Packet) {
        assert_eq!(self.next().await.unwrap(), Some(packet));
    }

    async fn expect_close(&mut self, connect_id: i64, error: &str) {
        let error = error.to_owned();
        self.expect(Packet::CloseResponse { error, connect_id })
            .await;
    }
}

async fn stream() -> (Client, Rc<ProxySocket>) {
    let (near, far) = UnixStream::pair().unwrap();
    let (socket, made) = oneshot::channel();
    let mut socket = Some(socket);
    spawn_local(async move {
        let on_call = |call: crate::grpc::server::Call| {
            let (sender, receiver) = call.accept(&[]).unwrap();
            let socket = socket.take().unwrap();
            let _ = socket.send(ProxySocket::new(sender, receiver, RANDOM, Rc::default()));
        };
        let _ = serve(far, &Settings::FRONTEND, PROXY, pending(), on_call).await;
    });
    let (mut channel, driver) = handshake(near, &Settings::FRONTEND, "server")
        .await
        .unwrap();
    spawn_local(driver);
    let call = channel.open(PROXY, &[], PATIENCE).await.unwrap();
    (Client { call, id: 0 }, Rc::new(made.await.unwrap()))
}

/// A connection that is established.
async fn connected() -> (Client, Rc<ProxySocket>) {
    let (mut client, socket) = stream().await;
    socket.connected().await.unwrap();
    write(&socket, b"hello").await;
    // In this order, though the target was quick.
    let answer = client.next().await.unwrap().unwrap();
    let Packet::DialResponse {
        error,
        connect_id,
        random: RANDOM,
    } = answer
    else {
        panic!("{answer:?}");
    };
    assert_eq!(error, "");
    assert_ne!(connect_id, 0);
    client.id = connect_id;
    let data = Bytes::from_static(b"hello");
    client.expect(Packet::Data { connect_id, data }).await;
    (client, socket)
}

async fn write(socket: &ProxySocket, bytes: &[u8]) {
    assert_eq!(
        (&socket).try_write(&[IoSlice::new(bytes)]).unwrap(),
        Some(bytes.len())
    );
    (&socket).writable().await.unwrap();
}

async fn read(socket: &ProxySocket) -> io::Result<Bytes> {
    timeout(PATIENCE, (&socket).read()).await.unwrap()
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

#[test]
fn what_was_sent_arrives_before_the_end_and_the_end_is_answered_at_once() {
    run(async {
        let (mut client, socket) = connected().await;
        let id = client.id;
        client.data(id, b"").await;
        client.data(0, b"for none").await;
        client.data(id, b"one").await;
        client.send(Packet::CloseRequest { connect_id: id }).await;
        assert_eq!(read(&socket).await.unwrap(), "one");
        assert_eq!(read(&socket).await.unwrap(), "");
        client.expect_close(id, "").await;

        // It wants nothing more, and then leaves, which takes nothing from what it has sent.
        let refused = (&&*socket).try_write(&[IoSlice::new(b"late")]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::BrokenPipe);
        timeout(PATIENCE, (&&*socket).broken()).await.unwrap();
        drop(client);
        assert!(
            timeout(QUIET, (&&*socket).broken_before_eof())
                .await
                .is_err()
        );
        assert_eq!(read(&socket).await.unwrap(), "");
    });
}

#[test]
fn the_end_of_the_target_is_the_end_of_both_directions() {
    run(async {
        let (mut client, socket) = connected().await;
        let id = client.id;
        client.data(id, b"under way").await;
        tokio::time::sleep(QUIET).await;
        (&&*socket).finish().await.unwrap();
        assert_eq!(read(&socket).await.unwrap(), "under way");
        assert_eq!(read(&socket).await.unwrap(), "");
        (&&*socket).reset_on_close(false);
        socket.end(&socket.close(CloseReason::Finished));
        client.expect_close(id, "").await;
        assert!(client.next().await.unwrap().is_none());
    });
}

#[test]
fn a_reader_is_woken_by_the_end_of_the_target() {
    run(async {
        let (_client, socket) = connected().await;
        let (read, ()) = tokio::join!(read(&socket), async {
            tokio::time::sleep(QUIET).await;
            (&&*socket).finish().await.unwrap();
        });
        assert_eq!(read.unwrap(), "");
    });
}

#[test]
fn a_broken_connection_is_told_from_one_that_ended() {
    run(async {
        let (mut client, socket) = connected().await;
        let status = socket.close(CloseReason::LinkLost);
        assert_eq!(status.code, Code::UNAVAILABLE);
        socket.end(&status);
        drop(socket);
        client.expect_close(client.id, "the tunnel was lost").await;
        let end = client.next().await.unwrap_err();
        assert!(matches!(end, StreamEnd::Status(s) if s == status));
    });
}

#[test]
fn a_client_that_leaves_resets() {
    run(async {
        let (client, socket) = connected().await;
        drop(client);
        timeout(PATIENCE, (&&*socket).broken_before_eof())
            .await
            .unwrap();
        let reset = read(&socket).await.unwrap_err();
        assert_eq!(reset.kind(), ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_client_that_reads_nothing_takes_no_more_than_its_window() {
    run(async {
        let (client, socket) = connected().await;
        let chunk = vec![7; MAX_DATA];
        let mut written = 0;
        while timeout(QUIET, (&&*socket).writable()).await.is_ok() {
            written += (&&*socket)
                .try_write(&[IoSlice::new(&chunk)])
                .unwrap()
                .unwrap();
        }
        assert!(written <= (256 + 192) << 10, "{written}");
        assert!(
            (&&*socket)
                .try_write(&[IoSlice::new(&chunk)])
                .unwrap()
                .is_none()
        );
        assert!((&&*socket).unsent() > 0);
        drop(client);
    });
}

#[test]
fn packets_that_should_not_come() {
    run(async {
        let (mut client, socket) = connected().await;
        let id = client.id;
        client.send(Packet::CloseDial { random: RANDOM }).await;
        client.send(Packet::Drain).await;
        client
            .send(Packet::CloseRequest {
                connect_id: id + 100,
            })
            .await;
        client
            .send(Packet::DialRequest {
                protocol: "tcp".into(),
                address: "10.0.0.1:443".into(),
                random: 1,
            })
            .await;
        client.data(id, b"goes on").await;
        assert_eq!(read(&socket).await.unwrap(), "goes on");
        client
            .expect_close(id + 100, text::UNKNOWN_CONNECTION)
            .await;
        let second = client.next().await.unwrap().unwrap();
        assert!(
            matches!(&second, Packet::DialResponse { error, connect_id: 0, random: 1 } if !error.is_empty()),
            "{second:?}"
        );

        client.data(id + 100, b"of another").await;
        assert!(read(&socket).await.is_err());
        client.expect_close(id + 100, text::MISMATCHED).await;
        client.expect_close(id, text::MISMATCHED).await;
        socket.end(&socket.close(CloseReason::PeerReset));
        assert!(client.next().await.unwrap().is_none());
    });
}

#[test]
fn what_is_no_packet_ends_the_call_with_its_status() {
    let too_long = (4_u32 << 20) + 1;
    let [a, b, c, d] = too_long.to_be_bytes();
    for (bytes, code) in [
        (vec![0, a, b, c, d], Code::RESOURCE_EXHAUSTED),
        (vec![0, 0, 0, 0, 1, 0xff], Code::INTERNAL),
    ] {
        run(async move {
            let (mut client, socket) = connected().await;
            client.call.sender.send(&mut bytes.into()).await.unwrap();
            assert!(read(&socket).await.is_err());
            let status = socket.close(CloseReason::PeerReset);
            assert_eq!(status.code, code);
            socket.end(&status);
            client.expect_close(client.id, &status.message).await;
            let end = client.next().await.unwrap_err();
            assert!(matches!(end, StreamEnd::Status(s) if s == status));
        });
    }
}

#[test]
fn a_dial_is_given_up_by_its_own_number_only() {
    run(async {
        let (mut client, socket) = stream().await;
        client.send(Packet::CloseDial { random: 1 }).await;
        client.data(1, b"of nothing").await;
        assert!(timeout(QUIET, (&&*socket).read()).await.is_err());
        client.send(Packet::CloseDial { random: RANDOM }).await;
        assert_eq!(read(&socket).await.unwrap(), "");

        let (client, socket) = stream().await;
        drop(client);
        assert!(read(&socket).await.is_err());
    });
}

#[test]
fn a_dial_that_failed_is_answered() {
    run(async {
        let (mut client, socket) = stream().await;
        let server = async {
            socket.refused(text::NO_AGENT).await;
            socket.end(&Status::ok());
        };
        let answered = async {
            client
                .expect(Packet::DialResponse {
                    error: text::NO_AGENT.into(),
                    connect_id: 0,
                    random: RANDOM,
                })
                .await;
            client.call.sender.finish(&Status::ok());
            assert!(client.next().await.unwrap().is_none());
        };
        tokio::join!(server, answered);
    });
}
