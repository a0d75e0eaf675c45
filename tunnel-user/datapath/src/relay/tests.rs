//! Every end of either side, between a real socket and a stream in memory.
//!
//! The peer of the socket and the far side of the stream are the test; what the kernel does with
//! resets and unread bytes is the kernel's.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, LocalSet, spawn_local};

use super::*;
use crate::Socket;
use crate::engine::testing::on_each;
use crate::kept::KeepNothing;

const PATIENCE: Duration = Duration::from_secs(10);
const ORDERLY: CloseReason = CloseReason::Finished;

/// The far side of a stream.
#[derive(Default)]
struct Far {
    state: RefCell<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// Bytes that the stream still takes.
    credit: usize,
    taken: Vec<u8>,
    finished: bool,
    /// Reset of the send half by the relay.
    reset: Option<CloseReason>,
    stopped: Option<CloseReason>,
    /// End of the relay's send half, if it does not finish first.
    send_end: Option<SendEnd>,
    /// Data for the relay's receive half, before its end.
    inbox: VecDeque<Bytes>,
    recv_end: Option<RecvEnd>,
    outbound: usize,
    inbound: usize,
}

impl Far {
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.state.borrow_mut());
        self.changed.notify_waiters();
        changed
    }

    /// Waits until `look` succeeds.
    async fn until<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            let seen = look(&mut self.state.borrow_mut());
            if let Some(seen) = seen {
                return seen;
            }
            changed.await;
        }
    }
}

struct FarSend(Rc<Far>);
struct FarRecv(Rc<Far>);

impl SendHalf for FarSend {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        while !chunk.is_empty() {
            let far = &self.0;
            far.until(|it| (it.credit > 0 || it.send_end.is_some()).then_some(()))
                .await;
            far.change(|it| match it.send_end {
                Some(end) => Err(end),
                None => {
                    let part = chunk.split_to(chunk.len().min(it.credit));
                    it.credit -= part.len();
                    it.taken.extend_from_slice(&part);
                    Ok(())
                }
            })?;
        }
        Ok(())
    }

    fn finish(&mut self) {
        self.0.change(|it| it.finished = true);
    }

    fn reset(&mut self, reason: CloseReason) {
        self.0.change(|it| it.reset = Some(reason));
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        let far = self.0.clone();
        async move {
            let acknowledged = |it: &State| it.finished.then_some(SendEnd::Acknowledged);
            far.until(|it| it.send_end.or_else(|| acknowledged(it)))
                .await
        }
    }
}

impl RecvHalf for FarRecv {
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        let take = |it: &mut State| match it.inbox.is_empty() {
            true => it.recv_end.map(Err),
            false => {
                into.extend(it.inbox.drain(..));
                Some(Ok(()))
            }
        };
        self.0.until(take).await
    }

    async fn reset(&mut self) -> CloseReason {
        let reset = |it: &mut State| match it.recv_end {
            Some(RecvEnd::Reset(reason)) => Some(reason),
            _ => None,
        };
        self.0.until(reset).await
    }

    fn stop(&mut self, reason: CloseReason) {
        self.0.change(|it| it.stopped = Some(reason));
    }
}

impl Meter for Rc<Far> {
    fn outbound(&self, n: usize) {
        self.change(|it| it.outbound += n);
    }

    fn inbound(&self, n: usize) {
        self.change(|it| it.inbound += n);
    }
}

/// A relay at work.
struct Rig {
    far: Rc<Far>,
    relay: JoinHandle<RelayEnd>,
}

impl Rig {
    fn start(local: impl LocalSocket + 'static, start: Progress) -> Self {
        Self::within(Budget::new(1 << 30), local, start)
    }

    /// Charges `budget`.
    fn within(budget: Budget, local: impl LocalSocket + 'static, mut start: Progress) -> Self {
        local.reset_on_close(true);
        let far = Rc::<Far>::default();
        let (mut send, mut recv, meter) = (FarSend(far.clone()), FarRecv(far.clone()), far.clone());
        let relay = spawn_local(async move {
            let watchers = (&meter, &KeepNothing);
            relay(&local, &mut send, &mut recv, &mut start, &budget, watchers).await
        });
        Self { far, relay }
    }

    /// Lets the far side take everything.
    fn with_credit(self) -> Self {
        self.far.change(|it| it.credit = usize::MAX);
        self
    }

    fn give(&self, bytes: &[u8]) {
        let bytes = Bytes::copy_from_slice(bytes);
        self.far.change(|it| it.inbox.push_back(bytes));
    }

    fn end_recv(&self, end: RecvEnd) {
        self.far.change(|it| it.recv_end = Some(end));
    }

    fn end_send(&self, end: SendEnd) {
        self.far.change(|it| it.send_end = Some(end));
    }

