//! The two halves of one dial.
//!
//! Invariant: a connection leaves nothing behind, whatever happens to its halves. A finished one is
//! closed in order even without a waiting task, any other is reset with its halves.

use std::future::ready;
use std::rc::Rc;

use bytes::{Buf, Bytes};
use futures_util::future::LocalBoxFuture;
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::server_end::{Answer, DialId, ReadEnd, WriteEnd};
use tunnel_proto::konnectivity::{MAX_DATA, text};
use tunnel_proto::preface::{DialRequest, DialResponse};

use super::link::{KonnectivityLink, Waiting};
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use cpc_server::extension::{self, AgentLink, Answered, LinkRecv, LinkSend};
use cpc_transport::tunnel::HeadError;

/// State that the halves share; dropped with the last of them.
#[derive(Debug)]
struct Connection {
    link: Rc<KonnectivityLink>,
    dial: DialId,
    waiting: Rc<Waiting>,
}

impl Connection {
    /// Waits until `look` returns a value.
    async fn find<T>(&self, mut look: impl FnMut(&KonnectivityLink) -> Option<T>) -> T {
        loop {
            let changed = self.waiting.changed.notified();
            if let Some(found) = look(&self.link) {
                return found;
            }
            changed.await;
        }
    }

    async fn write_end(&self) -> SendEnd {
        let end = self.find(|link| link.look(|end| end.write_end(self.dial)));
        match end.await {
            WriteEnd::Closed => SendEnd::Acknowledged,
            WriteEnd::ClosedByTarget => SendEnd::Stopped(CloseReason::PeerGone),
            WriteEnd::Reset(reason) => SendEnd::Stopped(reason),
            WriteEnd::Link(reason) => SendEnd::Link(reason),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.link.step(|end, now| end.release(self.dial, now));
    }
}

impl AgentLink for KonnectivityLink {
    fn open<'a>(
        self: Rc<Self>,
        request: &'a DialRequest,
    ) -> LocalBoxFuture<'a, Result<(LinkSend, LinkRecv), CloseReason>> {
        let opened = open(&self, request);
        Box::pin(ready(opened.map(|(send, recv)| {
            (LinkSend::foreign(send), LinkRecv::foreign(recv))
        })))
    }

    fn close(&self, reason: CloseReason) {
        self.close(reason);
    }
}

/// Sends `request` on a link.
fn open(
    link: &Rc<KonnectivityLink>,
    request: &DialRequest,
) -> Result<(KonnectivitySend, KonnectivityRecv), CloseReason> {
    let (dial, waiting) = link.dial(request)?;
    let connection = Rc::new(Connection {
        link: link.clone(),
        dial,
        waiting,
    });
    let send = KonnectivitySend {
        connection: connection.clone(),
        ended: false,
    };
    let recv = KonnectivityRecv {
        connection,
        ended: false,
    };
    Ok((send, recv))
}

/// The half towards the target; resets on drop unless finished.
#[derive(Debug)]
pub(super) struct KonnectivitySend {
    connection: Rc<Connection>,
    ended: bool,
}

impl SendHalf for KonnectivitySend {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        let Connection { link, dial, .. } = &*self.connection;
        while !chunk.is_empty() {
            let Some(connect_id) = link.look(|end| end.connect_id(*dial)) else {
                return Err(self.connection.write_end().await);
            };
            // One packet, which is queued as a whole or not at all.
            let mut piece = chunk.slice(..chunk.len().min(MAX_DATA));
            let (length, is_goodbye) = (piece.len(), ends_tls(&piece));
            tokio::select! {
                biased;
                sent = link.outbox.send(connect_id, &mut piece) => match sent {
                    Ok(()) => chunk.advance(length),
                    Err(end) => return Err(SendEnd::Link(link.closed().unwrap_or(end.reason()))),
                },
                end = self.connection.write_end() => return Err(end),
            }
            link.sent(*dial, length, is_goodbye);
        }
        Ok(())
    }

    fn finish(&mut self) {
        self.ended = true;
        let Connection { link, dial, .. } = &*self.connection;
        link.step(|end, now| end.finish(*dial, now));
    }

    fn lingers(&self) -> bool {
        true
    }

    fn finish_half(&mut self) {
        self.ended = true;
        let Connection { link, dial, .. } = &*self.connection;
        link.step(|end, now| end.finish_half(*dial, now));
    }

    fn reset(&mut self, reason: CloseReason) {
        self.ended = true;
        let Connection { link, dial, .. } = &*self.connection;
        link.step(|end, now| end.reset(*dial, reason, now));
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        let connection = self.connection.clone();
        async move { connection.write_end().await }
    }
}

impl Drop for KonnectivitySend {
    fn drop(&mut self) {
        if !self.ended {
            self.reset(CloseReason::Aborted);
        }
    }
}

