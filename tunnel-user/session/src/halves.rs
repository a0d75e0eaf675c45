//! The two halves of a tunnel's stream that carries a session, or a connection that is none.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tunnel_proto::close::CloseReason;

use super::carried::Carried;
use super::session::Hold;
use cpc_datapath::stream::{Held, RecvEnd, RecvHalf, SendEnd, SendHalf};
use cpc_transport::tunnel::{Recv, Send, TunnelRecv, TunnelSend};

/// The sending half.
#[derive(Debug)]
pub struct SessionSend {
    stream: Send,
    session: Option<Rc<Carried>>,
}

impl SessionSend {
    /// Wraps the half of a stream that carries `session`, if any.
    pub fn new(mut stream: Send, session: Option<Rc<Carried>>) -> Self {
        // The end of file may be all that the other end lacks.
        let is_done = |session: &Rc<Carried>| {
            let is_done = session.change(|state| {
                let outbound = &state.session.outbound;
                outbound.is_done() || outbound.is_confirmed_to_its_end()
            });
            is_done == Some(true)
        };
        if session.as_ref().is_some_and(is_done) {
            stream.finish();
        }
        Self { stream, session }
    }

    /// Returns the half of the stream, for what is not part of the session.
    pub fn stream(&mut self) -> &mut Send {
        &mut self.stream
    }

    /// Returns the session, if the stream carries one.
    pub fn session(&self) -> Option<&Rc<Carried>> {
        self.session.as_ref()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Bytes) -> Poll<Result<(), SendEnd>> {
        let Self { stream, session } = self;
        let Some(session) = session else {
            return stream.poll_send(cx, chunk);
        };
        // Before each wait: the session itself may end it.
        session.wait(cx);
        if let Some(reason) = session.reset() {
            return Poll::Ready(Err(SendEnd::Stopped(reason)));
        }
        if session.is_evicted() {
            return Poll::Ready(Err(MOVED_SEND));
        }
        if session.is_refused() {
            return Poll::Ready(Err(SendEnd::Stopped(CloseReason::PeerGone)));
        }
        while let Some(mut again) = session.change(|state| state.resend().cloned()).flatten() {
            let length = again.len();
            let sent = stream.poll_send(cx, &mut again);
            let n = length - again.len();
            session.change(|state| {
                state.resent(n);
                if let Some(first) = state.resend() {
                    *first = again;
                }
            });
            ready!(sent).map_err(|end| moved(session, end))?;
        }
        let keeps = session.change(|state| state.keeps().then(|| state.has_room()));
        let copy = match keeps.flatten() {
            None => None,
            Some(true) => Some(chunk.clone()),
            Some(false) if chunk.is_empty() => None,
            Some(false) => return poll_stopped(stream, session, cx),
        };
        let length = chunk.len();
        // A poll without bytes asks nothing of the window.
        let room = match length {
            0 => None,
            _ => session.change(|state| state.room()),
        };
        let room = room.map_or(usize::MAX, |room| {
            usize::try_from(room).unwrap_or(usize::MAX)
        });
        if room >= length {
            let sent = stream.poll_send(cx, chunk);
            session.sent(copy, length - chunk.len());
            return sent.map_err(|end| moved(session, end));
        }
        if room > 0 {
            let mut part = chunk.slice(..room);
            let sent = stream.poll_send(cx, &mut part);
            let n = room - part.len();
            chunk.advance(n);
            session.sent(copy, n);
            ready!(sent).map_err(|end| moved(session, end))?;
        }
        poll_stopped(stream, session, cx)
    }
}

/// Waits for the end of a half that may send nothing until the other end has confirmed more: that wakes the relay.
fn poll_stopped(
    stream: &mut Send,
    session: &Carried,
    cx: &mut Context<'_>,
) -> Poll<Result<(), SendEnd>> {
    if let Poll::Ready(end) = stream.poll_stopped(cx) {
        return Poll::Ready(Err(moved(session, end)));
    }
    let lost = session.lost().map(|reason| Err(SendEnd::Link(reason)));
    lost.map_or(Poll::Pending, Poll::Ready)
}