    async fn until_taken(&self, bytes: &[u8]) {
        self.far
            .until(|it| (it.taken.len() >= bytes.len()).then_some(()))
            .await;
        self.far
            .change(|it| assert!(it.taken == bytes, "wrong bytes"));
    }

    async fn until_finished(&self) {
        self.far.until(|it| it.finished.then_some(())).await;
    }

    /// Waits for the end. Returns it, with the ends of both halves of the stream.
    async fn end(self) -> (ClosedBy, CloseReason, GivenUp) {
        let ending = self.relay.await.expect("the relay panicked");
        let given_up = self.far.change(|it| GivenUp {
            reset: it.reset,
            stopped: it.stopped,
        });
        (ending.by, ending.reason, given_up)
    }
}

/// End of both halves of a stream.
#[derive(Debug, PartialEq)]
struct GivenUp {
    reset: Option<CloseReason>,
    stopped: Option<CloseReason>,
}

const NOT: GivenUp = GivenUp {
    reset: None,
    stopped: None,
};

fn both(reason: CloseReason) -> GivenUp {
    GivenUp {
        reset: Some(reason),
        stopped: Some(reason),
    }
}

fn only_stopped(reason: CloseReason) -> GivenUp {
    GivenUp {
        reset: None,
        stopped: Some(reason),
    }
}

async fn pair() -> (TcpStream, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap());
    let (peer, accepted) = tokio::join!(peer, listener.accept());
    let local = Socket::new(accepted.unwrap().0).unwrap();
    (peer.unwrap(), local)
}

/// Returns a relay and the peer of its socket.
async fn rig() -> (Rig, TcpStream) {
    let (peer, local) = pair().await;
    (Rig::start(local, Progress::default()), peer)
}

/// Runs a test that must end soon.
async fn soon(test: impl Future<Output = ()>) {
    let tasks = LocalSet::new();
    let run = tasks.run_until(async { timeout(PATIENCE, test).await });
    run.await.expect("it hangs");
}

fn reset(peer: TcpStream) {
    SockRef::from(&peer)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}

/// Reads to the end: the bytes, and the error if it is no end of file.
async fn read_all(peer: &mut TcpStream) -> (Vec<u8>, Option<ErrorKind>) {
    let mut bytes = Vec::new();
    let end = peer.read_to_end(&mut bytes).await;
    (bytes, end.err().map(|error| error.kind()))
}

async fn assert_reset(peer: &mut TcpStream) {
    let (_, end) = read_all(peer).await;
    assert_eq!(end, Some(ErrorKind::ConnectionReset));
}

/// Returns more than the kernel buffers between us and a peer that does not read.
fn much() -> Vec<u8> {
    (0..16u32 << 20).map(|n| (n % 251) as u8).collect()
}

/// Waits until the relay has been refused further bytes by a peer that does not read.
async fn until_blocked(rig: &Rig) {
    let mut before = usize::MAX;
    loop {
        let passed = rig.far.change(|it| it.inbound);
        if passed == before && passed > 0 {
            return;
        }
        before = passed;
        sleep(Duration::from_millis(50)).await;
    }
}

#[test]
fn both_halves_end_in_order_and_the_first_to_end_is_named() {
    on_each(async || {
        soon(async {
            let (rig, mut peer) = rig().await;
            let rig = rig.with_credit();
            peer.write_all(b"question").await.unwrap();
            peer.shutdown().await.unwrap();
            rig.until_finished().await;
            rig.until_taken(b"question").await;
            rig.give(b"answer");
            rig.end_recv(RecvEnd::Finished);
            assert_eq!(read_all(&mut peer).await, (b"answer".into(), None));
            assert_eq!(rig.far.change(|it| (it.outbound, it.inbound)), (8, 6));
            assert_eq!(rig.end().await, (ClosedBy::Local, ORDERLY, NOT));
        })
        .await;
        soon(async {
            let (rig, mut peer) = rig().await;
            let rig = rig.with_credit();
            rig.give(b"banner");
            rig.end_recv(RecvEnd::Finished);
            assert_eq!(read_all(&mut peer).await, (b"banner".into(), None));
            peer.write_all(b"late").await.unwrap();
            drop(peer);
            rig.until_finished().await;
            rig.until_taken(b"late").await;
            assert_eq!(rig.end().await, (ClosedBy::Remote, ORDERLY, NOT));
        })
        .await;
    });
}

#[test]
fn what_was_read_before_comes_first_and_its_end_is_kept() {
    on_each(async || {
        for eof in [false, true] {
            soon(async {
                let (mut peer, local) = pair().await;
                let pending = Bytes::from_static(b"early ");
                let rig = Rig::start(local, Progress::new(pending, eof)).with_credit();
                if !eof {
                    peer.write_all(b"and late").await.unwrap();
                    peer.shutdown().await.unwrap();
                }
                rig.until_finished().await;
                rig.until_taken(if eof { b"early " } else { b"early and late" })
                    .await;
                rig.end_recv(RecvEnd::Finished);
                assert_eq!(rig.end().await, (ClosedBy::Local, ORDERLY, NOT));
            })
            .await;
        }
    });
}

