//! One connection: two directions between a local socket and a stream, until both have ended.
//!
//! These futures are most of the cost of an idle connection. So rare waits are boxed, large values are
//! borrowed, and long waits are `async` blocks.

#![expect(
    clippy::manual_async_fn,
    reason = "an async fn keeps its arguments twice"
)]

use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::time::{sleep, timeout};
use tunnel_proto::close::CloseReason;
use tunnel_proto::handover;

use super::budget::{Budget, Charge};
use super::kept::Keep;
use super::socket::{LocalSocket, PeerClose};
use super::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};

/// Maximum time for which a socket stays open for a peer that still takes bytes, after everything else
/// has ended.
const LINGER: Duration = Duration::from_secs(30);

/// Polling interval of such a socket while the peer has not acknowledged everything.
const LINGER_POLL: Duration = Duration::from_millis(10);

/// Time without progress after which a reader counts as stalled: one that is merely slower than the
/// link does not.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// Charge in bytes of a stalled stream whose link charges nothing itself: the window of 1 MiB that the
/// other kinds of link have, and the cost of keeping it.
const STALLED: u64 = (1 << 20) * 5 / 2;

/// Maximum number of slices in one vectored write.
const SLICES: usize = 32;

/// Counter of relayed bytes.
pub trait Meter {
    /// Counts `n` bytes from the local socket to the stream.
    fn outbound(&self, n: usize);
    /// Counts `n` bytes from the stream to the local socket.
    fn inbound(&self, n: usize);
}

/// Progress of a connection: what was read from the local socket before the relay takes over, and how far
/// another relay has come whose link was lost.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes that the stream has not taken yet.
    pub pending: Bytes,
    /// Whether the local socket has reached its end of file.
    pub eof: bool,
    /// Side that finished first.
    first: Option<ClosedBy>,
    /// End of the direction from the local socket.
    out: Option<DirectionEnd>,
    /// End of the direction to the local socket.
    inn: Option<DirectionEnd>,
}

impl Progress {
    /// Creates the progress of a connection from which `pending` was read, up to its end of file or not.
    pub fn new(pending: Bytes, eof: bool) -> Self {
        Self {
            pending,
            eof,
            ..Self::default()
        }
    }

    /// Adds bytes that were read from the local socket behind the others.
    pub fn append(&mut self, later: &[u8]) {
        if !later.is_empty() {
            let mut all = BytesMut::from(std::mem::take(&mut self.pending));
            all.extend_from_slice(later);
            self.pending = all.freeze();
        }
    }

    /// Returns the progress for another process.
    pub fn save(&self) -> handover::Progress {
        let direction = |end: Option<DirectionEnd>| match end {
            None => handover::DirectionEnd::Open,
            Some(DirectionEnd::Finished) => handover::DirectionEnd::Finished,
            Some(DirectionEnd::Refused) => handover::DirectionEnd::Refused,
            Some(DirectionEnd::Withheld) => handover::DirectionEnd::Withheld,
        };
        let first = match self.first {
            Some(ClosedBy::Local) => handover::Side::Local,
            Some(ClosedBy::Remote) => handover::Side::Remote,
            // They end the relay.
            Some(ClosedBy::Link | ClosedBy::Limit) | None => handover::Side::Neither,
        };
        handover::Progress {
            pending: self.pending.clone(),
            eof: self.eof,
            first: first.into(),
            outbound: direction(self.out).into(),
            inbound: direction(self.inn).into(),
        }
    }

    /// Restores the progress that another process has [saved](Self::save).
    pub fn restore(saved: &handover::Progress) -> Self {
        let direction = |end| match end {
            handover::DirectionEnd::Open => None,
            handover::DirectionEnd::Finished => Some(DirectionEnd::Finished),
            handover::DirectionEnd::Refused => Some(DirectionEnd::Refused),
            handover::DirectionEnd::Withheld => Some(DirectionEnd::Withheld),
        };
        Self {
            // A slice would keep the whole message.
            pending: Bytes::copy_from_slice(&saved.pending),
            eof: saved.eof,
            first: match saved.first() {
                handover::Side::Neither => None,
                handover::Side::Local => Some(ClosedBy::Local),
                handover::Side::Remote => Some(ClosedBy::Remote),
            },
            out: direction(saved.outbound()),
            inn: direction(saved.inbound()),
        }
    }
}

