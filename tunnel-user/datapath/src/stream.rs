//! The interface of a link's stream to the datapath: owned chunks with credit, and the three ends that
//! `AsyncRead` and `AsyncWrite` can't tell apart: finish, reset, stop.

use std::future::Future;

use bytes::Bytes;
use tunnel_proto::close::CloseReason;
use tunnel_proto::resumption::SessionId;

/// End of a send half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendEnd {
    /// The half was finished and the peer has all of it.
    Acknowledged,
    /// The peer reads no more.
    Stopped(CloseReason),
    /// The link was lost.
    Link(CloseReason),
}

/// End of a receive half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecvEnd {
    /// The peer finished; all its data has been read.
    Finished,
    /// The peer reset the stream.
    Reset(CloseReason),
    /// The link was lost.
    Link(CloseReason),
}

/// Progress of a session that both ends hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Name.
    pub id: SessionId,
    /// Number of bytes taken from the local socket.
    pub taken: u64,
    /// Number of these that the other end needs no more.
    pub confirmed: u64,
    /// Number of bytes that the local socket has taken.
    pub written: u64,
}

/// The sending half of a stream. Dropped without [`finish`](Self::finish), the peer must see a reset.
pub trait SendHalf {
    /// Sends `chunk`, waiting for credit; leaves it empty. Cancelling loses nothing: unsent bytes are
    /// still in `chunk`.
    fn send<'a>(&'a mut self, chunk: &'a mut Bytes) -> impl Future<Output = Result<(), SendEnd>>;
    /// Ends the half: no more will follow.
    fn finish(&mut self);
    /// Whether the far side learns of a finish at once only where it need not send any more.
    fn lingers(&self) -> bool {
        false
    }
    /// Ends the half while the other one goes on: the far side may still answer. Without
    /// [lingering](Self::lingers) this is [`finish`](Self::finish).
    fn finish_half(&mut self) {
        self.finish();
    }
    /// Resets the half. Sent data may be discarded.
    fn reset(&mut self, reason: CloseReason);
    /// Waits for the end of this half, also while nothing is sent.
    fn stopped(&self) -> impl Future<Output = SendEnd> + use<Self>;
    /// Returns the progress of the session on the stream, if both ends hold one.
    fn held(&self) -> Option<Held> {
        None
    }
}

/// The receiving half of a stream. Dropped before its end, it must send a stop to the peer.
pub trait RecvHalf {
    /// Waits for bytes and appends the available ones, in order. Cancelling loses nothing.
    fn recv<'a>(
        &'a mut self,
        into: &'a mut Vec<Bytes>,
    ) -> impl Future<Output = Result<(), RecvEnd>>;
    /// Waits for a reset by the peer, while nothing is received. Never completes when the peer has
    /// finished, or when the link is lost: data that has arrived by then can still be received.
    fn reset(&mut self) -> impl Future<Output = CloseReason>;
    /// Waits until the half is to be given up, whatever of it is unread: another stream brings it again.
    /// Never completes for most links.
    fn lost(&self) -> impl Future<Output = CloseReason> + use<Self> {
        std::future::pending()
    }
    /// Notes that the local socket has taken the next `n` received bytes.
    fn accepted(&mut self, n: usize) {
        let _ = n;
    }
    /// Notes that the end of file, behind all bytes, was passed on.
    fn finished(&mut self) {}
    /// Stops the half: nothing more will be read.
    fn stop(&mut self, reason: CloseReason);
    /// Whether the link charges a budget for the data that waits to be received and for the last
    /// received data.
    fn is_charged(&self) -> bool {
        false
    }
}