#[test]
fn a_local_reset_is_a_reset_also_while_there_is_no_credit() {
    on_each(async || {
        for credit in [usize::MAX, 0] {
            soon(async {
                let (rig, mut peer) = rig().await;
                rig.far.change(|it| it.credit = credit);
                peer.write_all(b"bytes").await.unwrap();
                sleep(Duration::from_millis(50)).await;
                reset(peer);
                let end = (
                    ClosedBy::Local,
                    CloseReason::PeerReset,
                    both(CloseReason::PeerReset),
                );
                assert_eq!(rig.end().await, end, "credit {credit}");
            })
            .await;
        }
    });
}

/// The peer has sent everything and left. Bytes written to it provoke a reset, and the peer's data
/// still counts.
#[test]
fn a_reset_behind_an_end_of_file_takes_nothing_back() {
    on_each(async || {
        for has_credit in [true, false] {
            soon(async {
                let (rig, mut peer) = rig().await;
                let bytes = &much()[..50_000];
                // The first byte is taken: then the relay reads no more before the peer has left.
                rig.far.change(|it| it.credit = 1);
                peer.write_all(bytes).await.unwrap();
                rig.until_taken(&bytes[..1]).await;
                drop(peer);
                if has_credit {
                    rig.far.change(|it| it.credit = bytes.len());
                    rig.until_finished().await;
                }
                rig.give(b"is anybody there?");
                sleep(Duration::from_millis(50)).await;
                rig.give(b"hello?");
                sleep(Duration::from_millis(50)).await;
                rig.far.change(|it| it.credit = usize::MAX);
                rig.until_finished().await;
                rig.until_taken(bytes).await;
                let end = (
                    ClosedBy::Local,
                    ORDERLY,
                    only_stopped(CloseReason::PeerGone),
                );
                assert_eq!(rig.end().await, end, "credit {has_credit}");
            })
            .await;
        }
    });
}

/// A Unix peer can refuse to read and go on writing.
#[test]
fn a_peer_that_takes_nothing_is_still_heard() {
    on_each(async || {
        soon(async {
            let (mut peer, local) = UnixStream::pair().unwrap();
            let rig = Rig::start(local, Progress::default()).with_credit();
            SockRef::from(&peer)
                .shutdown(std::net::Shutdown::Read)
                .unwrap();
            rig.give(b"unwanted");
            rig.far.until(|it| it.stopped).await;
            peer.write_all(b"but listen").await.unwrap();
            drop(peer);
            rig.until_finished().await;
            rig.until_taken(b"but listen").await;
            let end = (
                ClosedBy::Local,
                ORDERLY,
                only_stopped(CloseReason::PeerGone),
            );
            assert_eq!(rig.end().await, end);
        })
        .await;
    });
}

#[test]
fn a_remote_reset_is_a_reset_also_for_a_peer_that_does_not_read() {
    on_each(async || {
        const WHY: CloseReason = CloseReason::IdleTimeout;
        for (reads, half_closed) in [(true, false), (false, false), (false, true)] {
            soon(async {
                let (rig, mut peer) = rig().await;
                let rig = rig.with_credit();
                if half_closed {
                    peer.shutdown().await.unwrap();
                    rig.until_finished().await;
                }
                if !reads {
                    rig.give(&much());
                    until_blocked(&rig).await;
                }
                rig.end_recv(RecvEnd::Reset(WHY));
                assert_eq!(rig.end().await, (ClosedBy::Remote, WHY, both(WHY)));
                assert_reset(&mut peer).await;
            })
            .await;
        }
    });
}

#[test]
fn a_remote_stop_is_a_reset_unless_it_only_takes_no_more() {
    on_each(async || {
        soon(async {
            let (rig, mut peer) = rig().await;
            rig.end_send(SendEnd::Stopped(CloseReason::PeerReset));
            let why = CloseReason::PeerReset;
            assert_eq!(rig.end().await, (ClosedBy::Remote, why, both(why)));
            assert_reset(&mut peer).await;
        })
        .await;
        // The target takes no more, but what it sends still arrives, at a peer that talks all the
        // while: closing with its words unread would reset it.
        soon(async {
            let (rig, mut peer) = rig().await;
            let bytes = much();
            rig.give(&bytes);
            rig.end_recv(RecvEnd::Finished);
            rig.end_send(SendEnd::Stopped(CloseReason::PeerGone));
            let mut received = Vec::new();
            let mut buffer = vec![0; 1 << 16];
            let end = loop {
                // The write fails when no process reads any more; what was sent before is there to be read.
                let _ = peer.try_write(b"chatter");
                match AsyncReadExt::read(&mut peer, &mut buffer).await {
                    Ok(0) => break None,
                    Ok(n) => received.extend_from_slice(&buffer[..n]),
                    Err(error) => break Some(error.kind()),
                }
            };
            assert_eq!(end, None);
            assert!(received == bytes, "{} bytes", received.len());
            assert_eq!(rig.end().await, (ClosedBy::Remote, ORDERLY, NOT));
        })
        .await;
    });
}

