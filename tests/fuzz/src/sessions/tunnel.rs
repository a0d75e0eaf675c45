//! The sessions of one tunnel, with a peer that sends any notices at any time. The calls are those of the halves of
//! streams and of the resumption.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::future::{pending, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use prometheus_client::metrics::gauge::Gauge;
use tokio::runtime::{Builder, Runtime};
use tokio::time::{Instant, advance};
use tunnel_proto::close::CloseReason;
use tunnel_proto::resumption::{Confirmation, Notice, SessionId};
use tunnel_proto::varint::VarInt;

use super::notices::NoticesEnd;
use super::peer::confirmation;
use super::{Bounds, Carried, Detached, Hold, Notices, Registration, Resumed, SessionState};
use crate::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use crate::{Budget, blank, take_byte, take_piece};

/// Time after which an end gives up a session that the other one does not settle, and more.
const SETTLED: Duration = Duration::from_secs(11);

/// Maximum number of sessions at once.
const SESSIONS: usize = 24;

/// Answers about unknown sessions that one wait may collect.
const UNKNOWN: usize = 1024;

/// The stream of notices, from and to the peer.
#[derive(Default)]
struct Stream {
    incoming: VecDeque<Bytes>,
    outgoing: BytesMut,
    /// Whether the peer takes nothing.
    is_full: bool,
    end: Option<RecvEnd>,
}

struct Half(Rc<RefCell<Stream>>);

impl SendHalf for Half {
    fn send(&mut self, chunk: &mut Bytes) -> impl Future<Output = Result<(), SendEnd>> {
        poll_fn(|_| {
            let mut stream = self.0.borrow_mut();
            if stream.is_full {
                return Poll::Pending;
            }
            stream.outgoing.extend_from_slice(&std::mem::take(chunk));
            Poll::Ready(Ok(()))
        })
    }

    fn finish(&mut self) {}

    fn reset(&mut self, _: CloseReason) {}

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        pending()
    }
}

impl RecvHalf for Half {
    fn recv(&mut self, into: &mut Vec<Bytes>) -> impl Future<Output = Result<(), RecvEnd>> {
        poll_fn(|_| {
            let mut stream = self.0.borrow_mut();
            match (stream.incoming.pop_front(), stream.end) {
                (Some(bytes), _) => {
                    into.push(bytes);
                    Poll::Ready(Ok(()))
                }
                (None, Some(end)) => Poll::Ready(Err(end)),
                (None, None) => Poll::Pending,
            }
        })
    }

    fn reset(&mut self) -> impl Future<Output = CloseReason> {
        pending()
    }

    fn stop(&mut self, _: CloseReason) {}
}

struct Tunnel {
    is_server: bool,
    notices: Rc<Notices>,
    stream: Rc<RefCell<Stream>>,
    bounds: Arc<Bounds>,
    /// Sessions with a relay.
    relayed: Vec<Rc<Carried>>,
    /// Sessions without a tunnel.
    parked: Vec<SessionState>,
    /// Numbers that this end has used on the tunnel.
    numbers: BTreeSet<VarInt>,
    registered: usize,
    ended: Arc<()>,
    /// Notices that may be answered with "unknown", and such answers.
    asked: usize,
    answered: usize,
}

impl Tunnel {
    fn state(&mut self) -> SessionState {
        let id = SessionId::new([self.registered as u8; 16]);
        let mut state = SessionState::new(id, self.bounds.clone());
        let ended = self.ended.clone();
        state.register(Registration(Box::new(move |_| drop(ended))));
        self.registered += 1;
        state
    }

    /// Returns the number of sessions that live.
    fn live(&self) -> usize {
        Arc::strong_count(&self.ended) - 1
    }