/// Side that ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedBy {
    /// The local socket's peer.
    Local,
    /// The other end of the stream.
    Remote,
    /// The link in between, which was lost. The connection may go on over another one.
    Link,
    /// A limit of this process.
    Limit,
}

/// End of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayEnd {
    /// Side that ended it: in an orderly close the side that finished first.
    pub by: ClosedBy,
    /// Reason of the end; `Finished` is the orderly close.
    pub reason: CloseReason,
}

/// End of one direction that leaves the other one running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DirectionEnd {
    /// The end of file was passed on.
    Finished,
    /// The receiving side takes no more bytes but may still send.
    Refused,
    /// The end of file was not passed on yet: the local peer reads no more either.
    Withheld,
}

/// Relays until both directions have ended. `local` must have reset-on-close set. The caller drops
/// it and the halves afterwards, which closes the open ones. Where the link was lost, another relay with
/// the same `progress` can go on over other halves.
pub fn relay<'a>(
    local: &'a impl LocalSocket,
    send: &'a mut impl SendHalf,
    recv: &'a mut impl RecvHalf,
    progress: &'a mut Progress,
    budget: &'a Budget,
    (meter, keeper): (&'a impl Meter, &'a impl Keep),
) -> impl Future<Output = RelayEnd> {
    let state = RelayState {
        local,
        budget,
        meter,
        keeper,
        first: Cell::new(progress.first),
        out: Cell::new(progress.out),
        inn: Cell::new(progress.inn),
        written: Cell::default(),
    };
    async move {
        let ended = {
            let mut outward = pin!(outward(&state, send, progress));
            let mut inward = pin!(inward(&state, recv));
            tokio::select! {
                ended = &mut outward => ended,
                ended = &mut inward => ended,
            }
        };
        let ended = match ended {
            Ok(()) => close(&state, send, recv).await,
            Err(ending) => Err(ending),
        };
        state.tell_accepted(recv);
        match ended {
            Ok(ending) => {
                state.local.reset_on_close(false);
                ending
            }
            Err(ending) if ending.by == ClosedBy::Link => {
                progress.first = state.first.get();
                progress.out = state.out.get().filter(|it| *it != DirectionEnd::Withheld);
                progress.inn = state.inn.get();
                ending
            }
            Err(ending) => {
                send.reset(ending.reason);
                recv.stop(ending.reason);
                ending
            }
        }
    }
}

/// State shared by both directions.
struct RelayState<'a, L, M, K> {
    local: &'a L,
    budget: &'a Budget,
    meter: &'a M,
    keeper: &'a K,
    /// Side that finished first.
    first: Cell<Option<ClosedBy>>,
    /// End of each direction.
    out: Cell<Option<DirectionEnd>>,
    inn: Cell<Option<DirectionEnd>>,
    /// Number of bytes that the local socket has taken, of which the stream was not told yet.
    written: Cell<usize>,
}

impl<L: LocalSocket, M, K: Keep> RelayState<'_, L, M, K> {
    /// Keeps what the other end of a held session has not confirmed.
    fn keep(&self, send: &impl SendHalf) {
        if (self.keeper.is_there() || self.local.is_kept())
            && let Some(session) = send.held()
        {
            let untold = self.written.get() as u64;
            self.local.keep(&session, untold, self.keeper);
        }
    }

    fn note(&self, by: ClosedBy) {
        self.first.set(self.first.get().or(Some(by)));
    }

    /// Tells the stream which bytes the local socket has taken.
    fn tell_accepted(&self, recv: &mut impl RecvHalf) {
        recv.accepted(self.written.take());
    }
}

