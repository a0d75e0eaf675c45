//! The two halves of a QUIC stream as the datapath sees them.
//!
//! Invariant: a half that is dropped before its orderly end tells the peer so. quinn finishes a
//! `SendStream` on drop, which would turn an error or a cancelled task into a clean end of file.

use bytes::{Bytes, BytesMut};
use quinn::{ReadError, StoppedError, WriteError};
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::PrefaceError;

use super::{error_code, link_reason, reason_of};
use crate::datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};

/// The most that is taken from a stream at once, in chunks: one vectored write's worth.
const CHUNKS: usize = 32;

/// Sends; resets on drop unless finished.
#[derive(Debug)]
pub struct Send {
    inner: quinn::SendStream,
    ended: bool,
}

impl Send {
    /// Wraps a fresh stream.
    pub fn new(inner: quinn::SendStream) -> Self {
        Self {
            inner,
            ended: false,
        }
    }
}

impl SendHalf for Send {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        while !chunk.is_empty() {
            // Changes `chunk` only when it completes, so cancelling loses nothing.
            self.inner
                .write_chunks(std::slice::from_mut(chunk))
                .await
                .map_err(|e| match e {
                    WriteError::Stopped(code) => SendEnd::Stopped(reason_of(code)),
                    WriteError::ConnectionLost(e) => SendEnd::Link(link_reason(&e)),
                    WriteError::ClosedStream | WriteError::ZeroRttRejected => {
                        SendEnd::Link(CloseReason::Internal)
                    }
                })?;
        }
        Ok(())
    }

    fn finish(&mut self) {
        self.ended = true;
        // Fails only when the stream has been stopped or reset: then it has ended as well.
        let _ = self.inner.finish();
    }

    fn reset(&mut self, reason: CloseReason) {
        self.ended = true;
        let _ = self.inner.reset(error_code(reason));
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        let stopped = self.inner.stopped();
        async {
            match stopped.await {
                Ok(Some(code)) => SendEnd::Stopped(reason_of(code)),
                Ok(None) => SendEnd::Acknowledged,
                Err(StoppedError::ConnectionLost(e)) => SendEnd::Link(link_reason(&e)),
                Err(StoppedError::ZeroRttRejected) => SendEnd::Link(CloseReason::Internal),
            }
        }
    }
}

impl Drop for Send {
    fn drop(&mut self) {
        if !self.ended {
            self.reset(CloseReason::Aborted);
        }
    }
}

/// Receives; asks the peer to stop on drop unless the end was reached.
#[derive(Debug)]
pub struct Recv {
    inner: quinn::RecvStream,
    /// Bytes behind the head that have been read with it.
    unread: Vec<Bytes>,
    ended: bool,
}

/// Why there is no head.
#[derive(Debug, thiserror::Error)]
pub enum HeadError {
    /// The peer sent something else.
    #[error(transparent)]
    Malformed(#[from] PrefaceError),
    /// The stream ended before it.
    #[error("the stream ended early")]
    End(RecvEnd),
}

impl Recv {
    /// Wraps a fresh stream.
    pub fn new(inner: quinn::RecvStream) -> Self {
        Self {
            inner,
            unread: Vec::new(),
            ended: false,
        }
    }

    /// Reads what stands at the head of the stream. What follows it is there to be received.
    /// Cancelling loses what was read: give the stream up then.
    ///
    /// # Errors
    /// [`HeadError`].
    pub async fn read_head<T>(
        &mut self,
        decode: impl Fn(&[u8]) -> Result<Option<(T, usize)>, PrefaceError>,
    ) -> Result<T, HeadError> {
        // `decode` bounds it: a head that is too long is malformed.
        let mut head = BytesMut::new();
        loop {
            let mut chunks = Vec::new();
            self.recv(&mut chunks).await.map_err(HeadError::End)?;
            chunks
                .iter()
                .for_each(|chunk| head.extend_from_slice(chunk));
            if let Some((message, used)) = decode(&head)? {
                let rest = head.freeze().slice(used..);
                if !rest.is_empty() {
                    self.unread.push(rest);
                }
                return Ok(message);
            }
        }
    }
}

impl RecvHalf for Recv {
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        if !self.unread.is_empty() {
            into.append(&mut self.unread);
            return Ok(());
        }
        let mut chunks = [const { Bytes::new() }; CHUNKS];
        match self.inner.read_chunks(&mut chunks).await {
            Ok(Some(n)) => {
                into.extend(chunks.into_iter().take(n));
                Ok(())
            }
            Ok(None) => {
                self.ended = true;
                Err(RecvEnd::Finished)
            }
            Err(ReadError::Reset(code)) => {
                self.ended = true;
                Err(RecvEnd::Reset(reason_of(code)))
            }
            Err(ReadError::ConnectionLost(e)) => Err(RecvEnd::Link(link_reason(&e))),
            Err(
                ReadError::ClosedStream
                | ReadError::IllegalOrderedRead
                | ReadError::ZeroRttRejected,
            ) => Err(RecvEnd::Link(CloseReason::Internal)),
        }
    }

    async fn reset(&mut self) -> CloseReason {
        match self.inner.received_reset().await {
            Ok(Some(code)) => {
                self.ended = true;
                reason_of(code)
            }
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    fn stop(&mut self, reason: CloseReason) {
        self.ended = true;
        let _ = self.inner.stop(error_code(reason));
    }
}

impl Drop for Recv {
    fn drop(&mut self) {
        if !self.ended {
            self.stop(CloseReason::Aborted);
        }
    }
}