    fn act(&mut self, action: u8, data: &mut &[u8]) {
        let mut take = || take_byte(data).unwrap_or_default();
        match action % 20 {
            0 | 1 if self.live() < SESSIONS => {
                let state = self.state();
                return self.begin(state, VarInt::from(take()));
            }
            2 => {
                let number = VarInt::from(take());
                return self.say(Notice::Unknown(number));
            }
            3 | 4 => {
                let number = VarInt::from(take());
                let confirmation = confirmation(take().into(), take());
                return self.say(Notice::Confirm(number, confirmation));
            }
            5 => {
                let bytes = Bytes::copy_from_slice(take_piece(data).unwrap_or_default());
                // Each byte may be a part of a question.
                self.asked += bytes.len();
                return self.stream.borrow_mut().incoming.push_back(bytes);
            }
            6 => {
                let mut stream = self.stream.borrow_mut();
                stream.is_full = !stream.is_full;
                return;
            }
            7 if action > 200 => {
                let ids = (0..action % 8).map(|it| SessionId::new([it; 16]));
                let evicted = self.notices.evict_some(&ids.collect());
                return self.parked.extend(evicted);
            }
            7 if action > 100 => {
                let evicted = self.notices.evict_all();
                return self.parked.extend(evicted);
            }
            7 => {
                let unsafe_ones = self.notices.hold_all();
                assert!(unsafe_ones <= self.live());
                return;
            }
            8 => return self.resume(take(), confirmation(take().into(), take())),
            9 if action > 230 => {
                self.stream.borrow_mut().end = Some(RecvEnd::Finished);
                return;
            }
            9 if action > 200 => return self.notices.lose(CloseReason::LinkLost),
            _ => {}
        }
        let known = self.relayed.len().max(1);
        let at = usize::from(take()) % known;
        let Some(session) = self.relayed.get(at).cloned() else {
            return;
        };
        let amount = usize::from(take()) << (action / 20);
        match action % 20 {
            10 | 11 => send(&session, amount),
            12 | 13 => {
                let received = session.change(|state| {
                    let inbound = &mut state.session.inbound;
                    let received = inbound.receive(amount as u64).is_ok();
                    received && !state.session.is_aborted()
                });
                if received == Some(true) {
                    session.accepted(amount);
                }
            }
            14 => note(&session, |state| {
                state.session.inbound.end();
                state.session.inbound.finish();
            }),
            15 => note(&session, |state| state.session.inbound.refuse()),
            16 => {
                session.change(|state| state.abort(CloseReason::PeerReset));
                self.orphan(at);
            }
            17 => {
                session.change(|state| {
                    state.session.outbound.end();
                    state.session.outbound.acknowledge();
                });
            }
            18 => self.orphan(at),
            19 => {
                drop(self.relayed.swap_remove(at));
                match session.detach(CloseReason::LinkLost, std::time::Instant::now()) {
                    Detached::Safe(state) | Detached::Ended(state) => self.parked.push(*state),
                    Detached::Finished | Detached::Plain => {}
                }
            }
            _ if amount < 64 => session.fix(),
            _ => {
                // The looks of a relay.
                let _ = (session.progress(), session.is_refused(), session.reset());
                let _ = (session.lost(), session.is_evicted(), session.is_movable());
            }
        }
    }

    /// Begins a session. The agent's end has the number that the server gives it.
    fn begin(&mut self, state: SessionState, number: VarInt) {
        if self.is_server {
            let (key, carried) = self.notices.begin(state);
            assert!(self.numbers.insert(key.number), "a number is used again");
            self.relayed.push(carried);
        } else {
            let added = self.notices.add(number, Box::new(state));
            let is_fresh = self.numbers.insert(number);
            assert!(added.is_some() || !is_fresh);
            self.relayed.extend(added);
        }
    }

    /// Drops the halves of a session.
    fn orphan(&mut self, at: usize) {
        self.relayed.swap_remove(at).orphan();
    }

    fn say(&mut self, notice: Notice) {
        let mut bytes = BytesMut::new();
        notice.encode(&mut bytes);
        self.asked += 1;
        self.stream.borrow_mut().incoming.push_back(bytes.freeze());
    }

    /// Continues a session on this tunnel.
    fn resume(&mut self, how: u8, peer: Confirmation) {
        let Some(mut state) = self.parked.pop().map(Box::new) else {
            return;
        };
        state.resumption();
        if !self.is_server {
            let resumed = state.resume(Some(&peer));
            state.session.tell();
            if let Ok(Resumed::Continues(_)) = resumed
                && let Some(carried) = self.notices.add(VarInt::from(how), state)
            {
                self.numbers.insert(carried.number());
                carried.resumed();
                self.relayed.push(carried);
            }
            return;
        }
        let carried = self.notices.number(state);
        carried.resuming();
        assert!(
            self.numbers.insert(carried.number()),
            "a number is used again"
        );
        // A notice may come before the answer, and the answer not at all.
        self.say(Notice::Confirm(carried.number(), peer));
        let peer = match how {
            0..32 => {
                self.parked.extend(carried.take_back().map(|it| *it));
                return;
            }
            32..64 => None,
            _ => Some(&peer),
        };
        match carried.change(|state| state.resume(peer)) {
            Some(Ok(Resumed::Continues(_))) => {
                carried.resumed();
                self.relayed.push(carried);
            }
            Some(Ok(Resumed::Over | Resumed::Lost(_)) | Err(_)) => carried.expire(),
            None => unreachable!("it was attached"),
        }
    }

