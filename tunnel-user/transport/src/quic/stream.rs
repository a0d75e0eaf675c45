//! The two halves of a QUIC stream as the datapath sees them.
//!
//! Invariant: a half that is dropped before its orderly end tells the peer. quinn-proto forgets nothing
//! by itself: a half that is neither finished nor reset would stay open until the connection ends.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use quinn_proto::{FinishError, StreamId, WriteError};
use tunnel_proto::close::CloseReason;

use super::connection::{Inner, State};
use super::reassembly::{Read, Reassembly};
use super::send_scheduler::Turn;
use super::waiting::Interest;
use super::{error_code, reason_of};
use crate::tunnel::{TunnelError, TunnelRecv, TunnelSend};
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};

/// The sending half; resets on drop unless finished.
#[derive(Debug)]
pub struct Send {
    connection: Rc<Inner>,
    id: StreamId,
    ended: bool,
    turn: Turn,
}

impl Send {
    pub(super) fn new(connection: Rc<Inner>, id: StreamId) -> Self {
        connection.state().senders += 1;
        Self {
            connection,
            id,
            ended: false,
            turn: Turn::default(),
        }
    }
}

impl TunnelSend for Send {
    type Ended = Ended;

    fn ended(&self) -> Ended {
        Ended(self.connection.clone(), self.id)
    }

    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<SendEnd> {
        let mut state = self.connection.state();
        match send_end(&mut state, self.id) {
            Some(end) => Poll::Ready(end),
            None => {
                // A stop wakes writers, too.
                state.wait(self.id, Interest::Write, cx.waker());
                Poll::Pending
            }
        }
    }

    /// Gives the stream the highest priority, without turns.
    fn go_first(&mut self) {
        let priority = self.turn.go_first();
        let mut state = self.connection.state();
        state.vital = Some(self.id);
        // Fails only when the stream has ended.
        let _ = state.proto.send_stream(self.id).set_priority(priority);
    }