impl SendHalf for SessionSend {
    fn send(&mut self, chunk: &mut Bytes) -> impl Future<Output = Result<(), SendEnd>> {
        poll_fn(|cx| self.poll_send(cx, chunk))
    }

    fn finish(&mut self) {
        if let Some(session) = &self.session {
            session.change(|state| state.session.outbound.end());
        }
        self.stream.finish();
    }

    fn reset(&mut self, reason: CloseReason) {
        if let Some(session) = &self.session {
            session.change(|state| state.abort(reason));
        }
        self.stream.reset(reason);
    }

    fn held(&self) -> Option<Held> {
        self.session.as_ref()?.progress()
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        Ended {
            stream: Some(self.stream.ended()),
            session: self.session.clone(),
        }
    }
}

impl Drop for SessionSend {
    fn drop(&mut self) {
        if let Some(session) = &self.session {
            if session.is_evicted() {
                self.stream.reset(MOVED);
            }
            session.orphan();
        }
    }
}

/// Reason with which a stream ends whose session goes on over another tunnel.
const MOVED: CloseReason = CloseReason::Replaced;

/// End of a half that the relay sees then.
const MOVED_SEND: SendEnd = SendEnd::Link(MOVED);

/// Returns what `end` means for the relay: the other end may have moved a session that both hold.
fn moved(session: &Carried, end: SendEnd) -> SendEnd {
    match end {
        SendEnd::Stopped(MOVED) if session.is_held() => MOVED_SEND,
        end => end,
    }
}

/// A future that waits for the end of a sending half.
struct Ended {
    /// `None` once the transport of the other end has everything.
    stream: Option<<Send as TunnelSend>::Ended>,
    session: Option<Rc<Carried>>,
}