/// Ends the connection where neither direction can go on. `Ok` is an orderly close, `Err` one that must
/// reset the rest.
async fn close(
    state: &RelayState<'_, impl LocalSocket, impl Meter, impl Keep>,
    send: &mut impl SendHalf,
    recv: &mut impl RecvHalf,
) -> Result<RelayEnd, RelayEnd> {
    let (mut out, inn) = (state.out.get(), state.inn.get());
    if out == Some(DirectionEnd::Withheld) {
        recv.stop(CloseReason::PeerGone);
        out = Some(send_rest(Box::pin(send.stopped()).await, state)?);
    } else if inn.is_none() {
        if out != Some(DirectionEnd::Finished) {
            return Err(RESET_BY_LOCAL);
        }
        // The local peer had sent its end of file: it needs no answer, but its bytes still arrive.
        recv.stop(CloseReason::PeerGone);
    }
    let ending = RelayEnd {
        by: state.first.get().unwrap_or(ClosedBy::Remote),
        reason: CloseReason::Finished,
    };
    let is_orderly = (out, inn) == (Some(DirectionEnd::Finished), Some(DirectionEnd::Finished));
    if !is_orderly && !Box::pin(linger(state.local)).await {
        return Err(ending);
    }
    Ok(ending)
}

const RESET_BY_LOCAL: RelayEnd = RelayEnd {
    by: ClosedBy::Local,
    reason: CloseReason::PeerReset,
};

/// Ending where the budget refuses the charge of the connection.
const BUDGET_EXCEEDED: RelayEnd = RelayEnd {
    by: ClosedBy::Limit,
    reason: CloseReason::MemoryLimit,
};

fn reset_by_remote(reason: CloseReason) -> RelayEnd {
    RelayEnd {
        by: ClosedBy::Remote,
        reason,
    }
}

/// Moves bytes from the local socket to the stream, until the far side has acknowledged everything.
/// Returns when the connection is at its end.
fn outward(
    state: &RelayState<'_, impl LocalSocket, impl Meter, impl Keep>,
    send: &mut impl SendHalf,
    next: &mut Progress,
) -> impl Future<Output = Result<(), RelayEnd>> {
    async move {
        if state.out.get().is_some() {
            return wait_for_the_other(state, send).await;
        }
        let end = {
            let mut stopped = pin!(send.stopped());
            loop {
                let n = next.pending.len();
                let sent = match at_once(|| send.send(&mut next.pending)).await {
                    Some(sent) => Ok(sent),
                    None => Box::pin(send_all(state, send, &mut next.pending)).await,
                };
                state.meter.outbound(n - next.pending.len());
                if let Err(end) = sent? {
                    break end;
                }
                if next.eof {
                    state.note(ClosedBy::Local);
                    match peer_close(state.local, send) {
                        PeerClose::Half => send.finish_half(),
                        PeerClose::Unknown => send.finish(),
                        PeerClose::Full => {
                            send.finish();
                            state.out.set(Some(DirectionEnd::Withheld));
                            return Ok(());
                        }
                    }
                    break keeping(state, send, stopped).await;
                }
                let read = pin!(state.local.read());
                tokio::select! {
                    end = &mut stopped => break end,
                    read = keeping(state, send, read) => next.pending = read.map_err(|_| RESET_BY_LOCAL)?,
                }
                next.eof = next.pending.is_empty();
            }
        };
        state.out.set(Some(send_rest(end, state)?));
        wait_for_the_other(state, send).await
    }
}

/// Waits, behind the direction to the stream, until the local peer is gone, while the other direction goes on.
async fn wait_for_the_other<M>(
    state: &RelayState<'_, impl LocalSocket, M, impl Keep>,
    send: &impl SendHalf,
) -> Result<(), RelayEnd> {
    if state.inn.get().is_none() {
        // During a read, the reader distinguishes a reset from an end of file.
        let mut broken = Box::pin(state.local.broken());
        keeping(state, send, broken.as_mut()).await;
    }
    Ok(())
}

/// Waits for `future`. Whenever the other end has confirmed something, the local socket keeps so much less.
fn keeping<'a, F: Future>(
    state: &'a RelayState<'_, impl LocalSocket, impl Sized, impl Keep>,
    send: &'a impl SendHalf,
    mut future: Pin<&'a mut F>,
) -> impl Future<Output = F::Output> + 'a {
    poll_fn(move |cx| {
        state.keep(send);
        future.as_mut().poll(cx)
    })
}

