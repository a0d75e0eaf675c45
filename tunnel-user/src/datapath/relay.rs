//! One connection: two directions between a local socket and a stream, until both have ended.

use std::cell::Cell;
use std::io::{self, ErrorKind, IoSlice};
use std::pin::pin;
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::time::{sleep, timeout};
use tunnel_proto::close::CloseReason;

use super::budget::Budget;
use super::socket::LocalSocket;
use super::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};

/// A socket whose peer still takes bytes is kept for so long after everything else has ended.
const LINGER: Duration = Duration::from_secs(30);

/// How often such a socket is asked whether its peer has everything.
const LINGER_POLL: Duration = Duration::from_millis(10);

/// A reader that takes nothing for so long has stopped: one that is merely slower than the link
/// does not count against the budget.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// Slices in one vectored write.
const SLICES: usize = 32;

/// Counts bytes as they pass.
pub trait Meter {
    /// `n` bytes went from the local socket to the stream.
    fn outbound(&self, n: usize);
    /// `n` bytes went from the stream to the local socket.
    fn inbound(&self, n: usize);
}

/// What was read from the local socket before the relay took over.
#[derive(Debug, Default)]
pub struct Outbound {
    /// Bytes that the stream has not taken yet.
    pub pending: Bytes,
    /// The local socket has reached its end of file.
    pub eof: bool,
}

/// Which side ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedBy {
    /// The local socket's peer.
    Local,
    /// The other end of the stream.
    Remote,
    /// The link between.
    Link,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Who ended it: in an orderly close the side that finished first.
    pub by: ClosedBy,
    /// Why; `Finished` is the orderly close.
    pub reason: CloseReason,
}

/// How one direction came to rest without harm to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// End of file, passed on.
    Finished,
    /// The receiving side takes no more bytes but may still send.
    Refused,
}

/// Relays until both directions have ended. Takes `local` with reset-on-close set, and closes it.
pub async fn relay<L: LocalSocket, S: SendHalf, R: RecvHalf>(
    local: L,
    mut send: S,
    mut recv: R,
    start: Outbound,
    budget: &Budget,
    meter: &impl Meter,
) -> Ending {
    match run(&local, &mut send, &mut recv, start, budget, meter).await {
        Ok(ending) => {
            local.reset_on_close(false);
            ending
        }
        Err(ending) => {
            send.reset(ending.reason);
            recv.stop(ending.reason);
            ending
        }
    }
}

/// `Ok` is an orderly close, `Err` one that must reset what is left.
async fn run<L: LocalSocket>(
    local: &L,
    send: &mut impl SendHalf,
    recv: &mut impl RecvHalf,
    start: Outbound,
    budget: &Budget,
    meter: &impl Meter,
) -> Result<Ending, Ending> {
    let first = Cell::new(None);
    let (mut out, mut inn) = (None, None);
    {
        let mut outward = pin!(outward(local, send, start, meter, &first));
        let mut inward = pin!(inward(local, recv, budget, meter, &first));
        let mut broken = pin!(local.broken());
        while out.is_none() || inn.is_none() {
            tokio::select! {
                rest = &mut outward, if out.is_none() => out = Some(rest?),
                rest = &mut inward, if inn.is_none() => inn = Some(rest?),
                // While somebody reads, the reader tells a reset from an end of file.
                () = &mut broken, if out.is_some() => break,
            }
        }
    }
    if inn.is_none() {
        if out != Some(Rest::Finished) {
            return Err(RESET_BY_LOCAL);
        }
        // It had sent its end of file: it wants no answer, but what it sent still arrives.
        recv.stop(CloseReason::PeerGone);
    }
    let ending = Ending {
        by: first.get().unwrap_or(ClosedBy::Remote),
        reason: CloseReason::Finished,
    };
    if (out, inn) != (Some(Rest::Finished), Some(Rest::Finished)) && !linger(local).await {
        return Err(ending);
    }
    Ok(ending)
}

const RESET_BY_LOCAL: Ending = Ending {
    by: ClosedBy::Local,
    reason: CloseReason::PeerReset,
};

fn reset_by_remote(reason: CloseReason) -> Ending {
    Ending {
        by: ClosedBy::Remote,
        reason,
    }
}

