//! The sending half of a stream.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http::HeaderMap;

use super::{Status, StreamEnd};

/// A sender of framed packets. Dropped before [`finish`](Self::finish), and with its receiver, the
/// stream is reset.
#[derive(Debug)]
pub(crate) struct PacketSender {
    stream: SendStream<Bytes>,
    side: Side,
}

/// Side of a stream, which determines how its half ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

impl PacketSender {
    pub(super) fn new(stream: SendStream<Bytes>, side: Side) -> Self {
        Self { stream, side }
    }

    /// Sends bytes of framed packets, waiting for credit; leaves `bytes` empty. Cancelling loses
    /// nothing: unsent bytes are still in `bytes`, and must be sent before anything else.
    ///
    /// # Errors
    /// [`StreamEnd`]; the stream takes no more.
    pub(crate) async fn send(&mut self, bytes: &mut Bytes) -> Result<(), StreamEnd> {
        poll_fn(|cx| self.poll_send(cx, bytes)).await
    }

    /// Polls a send as [`send`](Self::send) does, for several futures of one task.
    ///
    /// # Errors
    /// [`StreamEnd`]; the stream takes no more.
    pub(crate) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &mut Bytes,
    ) -> Poll<Result<(), StreamEnd>> {
        loop {
            self.try_send(bytes)?;
            if bytes.is_empty() {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.stream.poll_capacity(cx)) {
                Some(room) => room?,
                None => return Poll::Ready(Err(self.end())),
            };
        }
    }

    /// Sends as much as there is credit for, and leaves the rest in `bytes`, to be sent before anything
    /// else.
    ///
    /// # Errors
    /// [`StreamEnd`]; the stream takes no more.
    pub(crate) fn try_send(&mut self, bytes: &mut Bytes) -> Result<(), StreamEnd> {
        while !bytes.is_empty() {
            self.stream.reserve_capacity(bytes.len());
            let room = self.stream.capacity();
            if room == 0 {
                break;
            }
            let piece = bytes.split_to(room.min(bytes.len()));
            self.stream
                .send_data(piece, false)
                .map_err(|_| self.end())?;
        }
        Ok(())
    }

    /// Queues the last bytes, regardless of credit: they are kept until there is some, or until the
    /// stream has ended.
    pub(crate) fn send_last(&mut self, bytes: Bytes) {
        // Fails only where the stream has ended before.
        let _ = self.stream.send_data(bytes, false);
    }

    /// Waits until the stream is reset or its connection lost, while nothing is sent.
    pub(crate) async fn reset(&mut self) -> StreamEnd {
        poll_fn(|cx| self.poll_reset(cx)).await
    }

    /// Polls for a reset as [`reset`](Self::reset) does, for several futures of one task.
    pub(crate) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamEnd> {
        Poll::Ready(match ready!(self.stream.poll_reset(cx)) {
            Ok(reason) => StreamEnd::Reset(reason),
            Err(error) => StreamEnd::Lost(Arc::new(error)),
        })
    }

    /// Ends our half behind the sent bytes. A server's half carries `status`, a client's has none.
    pub(crate) fn finish(&mut self, status: &Status) {
        // Fails only where the stream has ended before.
        let _ = match self.side {
            Side::Server => {
                let mut trailers = HeaderMap::new();
                status.write(&mut trailers);
                self.stream.send_trailers(trailers)
            }
            Side::Client => self.stream.send_data(Bytes::new(), true),
        };
    }

    /// Resets the stream: sent bytes may be discarded.
    pub(crate) fn abort(&mut self) {
        self.stream.send_reset(Reason::CANCEL);
    }

    /// Returns the reason why the stream takes nothing.
    fn end(&mut self) -> StreamEnd {
        // There is nothing more to be woken for.
        match self.poll_reset(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(end) => end,
            Poll::Pending => StreamEnd::Closed,
        }
    }
}