/// Returns the meaning of the end of file that was read, where it makes a difference to the link.
fn peer_close(local: &impl LocalSocket, send: &impl SendHalf) -> PeerClose {
    if send.lingers() {
        local.peer_close()
    } else {
        PeerClose::Unknown
    }
}

/// Waits for credit, and charges the waiting bytes. An `Err` is the local socket's, or the budget's.
async fn send_all(
    state: &RelayState<'_, impl LocalSocket, impl Meter, impl Keep>,
    send: &mut impl SendHalf,
    pending: &mut Bytes,
) -> Result<Result<(), SendEnd>, RelayEnd> {
    let mut charge = Charge::new(state.budget.clone());
    if !charge.set(pending.len() as u64) {
        return Err(BUDGET_EXCEEDED);
    }
    tokio::select! {
        biased;
        sent = send.send(pending) => Ok(sent),
        // Without credit there is no read, which would detect a reset.
        () = state.local.broken_before_eof() => Err(RESET_BY_LOCAL),
    }
}

fn send_rest(
    end: SendEnd,
    state: &RelayState<'_, impl LocalSocket, impl Meter, impl Keep>,
) -> Result<DirectionEnd, RelayEnd> {
    match end {
        SendEnd::Acknowledged => Ok(DirectionEnd::Finished),
        SendEnd::Stopped(CloseReason::PeerGone) => {
            state.note(ClosedBy::Remote);
            Ok(DirectionEnd::Refused)
        }
        SendEnd::Stopped(reason) => Err(reset_by_remote(reason)),
        SendEnd::Link(reason) => Err(RelayEnd {
            by: ClosedBy::Link,
            reason,
        }),
    }
}

/// Moves bytes from the stream to the local socket. Returns when the connection is at its end.
fn inward(
    state: &RelayState<'_, impl LocalSocket, impl Meter, impl Keep>,
    recv: &mut impl RecvHalf,
) -> impl Future<Output = Result<(), RelayEnd>> {
    async move {
        // Left by a relay whose link was lost.
        if state.inn.get().is_none() && !state.local.is_flushed() {
            match Box::pin(write_all(state, recv, Vec::new())).await? {
                Err(e) if is_refusal(&e) => {
                    state.note(ClosedBy::Local);
                    recv.stop(CloseReason::PeerGone);
                    state.inn.set(Some(DirectionEnd::Refused));
                }
                flushed => flushed.map_err(|_| RESET_BY_LOCAL)?,
            }
        }
        let rest = loop {
            if let Some(end) = state.inn.get() {
                break end;
            }
            // A waiting future needs no room for chunks.
            let mut chunks = Vec::new();
            let received = recv.recv(&mut chunks).await;
            let written = match received {
                Ok(()) => match write_now(state, &mut chunks) {
                    Ok(done) if done == chunks.len() && state.local.is_flushed() => Ok(()),
                    Ok(done) => {
                        let rest = chunks.split_off(done);
                        Box::pin(write_all(state, recv, rest)).await?
                    }
                    Err(error) => Err(error),
                },
                Err(RecvEnd::Finished) => {
                    let finished = Box::pin(state.local.finish()).await;
                    finished.inspect(|()| recv.finished())
                }
                Err(RecvEnd::Reset(reason)) => return Err(reset_by_remote(reason)),
                Err(RecvEnd::Link(reason)) => {
                    return Err(RelayEnd {
                        by: ClosedBy::Link,
                        reason,
                    });
                }
            };
            state.tell_accepted(recv);
            match written {
                Ok(()) if received.is_ok() => {}
                Ok(()) => {
                    state.note(ClosedBy::Remote);
                    break DirectionEnd::Finished;
                }
                Err(e) if is_refusal(&e) => {
                    state.note(ClosedBy::Local);
                    recv.stop(CloseReason::PeerGone);
                    break DirectionEnd::Refused;
                }
                Err(_) => return Err(RESET_BY_LOCAL),
            }
        };
        state.inn.set(Some(rest));
        if state.out.get().is_none() {
            // The other direction sees it.
            std::future::pending::<()>().await;
        }
        Ok(())
    }
}