impl Future for Ended {
    type Output = SendEnd;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<SendEnd> {
        let Self { stream, session } = &mut *self;
        let Some(session) = session else {
            return match stream {
                Some(stream) => Pin::new(stream).poll(cx),
                None => Poll::Pending,
            };
        };
        session.wait(cx);
        if let Some(reason) = session.reset() {
            return Poll::Ready(SendEnd::Stopped(reason));
        }
        // What the other end has confirmed counts before the end of a stream.
        if session.is_refused() {
            return Poll::Ready(SendEnd::Stopped(CloseReason::PeerGone));
        }
        if session.change(|state| state.session.outbound.is_done()) == Some(true) {
            return Poll::Ready(SendEnd::Acknowledged);
        }
        if session.is_evicted() {
            return Poll::Ready(MOVED_SEND);
        }
        if let Some(waiting) = stream
            && let Poll::Ready(end) = Pin::new(waiting).poll(cx)
        {
            match moved(session, end) {
                SendEnd::Acknowledged => {
                    *stream = None;
                    session.change(|state| state.session.outbound.acknowledge());
                }
                end => {
                    session.change(|state| match end {
                        SendEnd::Stopped(CloseReason::PeerGone) => state.stopped_by_peer(),
                        SendEnd::Stopped(reason) => state.reset_by_peer(reason),
                        SendEnd::Acknowledged | SendEnd::Link(_) => {}
                    });
                    return Poll::Ready(end);
                }
            }
        }
        match session.change(|state| state.session.is_outbound_over()) {
            Some(true) => Poll::Ready(SendEnd::Acknowledged),
            Some(false) => match session.lost() {
                // The stream itself has nothing more to tell.
                Some(reason) if stream.is_none() => Poll::Ready(SendEnd::Link(reason)),
                _ => Poll::Pending,
            },
            None => Poll::Ready(SendEnd::Link(CloseReason::LinkLost)),
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct SessionRecv {
    stream: Recv,
    session: Option<Rc<Carried>>,
}

impl SessionRecv {
    /// Wraps the half of a stream that carries `session`, if any.
    pub fn new(stream: Recv, session: Option<Rc<Carried>>) -> Self {
        Self { stream, session }
    }

    /// Returns the half of the stream, for what is not part of the session.
    pub fn stream(&mut self) -> &mut Recv {
        &mut self.stream
    }

    /// Notes, on the server, that the agent has the session. Notices about it may follow.
    pub fn begun(&self) {
        if let Some(session) = &self.session {
            session.begun();
        }
    }

    fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut Vec<Bytes>,
    ) -> Poll<Result<(), RecvEnd>> {
        let Some(session) = &self.session else {
            return self.stream.poll_recv(cx, into);
        };
        if session.is_evicted() {
            return Poll::Ready(Err(RecvEnd::Link(MOVED)));
        }
        let before = into.len();
        let received = self.stream.poll_recv(cx, into);
        match &received {
            Poll::Ready(Ok(())) => {
                let n: usize = into[before..].iter().map(Bytes::len).sum();
                let taken = session.change(|state| state.session.inbound.receive(n as u64));
                session.offer_if_large();
                if let Some(Err(violation)) = taken {
                    tracing::warn!(%violation, "the peer broke the protocol of sessions");
                    return Poll::Ready(Err(RecvEnd::Reset(CloseReason::ProtocolError)));
                }
            }
            Poll::Ready(Err(RecvEnd::Finished)) => {
                session.change(|state| state.session.inbound.end());
            }
            Poll::Ready(Err(RecvEnd::Reset(MOVED))) if session.is_held() => {
                return Poll::Ready(Err(RecvEnd::Link(MOVED)));
            }
            Poll::Ready(Err(RecvEnd::Reset(reason))) => {
                session.change(|state| state.reset_by_peer(*reason));
            }
            Poll::Ready(Err(RecvEnd::Link(_))) => {}
            Poll::Pending => {
                session.wait(cx);
                if let Some(reason) = session.reset() {
                    return Poll::Ready(Err(RecvEnd::Reset(reason)));
                }
            }
        }
        received
    }
}

impl RecvHalf for SessionRecv {
    fn recv(&mut self, into: &mut Vec<Bytes>) -> impl Future<Output = Result<(), RecvEnd>> {
        poll_fn(|cx| self.poll_recv(cx, into))
    }

    fn reset(&mut self) -> impl Future<Output = CloseReason> {
        poll_fn(|cx| {
            let reset = self.stream.poll_reset(cx);
            let Some(session) = &self.session else {
                return reset;
            };
            match reset {
                // The eviction wakes the relay, and `lost` tells it.
                Poll::Ready(MOVED) if session.is_held() => {
                    session.evict();
                    Poll::Pending
                }
                Poll::Ready(reason) => {
                    session.change(|state| state.reset_by_peer(reason));
                    reset
                }
                Poll::Pending => {
                    session.wait(cx);
                    session.reset().map_or(Poll::Pending, Poll::Ready)
                }
            }
        })
    }

    fn lost(&self) -> impl Future<Output = CloseReason> + use<> {
        let session = self.session.clone();
        poll_fn(move |cx| {
            let Some(session) = &session else {
                return Poll::Pending;
            };
            session.wait(cx);
            if session.is_evicted() {
                return Poll::Ready(MOVED);
            }
            // What has arrived of other connections is all that is left of them.
            let lost = session.lost().filter(|_| session.is_safe());
            lost.map_or(Poll::Pending, Poll::Ready)
        })
    }

    fn accepted(&mut self, n: usize) {
        if let Some(session) = &self.session
            && n > 0
        {
            session.accepted(n);
        }
    }

    fn finished(&mut self) {
        self.note(|state| state.session.inbound.finish());
    }

    fn stop(&mut self, reason: CloseReason) {
        self.note(|state| match reason {
            CloseReason::PeerGone => state.session.inbound.refuse(),
            reason => state.abort(reason),
        });
        self.stream.stop(reason);
    }

    fn is_charged(&self) -> bool {
        self.stream.is_charged()
    }
}

impl Drop for SessionRecv {
    fn drop(&mut self) {
        if self.session.as_ref().is_some_and(|it| it.is_evicted()) {
            self.stream.stop(MOVED);
        }
    }
}

impl SessionRecv {
    /// Makes a change that the other end of a held session is told at once.
    fn note(&self, change: impl FnOnce(&mut super::state::SessionState)) {
        if let Some(session) = &self.session {
            let hold = session.change(|state| {
                change(state);
                state.session.hold()
            });
            if hold.is_some_and(|hold| hold != Hold::Plain) {
                session.queue(true);
            }
        }
    }
}