#[test]
fn a_reset_of_a_peer_that_is_not_heard_any_more_is_seen() {
    on_each(async || {
        let reset_by_local = (
            ClosedBy::Local,
            CloseReason::PeerReset,
            both(CloseReason::PeerReset),
        );
        soon(async {
            let (rig, mut peer) = rig().await;
            rig.end_send(SendEnd::Stopped(CloseReason::PeerGone));
            rig.give(b"x");
            peer.read_exact(&mut [0]).await.unwrap();
            reset(peer);
            assert_eq!(rig.end().await, reset_by_local);
        })
        .await;
        // Behind its end of file, all of which has been passed on, it only means that it wants no
        // answer: one that falls silent must not keep the connection.
        soon(async {
            let (rig, mut peer) = rig().await;
            let rig = rig.with_credit();
            peer.write_all(b"all").await.unwrap();
            drop(peer);
            rig.until_finished().await;
            rig.give(b"is anybody there?");
            let far = rig.far.clone();
            let end = (
                ClosedBy::Local,
                ORDERLY,
                only_stopped(CloseReason::PeerGone),
            );
            assert_eq!(rig.end().await, end);
            far.change(|it| assert_eq!(it.taken, b"all"));
        })
        .await;
    });
}

/// Data that waits for credit, or for a stopped reader, is charged, and refused above the budget.
#[test]
fn what_the_budget_has_no_room_for_is_reset() {
    on_each(async || {
        const WHY: CloseReason = CloseReason::MemoryLimit;
        for reads in [true, false] {
            soon(async {
                let (mut peer, local) = pair().await;
                let budget = Budget::new(if reads { 4 } else { STALLED - 1 });
                let rig = Rig::within(budget.clone(), local, Progress::default());
                if reads {
                    peer.write_all(b"bytes").await.unwrap();
                } else {
                    rig.give(&much());
                }
                assert_eq!(rig.end().await, (ClosedBy::Limit, WHY, both(WHY)));
                assert_reset(&mut peer).await;
                assert_eq!((budget.used(), budget.stalled()), (0, 0));
            })
            .await;
        }
    });
}

#[test]
fn a_lost_link_is_a_reset() {
    on_each(async || {
        const WHY: CloseReason = CloseReason::LinkLost;
        let lose_send: fn(&Rig) = |rig| rig.end_send(SendEnd::Link(WHY));
        let lose_recv: fn(&Rig) = |rig| rig.end_recv(RecvEnd::Link(WHY));
        for (lose, half_closed) in [(lose_send, false), (lose_recv, false), (lose_recv, true)] {
            soon(async {
                let (rig, mut peer) = rig().await;
                let rig = rig.with_credit();
                if half_closed {
                    peer.shutdown().await.unwrap();
                    rig.until_finished().await;
                }
                rig.give(b"half an ans");
                peer.read_exact(&mut [0; 11]).await.unwrap();
                lose(&rig);
                assert_eq!(rig.end().await, (ClosedBy::Link, WHY, NOT));
                assert_reset(&mut peer).await;
            })
            .await;
        }
    });
}

/// A link that is lost behind a complete answer does not take the answer from a slow reader.
#[test]
fn what_has_arrived_outlives_the_link() {
    on_each(async || {
        soon(async {
            let (rig, mut peer) = rig().await;
            let rig = rig.with_credit();
            peer.shutdown().await.unwrap();
            rig.until_finished().await;
            let bytes = much();
            rig.give(&bytes);
            until_blocked(&rig).await;
            rig.end_send(SendEnd::Link(CloseReason::LinkLost));
            rig.end_recv(RecvEnd::Finished);
            let (received, end) = read_all(&mut peer).await;
            assert!(received == bytes && end.is_none(), "{end:?}");
            assert_eq!(rig.end().await, (ClosedBy::Local, ORDERLY, NOT));
        })
        .await;
    });
}

#[test]
fn a_relay_that_is_given_up_resets_its_peer() {
    on_each(async || {
        soon(async {
            let (rig, mut peer) = rig().await;
            rig.give(b"x");
            peer.read_exact(&mut [0]).await.unwrap();
            rig.relay.abort();
            assert_reset(&mut peer).await;
        })
        .await;
    });
}
