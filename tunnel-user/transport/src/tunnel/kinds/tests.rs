//! The list with a second kind, whose halves and futures are other types than those of QUIC.

#![expect(unreachable_pub, reason = "the list makes public types")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Ready, pending, ready};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use super::super::Path;
use super::*;
use tunnel_proto::preface::DialResponse;

kinds! {
    /// QUIC.
    Quic(quic::Connection),
    /// A tunnel to itself.
    Echo(Echo),
}

/// A tunnel whose streams return what they are sent.
#[derive(Clone, Debug)]
pub(super) struct Echo;

#[derive(Debug, Default)]
struct Queue {
    chunks: RefCell<VecDeque<Bytes>>,
    finished: RefCell<bool>,
}

#[derive(Debug)]
pub(super) struct EchoSend(Rc<Queue>);

#[derive(Debug)]
pub(super) struct EchoRecv(Rc<Queue>);

impl Tunnel for Echo {
    type Send = EchoSend;
    type Recv = EchoRecv;

    fn kind(&self) -> TunnelKind {
        TunnelKind::Quic
    }

    async fn open(&self) -> Result<(EchoSend, EchoRecv), TunnelError> {
        let queue = Rc::new(Queue::default());
        Ok((EchoSend(queue.clone()), EchoRecv(queue)))
    }

    async fn accept(&self) -> Result<(EchoSend, EchoRecv), TunnelError> {
        let lost = TunnelError::new(CloseReason::LinkLost, io::Error::other("gone"));
        Err(lost.closed_by_peer("bye"))
    }

    fn close(&self, _reason: CloseReason, _text: &str) {}

    fn remote(&self) -> SocketAddr {
        self.probe().path().remote
    }

    fn probe(&self) -> Probe {
        Probe::new(|| Path {
            remote: ([127, 0, 0, 1], 1).into(),
            rtt: Duration::ZERO,
            mtu: None,
            since_packet: Duration::ZERO,
            since_data: Duration::ZERO,
        })
    }

    fn peer_certificate(&self) -> Option<CertificateDer<'static>> {
        None
    }

    fn charge_to(&self, _budget: &Budget) {}

    fn has_unacknowledged(&self) -> bool {
        false
    }
}

impl SendHalf for EchoSend {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        poll_fn(|cx| self.poll_send(cx, chunk)).await
    }

    fn finish(&mut self) {
        self.0.finished.replace(true);
    }

    fn reset(&mut self, _reason: CloseReason) {}

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        self.ended()
    }
}

impl TunnelSend for EchoSend {
    type Ended = Ready<SendEnd>;

    fn poll_send(&mut self, _: &mut Context<'_>, chunk: &mut Bytes) -> Poll<Result<(), SendEnd>> {
        self.0.chunks.borrow_mut().push_back(std::mem::take(chunk));
        Poll::Ready(Ok(()))
    }

    fn ended(&self) -> Ready<SendEnd> {
        ready(SendEnd::Acknowledged)
    }

    fn poll_stopped(&mut self, _: &mut Context<'_>) -> Poll<SendEnd> {
        Poll::Pending
    }

    fn go_first(&mut self) {}

    fn tunnel_error(&self) -> Option<TunnelError> {
        None
    }
}

impl RecvHalf for EchoRecv {
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        poll_fn(|cx| self.poll_recv(cx, into)).await
    }

    async fn reset(&mut self) -> CloseReason {
        pending().await
    }

    fn stop(&mut self, _reason: CloseReason) {}
}

impl TunnelRecv for EchoRecv {
    fn poll_recv(
        &mut self,
        _: &mut Context<'_>,
        into: &mut Vec<Bytes>,
    ) -> Poll<Result<(), RecvEnd>> {
        into.extend(self.0.chunks.borrow_mut().drain(..));
        match (into.is_empty(), *self.0.finished.borrow()) {
            (false, _) => Poll::Ready(Ok(())),
            (true, true) => Poll::Ready(Err(RecvEnd::Finished)),
            (true, false) => Poll::Pending,
        }
    }

    fn poll_reset(&mut self, _: &mut Context<'_>) -> Poll<CloseReason> {
        Poll::Pending
    }

    fn put_back(&mut self, bytes: Bytes) {
        self.0.chunks.borrow_mut().push_front(bytes);
    }

    fn tunnel_error(&self) -> Option<TunnelError> {
        None
    }
}

#[tokio::test]
async fn a_kind_is_one_line_of_the_list() {
    let tunnel = Connection::from(Echo);
    let (mut send, mut recv) = tunnel.open().await.unwrap();
    let mut head = bytes::BytesMut::new();
    DialResponse::Connected.encode(&mut head);
    head.extend_from_slice(b"hello");
    send.send(&mut head.freeze()).await.unwrap();
    send.finish();
    assert_eq!(send.stopped().await, SendEnd::Acknowledged);

    let answer = recv.read_head(DialResponse::decode).await.unwrap();
    assert_eq!(answer, DialResponse::Connected);
    let mut chunks = Vec::new();
    recv.recv(&mut chunks).await.unwrap();
    assert_eq!(chunks.concat(), b"hello", "what came with the head");
    assert_eq!(recv.recv(&mut Vec::new()).await, Err(RecvEnd::Finished));

    let error = tunnel.accept().await.unwrap_err();
    assert_eq!(error.reason(), CloseReason::LinkLost);
    assert_eq!(error.peer_text(), Some("bye"));
    assert_eq!(error.to_string(), "gone");
}