    /// Takes what was sent to the peer.
    fn look(&mut self) {
        let bytes = self.stream.borrow_mut().outgoing.split();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let decoded = Notice::decode(rest).expect("its own notices");
            let (notice, size) = decoded.expect("whole notices");
            rest = &rest[size..];
            match notice {
                Notice::Confirm(number, _) => assert!(self.numbers.contains(&number)),
                Notice::Unknown(_) => self.answered += 1,
            }
        }
        assert!(self.answered <= self.asked, "an answer to no question");
        assert!(bytes.len() <= (UNKNOWN + 2 * SESSIONS + UNKNOWN) * 28);
        assert!(self.notices.unsafe_ones() <= self.live());
        assert!(self.bounds.held.get() <= self.live() as i64);
    }
}

/// Sends bytes of the local socket.
fn send(session: &Carried, amount: usize) {
    session.change(|state| {
        while let Some(next) = state.resend() {
            let n = next.len();
            next.clear();
            state.resent(n);
        }
        let is_sending = !state.session.is_aborted() && !state.session.outbound.is_done();
        let chunk = blank(amount);
        let n = chunk.len();
        if is_sending && n > 0 && (!state.keeps() || state.has_room()) {
            let copy = state.keeps().then_some(chunk);
            state.sent(copy, n);
        }
    });
}

/// Makes a change, and sends its notice to the peer at once.
fn note(session: &Rc<Carried>, change: impl FnOnce(&mut SessionState)) {
    let hold = session.change(|state| {
        change(state);
        state.session.hold()
    });
    if hold.is_some_and(|hold| hold != Hold::Plain) {
        session.queue(true);
    }
}

/// Lets a task go on until it waits. Returns its output at its end.
async fn step(task: &mut Pin<&mut impl Future<Output = NoticesEnd>>) -> Option<NoticesEnd> {
    poll_fn(|cx| {
        Poll::Ready(match task.as_mut().poll(cx) {
            Poll::Ready(end) => Some(end),
            Poll::Pending => None,
        })
    })
    .await
}

async fn drive(mut data: &[u8]) {
    let stream = Rc::new(RefCell::default());
    let mut tunnel = Tunnel {
        is_server: take_byte(&mut data).unwrap_or_default() < 128,
        notices: Notices::new(|| Duration::from_millis(1)),
        stream: stream.clone(),
        bounds: Arc::new(Bounds {
            bytes: 16 << 10,
            window: 16 << 10,
            budget: Budget::new(64 << 10),
            held: Gauge::default(),
        }),
        relayed: Vec::new(),
        parked: Vec::new(),
        numbers: BTreeSet::new(),
        registered: 0,
        ended: Arc::default(),
        asked: 0,
        answered: 0,
    };
    let used = Cell::new(0_usize);
    let notices = tunnel.notices.clone();
    let halves = (Half(stream.clone()), Half(stream));
    let mut task = pin!(notices.run(halves, || used.set(used.get() + 1)));
    let (began, mut end) = (Instant::now(), None);
    while end.is_none()
        && let Some(action) = take_byte(&mut data)
    {
        match action {
            0..240 => tunnel.act(action, &mut data),
            240.. => advance(Duration::from_millis(16 << (action - 240))).await,
        }
        end = step(&mut task).await;
        tunnel.look();
    }
    // A tunnel with held sessions is in use, which is said at most once in a while.
    assert!(used.get() as u64 <= 2 + began.elapsed().as_secs());
    tunnel.stream.borrow_mut().is_full = false;
    tunnel.parked.clear();
    while !tunnel.relayed.is_empty() {
        tunnel.orphan(0);
    }
    // The end gives up what the peer does not settle.
    for wait in [Duration::ZERO, SETTLED, SETTLED] {
        advance(wait).await;
        if end.is_none() {
            end = step(&mut task).await;
        }
    }
    assert!(end.is_some() || tunnel.live() == 0, "a session stays");
    if let Some(end) = end {
        let _ = end.to_string();
        tunnel.notices.detach_orphans(CloseReason::LinkLost);
        assert_eq!(tunnel.live(), 0, "a session stays without its tunnel");
    }
    assert_eq!(tunnel.bounds.budget.used(), 0);
    assert_eq!(tunnel.bounds.held.get(), 0);
}

/// Does what `data` says on a tunnel of its own.
pub fn run(data: &[u8]) {
    thread_local! {
        static RUNTIME: Runtime = {
            let mut builder = Builder::new_current_thread();
            let runtime = builder.enable_time().start_paused(true).build();
            runtime.expect("a runtime without I/O needs nothing")
        };
    }
    RUNTIME.with(|runtime| runtime.block_on(drive(data)));
}