/// Whether a write failed for a reset that follows the peer's end of file (tcp_reset in CLOSE_WAIT), or for
/// one that the reader has yet to see. What the peer sent is there to be read.
fn is_refusal(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::BrokenPipe | ErrorKind::NotConnected
    )
}

/// Writes all `chunks` as the socket takes them. The outer `Err` is the stream's.
async fn write_all(
    state: &RelayState<'_, impl LocalSocket, impl Meter, impl Keep>,
    recv: &mut impl RecvHalf,
    mut chunks: Vec<Bytes>,
) -> Result<io::Result<()>, RelayEnd> {
    let (is_charged, lost) = (recv.is_charged(), recv.lost());
    let written = async {
        let mut done = 0;
        while done < chunks.len() || !state.local.is_flushed() {
            if let Err(error) = wait_for(state.local, state.budget, is_charged).await? {
                return Ok(Err(error));
            }
            match write_now(state, &mut chunks[done..]) {
                Ok(more) => done += more,
                Err(error) => return Ok(Err(error)),
            }
        }
        Ok(Ok(()))
    };
    tokio::select! {
        biased;
        written = written => written,
        // A reader that has stopped must not keep what its target has taken back.
        reason = recv.reset() => Err(reset_by_remote(reason)),
        reason = lost => Err(RelayEnd {
            by: ClosedBy::Link,
            reason,
        }),
    }
}

/// Writes as much as the socket takes without waiting: some whole chunks, and a part of the next
/// one.
fn write_now(
    state: &RelayState<'_, impl LocalSocket, impl Meter, impl Keep>,
    chunks: &mut [Bytes],
) -> io::Result<usize> {
    let mut done = 0;
    while done < chunks.len() {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let used = slices.len().min(chunks.len() - done);
        for (slice, chunk) in slices.iter_mut().zip(&chunks[done..]) {
            *slice = IoSlice::new(chunk);
        }
        let Some(mut n) = state.local.try_write(&slices[..used])? else {
            break;
        };
        state.meter.inbound(n);
        state.written.set(state.written.get() + n);
        while done < chunks.len() && n >= chunks[done].len() {
            n -= chunks[done].len();
            done += 1;
        }
        if n > 0 {
            chunks[done].advance(n);
        }
    }
    Ok(done)
}

/// Waits until the socket takes bytes again. A socket without progress for long counts as stalled, and
/// is charged for where its link does not charge. The outer `Err` means that the budget refuses.
async fn wait_for(
    local: &impl LocalSocket,
    budget: &Budget,
    is_charged: bool,
) -> Result<io::Result<()>, RelayEnd> {
    let mut writable = pin!(local.writable());
    tokio::select! {
        biased;
        ready = &mut writable => return Ok(ready),
        () = sleep(STALLED_AFTER) => {}
    }
    let _stalled = budget.stall();
    let mut charge = Charge::new(budget.clone());
    if !is_charged && !charge.set(STALLED) {
        return Err(BUDGET_EXCEEDED);
    }
    Ok(writable.await)
}

/// Discards input until the peer has everything: closing a socket with unread bytes resets it and
/// discards unsent ones. Returns `false` if the peer made no progress for so long that the socket must
/// be reset.
pub async fn linger(local: &impl LocalSocket) -> bool {
    let drained = async {
        while local.unsent() > 0 {
            tokio::select! {
                read = local.read() => match read {
                    Ok(bytes) if !bytes.is_empty() => local.discard_read(),
                    // Nothing unread can follow: the kernel delivers the rest after the close.
                    _ => break,
                },
                () = sleep(LINGER_POLL) => {}
            }
        }
    };
    let taken = timeout(LINGER, drained).await.is_ok();
    local.discard_input();
    taken
}

/// Polls a future that loses nothing by being dropped, once; `None` where it would wait.
async fn at_once<F: Future>(make: impl FnOnce() -> F) -> Option<F::Output> {
    let mut make = Some(make);
    poll_fn(|cx| {
        let polled = make.take().map(|make| pin!(make()).poll(cx));
        Poll::Ready(polled.and_then(|polled| match polled {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }))
    })
    .await
}

#[cfg(test)]
mod tests;