    fn tunnel_error(&self) -> Option<TunnelError> {
        self.connection.state().tunnel_error()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Bytes) -> Poll<Result<(), SendEnd>> {
        let mut state = self.connection.state();
        while !chunk.is_empty() {
            if let Err(error) = state.check() {
                return Poll::Ready(Err(SendEnd::Link(state.reason_of(&error))));
            }
            if !self.turn.allows_more(&state.send_scheduler) {
                // The driver's next pass tells whether there is anything to wait for.
                self.connection.note(&mut state);
                state.wait_for_turn(self.id, cx.waker());
                return Poll::Pending;
            }
            let priority = self.turn.priority(chunk.len());
            let mut stream = state.proto.send_stream(self.id);
            if let Some(priority) = priority {
                // Fails only when the stream has ended.
                let _ = stream.set_priority(priority);
            }
            match stream.write_chunks(std::slice::from_mut(chunk)) {
                Ok(written) => {
                    self.turn.add(written.bytes);
                    self.connection.note(&mut state);
                }
                Err(WriteError::Blocked) => {
                    // The peer is told that it holds us up.
                    self.connection.note(&mut state);
                    state.wait(self.id, Interest::Write, cx.waker());
                    return Poll::Pending;
                }
                Err(WriteError::Stopped(code)) => {
                    return Poll::Ready(Err(SendEnd::Stopped(reason_of(code))));
                }
                Err(WriteError::ClosedStream) => {
                    let ended = state.ended(self.id).map(SendEnd::Stopped);
                    let end = ended.unwrap_or(SendEnd::Link(CloseReason::Internal));
                    return Poll::Ready(Err(end));
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Returns the end of the sending half, if it has ended.
fn send_end(state: &mut State, id: StreamId) -> Option<SendEnd> {
    if let Some(reason) = state.ended(id) {
        return Some(SendEnd::Stopped(reason));
    }
    match state.proto.send_stream(id).stopped() {
        Ok(Some(code)) => Some(SendEnd::Stopped(reason_of(code))),
        // Its state goes with the last acknowledgement.
        Err(_) => Some(SendEnd::Acknowledged),
        Ok(None) => {
            let error = state.check().err()?;
            Some(SendEnd::Link(state.reason_of(&error)))
        }
    }
}

impl SendHalf for Send {
    fn send(&mut self, chunk: &mut Bytes) -> impl Future<Output = Result<(), SendEnd>> {
        poll_fn(|cx| self.poll_send(cx, chunk))
    }

    fn finish(&mut self) {
        self.ended = true;
        let mut state = self.connection.state();
        let mut stream = state.proto.send_stream(self.id);
        if let Err(FinishError::Stopped(code)) = stream.finish() {
            // Nothing more arrives, but the stream lives on until the peer is told so.
            let _ = stream.reset(code);
        }
        self.connection.note(&mut state);
    }

    fn reset(&mut self, reason: CloseReason) {
        self.ended = true;
        let mut state = self.connection.state();
        // Fails only when the stream has ended.
        let _ = state.proto.send_stream(self.id).reset(error_code(reason));
        self.connection.note(&mut state);
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        self.ended()
    }
}

/// A future that waits for the end of a sending half.
#[derive(Debug)]
pub struct Ended(Rc<Inner>, StreamId);

impl Future for Ended {
    type Output = SendEnd;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<SendEnd> {
        let &Self(ref connection, id) = &*self;
        let mut state = connection.state();
        if state.still_waits(id, Interest::Ended, cx.waker()) {
            return Poll::Pending;
        }
        match send_end(&mut state, id) {
            Some(end) => Poll::Ready(end),
            None => {
                state.wait(id, Interest::Ended, cx.waker());
                Poll::Pending
            }
        }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.state().forget(self.1, Interest::Ended);
    }
}

impl Drop for Send {
    fn drop(&mut self) {
        if !self.ended {
            self.reset(CloseReason::Aborted);
        }
        let mut state = self.connection.state();
        let mut stream = state.proto.send_stream(self.id);
        if let Ok(Some(code)) = stream.stopped()
            && stream.reset(code).is_ok()
        {
            // A peer that has stopped it after its end counts on a reset (RFC 9000 section 3.5).
            self.connection.note(&mut state);
        }
        state.forget(self.id, Interest::Write);
        state.senders -= 1;
    }
}

/// The receiving half; asks the peer to stop on drop unless the end was reached.
#[derive(Debug)]
pub struct Recv {
    connection: Rc<Inner>,
    id: StreamId,
    /// Bytes behind the head that were read with it; rarely any.
    unread: Option<Box<Bytes>>,
    /// End that came with the last bytes.
    end: Option<RecvEnd>,
    ended: bool,
    /// Whether the last read found nothing.
    is_empty: bool,
    reassembly: Reassembly,
}

impl Recv {
    pub(super) fn new(connection: Rc<Inner>, id: StreamId) -> Self {
        Self {
            connection,
            id,
            unread: None,
            end: None,
            ended: false,
            is_empty: false,
            reassembly: Reassembly::default(),
        }
    }

    /// Takes the available bytes; `Pending` when there are none.
    fn poll_available(&mut self, cx: &mut Context<'_>, into: &mut Vec<Bytes>) -> Poll<RecvEnd> {
        let mut state = self.connection.state();
        // A relay is polled for either direction: one that has no news costs next to nothing.
        if self.is_empty && state.still_waits(self.id, Interest::Read, cx.waker()) {
            return Poll::Pending;
        }
        self.is_empty = false;
        state.ledger.passed_on(self.id);
        let before = into.len();
        let Some(Read { mut end, credit }) = self.reassembly.read(self.id, &mut state, into) else {
            // We have ended it.
            let reason = state.ended(self.id).map(RecvEnd::Reset);
            return Poll::Ready(reason.unwrap_or(RecvEnd::Link(CloseReason::Internal)));
        };
        if state.ledger.is_too_far_ahead(self.id) {
            state.end_stream(self.id, CloseReason::MemoryLimit);
            end = Some(RecvEnd::Reset(CloseReason::MemoryLimit));
        }
        // An end gives credit for another stream.
        if credit || end.is_some() {
            self.connection.note(&mut state);
        }
        if let Some(end) = end {
            return Poll::Ready(end);
        }
        if into.len() == before {
            if let Err(error) = state.check() {
                return Poll::Ready(RecvEnd::Link(state.reason_of(&error)));
            }
            state.wait(self.id, Interest::Read, cx.waker());
            self.is_empty = true;
        }
        Poll::Pending
    }
}

impl RecvHalf for Recv {
    fn recv(&mut self, into: &mut Vec<Bytes>) -> impl Future<Output = Result<(), RecvEnd>> {
        poll_fn(|cx| self.poll_recv(cx, into))
    }

    fn reset(&mut self) -> impl Future<Output = CloseReason> {
        poll_fn(|cx| self.poll_reset(cx))
    }

    fn stop(&mut self, reason: CloseReason) {
        self.ended = true;
        let mut state = self.connection.state();
        // What is there may be all of it: then nothing stays.
        let is_over = self.reassembly.discard(self.id, &mut state);
        if !is_over && let Ok(()) = state.proto.recv_stream(self.id).stop(error_code(reason)) {
            state.ledger.stopped(self.id);
        }
        state.ledger.forget(self.id);
        self.connection.note(&mut state);
    }

    fn is_charged(&self) -> bool {
        true
    }
}

impl TunnelRecv for Recv {
    /// Takes the available bytes, and last the end.
    fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut Vec<Bytes>,
    ) -> Poll<Result<(), RecvEnd>> {
        if let Some(unread) = self.unread.take() {
            into.push(*unread);
            return Poll::Ready(Ok(()));
        }
        if let Some(end) = self.end {
            return Poll::Ready(Err(end));
        }
        let before = into.len();
        let polled = self.poll_available(cx, into);
        let some = into.len() > before;
        match polled {
            Poll::Ready(end) => {
                if !matches!(end, RecvEnd::Link(_)) {
                    self.ended = true;
                    self.end = Some(end);
                }
                Poll::Ready(if some { Ok(()) } else { Err(end) })
            }
            Poll::Pending if some => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
        }
    }

    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<CloseReason> {
        if self.ended {
            return Poll::Pending;
        }
        // There may be bytes without a reader.
        self.is_empty = false;
        let mut state = self.connection.state();
        let reason = match state.ended(self.id) {
            Some(reason) => reason,
            None => match state.proto.recv_stream(self.id).received_reset() {
                Ok(Some(code)) => {
                    state.ledger.stopped(self.id);
                    // Credit for another stream.
                    self.connection.note(&mut state);
                    reason_of(code)
                }
                Ok(None) => {
                    if state.check().is_ok() {
                        state.wait(self.id, Interest::Read, cx.waker());
                    }
                    return Poll::Pending;
                }
                Err(_) => return Poll::Pending,
            },
        };
        drop(state);
        self.ended = true;
        self.end = Some(RecvEnd::Reset(reason));
        Poll::Ready(reason)
    }

    fn put_back(&mut self, bytes: Bytes) {
        self.unread = Some(Box::new(bytes));
    }

    fn tunnel_error(&self) -> Option<TunnelError> {
        self.connection.state().tunnel_error()
    }
}

impl Drop for Recv {
    fn drop(&mut self) {
        if !self.ended {
            self.stop(CloseReason::Aborted);
        }
        self.connection.state().forget_stream(self.id);
    }
}
