//! What the datapath needs of a link's stream: owned chunks with credit, and the three ends that
//! `AsyncRead` and `AsyncWrite` can't tell apart: finish, reset, stop.

use std::future::Future;

use bytes::Bytes;
use tunnel_proto::close::CloseReason;

/// Why a send half takes no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendEnd {
    /// It was finished and the peer has all of it.
    Acknowledged,
    /// The peer reads no more.
    Stopped(CloseReason),
    /// The link is gone.
    Link(CloseReason),
}

/// Why a receive half gives no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecvEnd {
    /// The peer finished; everything it sent has been read.
    Finished,
    /// The peer gave up.
    Reset(CloseReason),
    /// The link is gone.
    Link(CloseReason),
}

/// The half of a stream that bytes are put into. Dropped without [`finish`](Self::finish), the
/// peer must see a reset.
pub trait SendHalf {
    /// Hands over `chunk`, waiting for credit; leaves it empty. Cancelling loses nothing: what has
    /// not been taken is still in `chunk`.
    fn send(&mut self, chunk: &mut Bytes) -> impl Future<Output = Result<(), SendEnd>>;
    /// No more will follow.
    fn finish(&mut self);
    /// Whether the far side learns of a finish at once only where nothing is wanted of it any more.
    fn lingers(&self) -> bool {
        false
    }
    /// No more will follow, and it is known that what comes back is wanted. Where nothing
    /// [lingers](Self::lingers) this is [`finish`](Self::finish).
    fn finish_half(&mut self) {
        self.finish();
    }
    /// What was sent may be discarded.
    fn reset(&mut self, reason: CloseReason);
    /// Waits for the end of this half, also while nothing is sent.
    fn stopped(&self) -> impl Future<Output = SendEnd> + use<Self>;
}

/// The half of a stream that bytes come out of. Dropped before its end, the peer must be told to
/// stop.
pub trait RecvHalf {
    /// Waits for bytes and appends what is there, in order. Cancelling loses nothing.
    fn recv(&mut self, into: &mut Vec<Bytes>) -> impl Future<Output = Result<(), RecvEnd>>;
    /// Waits until the peer gives up, while nothing is received. Never completes when it has
    /// finished, or when the link is lost: what has arrived by then is still there to be received.
    fn reset(&mut self) -> impl Future<Output = CloseReason>;
    /// Nothing more will be read.
    fn stop(&mut self, reason: CloseReason);
    /// Whether what waits to be received, and what was given last, is charged to a budget by the link.
    fn is_charged(&self) -> bool {
        false
    }
}