/// The half from the target, behind the agent's answer.
#[derive(Debug)]
pub(super) struct KonnectivityRecv {
    connection: Rc<Connection>,
    ended: bool,
}

impl Answered for KonnectivityRecv {
    /// Waits for the agent's answer. Cancelling loses nothing.
    async fn answer(&mut self) -> extension::Answer {
        let dial = self.connection.dial;
        let answer = self
            .connection
            .find(|link| link.look(|end| end.answer(dial)));
        match answer.await {
            Answer::Connected => Ok(DialResponse::Connected),
            Answer::Failed(detail) => Ok(DialResponse::Refused {
                reason: text::reason(&detail),
                detail,
            }),
            Answer::Ended(end) => Err(HeadError::End(recv_end(end))),
        }
    }
}

impl RecvHalf for KonnectivityRecv {
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        let dial = self.connection.dial;
        let read =
            self.connection.find(
                |link| match link.step(|end, now| end.read(dial, into, now)) {
                    Ok(false) => None,
                    Ok(true) => Some(Ok(())),
                    Err(end) => Some(Err(end)),
                },
            );
        let read = read.await;
        self.ended |= read.is_err();
        read.map_err(recv_end)
    }

    async fn reset(&mut self) -> CloseReason {
        let dial = self.connection.dial;
        let reset = self
            .connection
            .find(|link| link.look(|end| end.reset_reason(dial)));
        reset.await
    }

    fn stop(&mut self, _reason: CloseReason) {
        self.ended = true;
        let Connection { link, dial, .. } = &*self.connection;
        link.step(|end, now| end.stop(*dial, now));
    }
}

impl Drop for KonnectivityRecv {
    fn drop(&mut self) {
        if !self.ended {
            self.stop(CloseReason::Aborted);
        }
    }
}

/// Whether `bytes` end in an alert of TLS, the last record of a session: in clear or encrypted by TLS
/// 1.2 (RFC 5246, sections 6.2 and 7.2), or an encrypted record of TLS 1.3 with room for an alert alone
/// (RFC 8446, section 5.2).
fn ends_tls(bytes: &[u8]) -> bool {
    const HEAD: usize = 5;
    // Two bytes of alert, and what ciphers put around them.
    (2..=64).any(|length: u8| {
        let record = usize::from(length) + HEAD;
        let Some(at) = bytes.len().checked_sub(record) else {
            return false;
        };
        match bytes[at..at + HEAD] {
            [21, 3, 0..=4, 0, n] => n == length,
            // The alert, the record's true type and a tag of 16 bytes.
            [23, 3, 3, 0, n] => n == length && n == 2 + 1 + 16,
            _ => false,
        }
    })
}