/// From the local socket to the stream. Ends when the far side has acknowledged everything.
async fn outward(
    local: &impl LocalSocket,
    send: &mut impl SendHalf,
    start: Outbound,
    meter: &impl Meter,
    first: &Cell<Option<ClosedBy>>,
) -> Result<Rest, Ending> {
    let mut stopped = pin!(send.stopped());
    let Outbound {
        mut pending,
        mut eof,
    } = start;
    loop {
        let n = pending.len();
        let sent = tokio::select! {
            biased;
            sent = send.send(&mut pending) => sent,
            // Without credit nobody reads, which would tell.
            () = local.revoked() => return Err(RESET_BY_LOCAL),
        };
        if let Err(end) = sent {
            return send_rest(end, first);
        }
        meter.outbound(n);
        if eof {
            break;
        }
        tokio::select! {
            end = &mut stopped => return send_rest(end, first),
            read = local.read() => pending = read.map_err(|_| RESET_BY_LOCAL)?,
        }
        eof = pending.is_empty();
    }
    note(first, ClosedBy::Local);
    send.finish();
    send_rest(stopped.await, first)
}

fn send_rest(end: SendEnd, first: &Cell<Option<ClosedBy>>) -> Result<Rest, Ending> {
    match end {
        SendEnd::Acknowledged => Ok(Rest::Finished),
        SendEnd::Stopped(CloseReason::PeerGone) => {
            note(first, ClosedBy::Remote);
            Ok(Rest::Refused)
        }
        SendEnd::Stopped(reason) => Err(reset_by_remote(reason)),
        SendEnd::Link(reason) => Err(Ending {
            by: ClosedBy::Link,
            reason,
        }),
    }
}

/// From the stream to the local socket.
async fn inward(
    local: &impl LocalSocket,
    recv: &mut impl RecvHalf,
    budget: &Budget,
    meter: &impl Meter,
    first: &Cell<Option<ClosedBy>>,
) -> Result<Rest, Ending> {
    let mut chunks = Vec::new();
    loop {
        let received = recv.recv(&mut chunks).await;
        let written = match received {
            Ok(()) => tokio::select! {
                biased;
                written = write_all(local, &mut chunks, budget, meter) => written,
                // A reader that has stopped must not keep what its target has taken back.
                reason = recv.reset() => return Err(reset_by_remote(reason)),
            },
            Err(RecvEnd::Finished) => local.finish().await,
            Err(RecvEnd::Reset(reason)) => return Err(reset_by_remote(reason)),
            Err(RecvEnd::Link(reason)) => {
                return Err(Ending {
                    by: ClosedBy::Link,
                    reason,
                });
            }
        };
        match written {
            Ok(()) if received.is_ok() => {}
            Ok(()) => {
                note(first, ClosedBy::Remote);
                return Ok(Rest::Finished);
            }
            // A reset that follows the peer's end of file (tcp_reset in CLOSE_WAIT), or one that
            // the reader has yet to see. What the peer sent is there to be read.
            Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::NotConnected) => {
                note(first, ClosedBy::Local);
                recv.stop(CloseReason::PeerGone);
                return Ok(Rest::Refused);
            }
            Err(_) => return Err(RESET_BY_LOCAL),
        }
    }
}

async fn write_all(
    local: &impl LocalSocket,
    chunks: &mut Vec<Bytes>,
    budget: &Budget,
    meter: &impl Meter,
) -> io::Result<()> {
    let mut done = 0;
    while done < chunks.len() {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let used = slices.len().min(chunks.len() - done);
        for (slice, chunk) in slices.iter_mut().zip(&chunks[done..]) {
            *slice = IoSlice::new(chunk);
        }
        let Some(mut n) = local.try_write(&slices[..used])? else {
            wait_for(local, budget).await?;
            continue;
        };
        meter.inbound(n);
        while done < chunks.len() && n >= chunks[done].len() {
            n -= chunks[done].len();
            done += 1;
        }
        if n > 0 {
            chunks[done].advance(n);
        }
    }
    // Keeps its room: the next chunks come without an allocation.
    chunks.clear();
    if !local.is_flushed() {
        wait_for(local, budget).await?;
    }
    Ok(())
}

/// Waits until the socket takes bytes again. One that takes none for long counts as stalled.
async fn wait_for(local: &impl LocalSocket, budget: &Budget) -> io::Result<()> {
    let mut writable = pin!(local.writable());
    tokio::select! {
        biased;
        ready = &mut writable => return ready,
        () = sleep(STALLED_AFTER) => {}
    }
    let _stalled = budget.stall();
    writable.await
}

/// Closing a socket with unread bytes resets it and discards what it has not sent yet. So what
/// still comes in is thrown away until the peer has everything. `false`: it took nothing for so
/// long that it is to be reset.
pub async fn linger(local: &impl LocalSocket) -> bool {
    let drained = async {
        while local.unsent() > 0 {
            tokio::select! {
                read = local.read() => match read {
                    Ok(bytes) if !bytes.is_empty() => {}
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

fn note(first: &Cell<Option<ClosedBy>>, by: ClosedBy) {
    first.set(first.get().or(Some(by)));
}

#[cfg(test)]
mod tests;
