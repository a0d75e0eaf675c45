//! A client's first bytes, kept until its dial is answered, so that another agent can be asked.

use bytes::{Bytes, BytesMut};

use cpc_datapath::Budget;
use cpc_datapath::budget::Charge;
use cpc_datapath::stream::SendHalf;
use cpc_datapath::{LocalSocket, Progress};

/// Maximum number of kept bytes; a client that sends more waits for the answer.
const KEPT: usize = 64 << 10;

/// Treatment of early bytes before the dial is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Early {
    /// Early bytes are sent behind the request: no round trip is lost. An end of file is a half-close.
    Send,
    /// Early bytes are held, because the client waits for an answer. An end of file is a half-close,
    /// unless the client has closed both directions.
    Hold,
    /// Early bytes are held, and an end of file cancels the dial: the protocol has no half-close.
    HoldWhole,
}

/// Report of [`EarlyBytes::pump`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EarlyEvent {
    /// The next call sends data of the client on the stream for the first time.
    BeforeFirstByte,
    /// The client went away.
    ClientGone,
    /// The stream takes no more.
    StreamEnded,
}

/// Early bytes of one client.
#[derive(Debug)]
pub(super) struct EarlyBytes {
    policy: Early,
    kept: Vec<Bytes>,
    len: usize,
    eof: bool,
    /// Charge for the kept bytes.
    charge: Option<Charge>,
    /// Whether the maximum is reached: the client waits for the answer.
    is_full: bool,
}

/// Position of one stream in the early bytes.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    next: usize,
    current: Bytes,
    finished: bool,
    /// [`EarlyEvent::BeforeFirstByte`] was reported.
    is_announced: bool,
}

impl Cursor {
    /// Reports that the stream is about to carry something, once.
    fn announce(&mut self) -> Result<(), EarlyEvent> {
        if std::mem::replace(&mut self.is_announced, true) {
            return Ok(());
        }
        Err(EarlyEvent::BeforeFirstByte)
    }
}

impl EarlyBytes {
    /// Creates the buffer with the bytes that were read behind the request, if any.
    pub(super) fn new(policy: Early, first: Bytes) -> Self {
        let len = first.len();
        let kept = if first.is_empty() {
            Vec::new()
        } else {
            vec![first]
        };
        Self {
            policy,
            kept,
            len,
            eof: false,
            charge: None,
            is_full: false,
        }
    }

    /// Charges `budget` for the kept bytes.
    pub(super) fn charge_to(&mut self, budget: Budget) {
        let mut charge = Charge::new(budget);
        self.is_full |= !charge.set(self.len as u64);
        self.charge = Some(charge);
    }

    /// Reads from the client and, if permitted, sends to the stream, until one of them ends.
    /// Returns once before the first send, so that the caller notes it first. Without a stream
    /// nothing is sent before the dial is answered. Cancelling loses nothing: the progress is in
    /// `self` and `cursor`.
    pub(super) async fn pump(
        &mut self,
        local: &impl LocalSocket,
        mut send: Option<&mut impl SendHalf>,
        cursor: &mut Cursor,
    ) -> EarlyEvent {
        loop {
            if self.policy == Early::Send
                && let Some(send) = &mut send
                && let Err(event) = self.give(*send, cursor).await
            {
                return event;
            }
            if self.eof {
                Box::pin(local.peer_closed()).await;
                return EarlyEvent::ClientGone;
            }
            if self.len >= KEPT || self.is_full {
                Box::pin(local.broken()).await;
                return EarlyEvent::ClientGone;
            }
            match local.read().await {
                Ok(bytes) if !bytes.is_empty() => {
                    self.len += bytes.len();
                    self.kept.push(bytes);
                    let len = self.len as u64;
                    let charged = self.charge.as_mut().is_none_or(|charge| charge.set(len));
                    self.is_full |= !charged;
                }
                Ok(_) if self.policy != Early::HoldWhole => self.eof = true,
                _ => return EarlyEvent::ClientGone,
            }
        }
    }

    async fn give(&self, send: &mut impl SendHalf, cursor: &mut Cursor) -> Result<(), EarlyEvent> {
        loop {
            if !cursor.current.is_empty() {
                cursor.announce()?;
                let sent = send.send(&mut cursor.current).await;
                sent.map_err(|_| EarlyEvent::StreamEnded)?;
            }
            let Some(bytes) = self.kept.get(cursor.next) else {
                break;
            };
            cursor.current = bytes.clone();
            cursor.next += 1;
        }
        if self.eof && !cursor.finished {
            cursor.announce()?;
            cursor.finished = true;
            send.finish();
        }
        Ok(())
    }

    /// Returns the bytes that the stream still needs after a successful dial, and the number of bytes
    /// that it has.
    pub(super) fn rest(&self, cursor: Cursor) -> (Progress, usize) {
        let mut rest = BytesMut::from(cursor.current);
        self.kept[cursor.next..]
            .iter()
            .for_each(|bytes| rest.extend_from_slice(bytes));
        let given = self.len - rest.len();
        let pending = rest.freeze();
        (Progress::new(pending, self.eof), given)
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::rc::Rc;

    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;
    use tokio::sync::Notify;
    use tunnel_proto::close::CloseReason;

    use super::*;
    use cpc_datapath::stream::SendEnd;

    /// Keeps what it is given.
    #[derive(Default)]
    struct Recorder {
        bytes: Vec<u8>,
        finished: Rc<Notify>,
        is_finished: bool,
    }

    impl SendHalf for Recorder {
        async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
            self.bytes.extend_from_slice(&std::mem::take(chunk));
            Ok(())
        }

        fn finish(&mut self) {
            self.is_finished = true;
            self.finished.notify_one();
        }

        fn reset(&mut self, _: CloseReason) {}

        fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
            pending()
        }
    }

    /// A caller that notes the report knows of every stream that may have carried a request.
    #[tokio::test]
    async fn a_stream_carries_nothing_before_the_report() {
        for is_empty in [false, true] {
            let (mut client, local) = UnixStream::pair().unwrap();
            if !is_empty {
                client.write_all(b"request").await.unwrap();
            }
            client.shutdown().await.unwrap();
            let mut early = EarlyBytes::new(Early::Send, Bytes::new());
            // One stream is reported, and so is the next that carries the same.
            for _ in 0..2 {
                let (mut cursor, mut stream) = (Cursor::default(), Recorder::default());
                let event = early.pump(&local, Some(&mut stream), &mut cursor).await;
                assert_eq!(event, EarlyEvent::BeforeFirstByte);
                assert!(stream.bytes.is_empty() && !stream.is_finished);
                let finished = stream.finished.clone();
                tokio::select! {
                    event = early.pump(&local, Some(&mut stream), &mut cursor) => panic!("{event:?}"),
                    () = finished.notified() => {}
                }
                let expected: &[u8] = if is_empty { b"" } else { b"request" };
                assert!(stream.bytes == expected && stream.is_finished);
            }
        }
    }
}