fn recv_end(end: ReadEnd) -> RecvEnd {
    match end {
        ReadEnd::Finished => RecvEnd::Finished,
        ReadEnd::Reset(reason) => RecvEnd::Reset(reason),
        ReadEnd::Link(reason) => RecvEnd::Link(reason),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tunnel_proto::konnectivity::Packet;
    use tunnel_proto::preface::{ConnectionId, DialRequest};

    use super::*;
    use cpc_config::TunnelKind;
    use cpc_identity::{Identity, Role};
    use cpc_server::routes::{LinkId, LinkInfo, Trust};
    use cpc_transport::tunnel::{Path, Probe};

    fn link() -> Rc<KonnectivityLink> {
        let path = Path {
            remote: "127.0.0.1:1".parse().unwrap(),
            rtt: Duration::ZERO,
            mtu: None,
            since_packet: Duration::ZERO,
            since_data: Duration::ZERO,
        };
        let identity = Identity::new("a".parse().unwrap(), Role::Agent, "w1").unwrap();
        let info = LinkInfo::new(
            (LinkId(1), 0),
            TunnelKind::Konnectivity,
            (identity, Trust::Granted),
            Probe::new(move || path),
        );
        KonnectivityLink::new(info, Default::default(), false)
    }

    /// A dial whose `random` is its id.
    fn dial(link: &Rc<KonnectivityLink>, id: u8) -> (KonnectivitySend, KonnectivityRecv) {
        let mut name = [0; 16];
        name[15] = id;
        let request = DialRequest {
            session: None,
            id: ConnectionId(name),
            destination: "10.99.1.2:10250".parse().unwrap(),
            deadline: Duration::from_secs(1),
            attempt: 0,
        };
        open(link, &request).unwrap()
    }

    fn receive(link: &KonnectivityLink, packet: Packet) {
        link.step(|end, now| end.handle_packet(packet, now))
            .unwrap();
    }

    fn answer(link: &KonnectivityLink, random: i64, error: &str) {
        let connect_id = if error.is_empty() { random } else { 0 };
        let error = error.to_owned();
        receive(
            link,
            Packet::DialResponse {
                error,
                connect_id,
                random,
            },
        );
    }

    fn close(link: &KonnectivityLink, connect_id: i64) {
        let error = String::new();
        receive(link, Packet::CloseResponse { error, connect_id });
    }

    #[tokio::test]
    async fn what_was_sent_before_the_close_arrives_before_the_end() {
        let link = link();
        let (mut send, mut recv) = dial(&link, 1);
        answer(&link, 1, "");
        assert_eq!(recv.answer().await.unwrap(), DialResponse::Connected);
        let stopped = send.stopped();
        let data = Bytes::from_static(b"bye");
        let connect_id = 1;
        receive(&link, Packet::Data { connect_id, data });
        close(&link, 1);
        let mut chunks = Vec::new();
        recv.recv(&mut chunks).await.unwrap();
        assert_eq!(chunks.concat(), b"bye");
        assert_eq!(recv.recv(&mut chunks).await, Err(RecvEnd::Finished));
        let gone = SendEnd::Stopped(CloseReason::PeerGone);
        assert_eq!(stopped.await, gone);
        let mut late = Bytes::from_static(b"late");
        assert_eq!(send.send(&mut late).await, Err(gone));
        assert_eq!(late.len(), 4);
        drop((send, recv));
        assert!(link.look(|end| end.is_idle()));
    }

    #[tokio::test]
    async fn a_failed_dial_is_sorted_by_its_words() {
        let link = link();
        let (_send, mut recv) = dial(&link, 1);
        let text = "dial tcp 10.99.1.2:10250: connect: connection refused";
        answer(&link, 1, text);
        let refused = DialResponse::Refused {
            reason: CloseReason::ConnectionRefused,
            detail: text.into(),
        };
        assert_eq!(recv.answer().await.unwrap(), refused);
    }

    #[tokio::test]
    async fn a_sender_without_credit_hears_of_the_end() {
        let link = link();
        let (mut send, _recv) = dial(&link, 1);
        answer(&link, 1, "");
        // The outbox has no driver: it fills up.
        let mut much = Bytes::from(vec![0; 1 << 20]);
        let sending = async {
            let end = send.send(&mut much).await;
            (end, much.len())
        };
        let closing = async {
            tokio::task::yield_now().await;
            close(&link, 1);
        };
        let ((end, left), ()) = tokio::join!(sending, closing);
        assert_eq!(end, Err(SendEnd::Stopped(CloseReason::PeerGone)));
        assert!(left > 0 && left < 1 << 20);
    }

    #[tokio::test]
    async fn finished_connections_are_acknowledged_and_others_leave_nothing() {
        let link = link();
        let (mut send, recv) = dial(&link, 1);
        let dropped = dial(&link, 2);
        answer(&link, 1, "");
        answer(&link, 2, "");
        drop(dropped);
        assert!(!link.look(|end| end.is_idle()));
        send.finish();
        let stopped = send.stopped();
        drop((send, recv));
        close(&link, 1);
        assert_eq!(stopped.await, SendEnd::Acknowledged);
        assert!(link.look(|end| end.is_idle()));
    }

    #[test]
    fn the_last_word_of_tls_is_told_from_a_request() {
        let alert = |kind: u8, length: u8| {
            let mut record = vec![kind, 3, 3, 0, length];
            record.resize(5 + usize::from(length), 0xaa);
            record
        };
        let request = alert(23, 100);
        for (bytes, ends) in [
            (alert(21, 2), true),
            (alert(21, 26), true),
            (alert(23, 19), true),
            ([request.clone(), alert(23, 19)].concat(), true),
            (request.clone(), false),
            ([alert(23, 19), request].concat(), false),
            (alert(22, 26), false),
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), false),
            (Vec::new(), false),
        ] {
            assert_eq!(ends_tls(&bytes), ends, "{bytes:?}");
        }
    }

    #[tokio::test]
    async fn a_lost_link_ends_dials_and_connections() {
        let link = link();
        let (send, mut recv) = dial(&link, 1);
        let (_sending, mut dialling) = dial(&link, 2);
        answer(&link, 1, "");
        let reset = recv.reset();
        link.close(CloseReason::LinkLost);
        link.close(CloseReason::Shutdown);
        assert_eq!(
            send.stopped().await,
            SendEnd::Link(CloseReason::LinkLost),
            "the first reason counts"
        );
        let never = tokio::time::timeout(Duration::from_millis(50), reset).await;
        assert!(never.is_err(), "what arrived is still there to be read");
        let end = Err(RecvEnd::Link(CloseReason::LinkLost));
        assert_eq!(recv.recv(&mut Vec::new()).await, end);
        assert!(matches!(
            dialling.answer().await,
            Err(HeadError::End(RecvEnd::Link(CloseReason::LinkLost)))
        ));
        assert!(link.closed().is_some());
    }
}
