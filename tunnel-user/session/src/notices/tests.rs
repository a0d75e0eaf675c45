use std::sync::Arc;

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio::time::{advance, pause};
use tunnel_proto::resumption::{Accepted, Confirmation, SessionId, Status};

use super::*;
use crate::session::Hold;
use crate::state::Bounds;
use cpc_datapath::Budget;

/// The peer of a tunnel's notices.
struct Peer {
    to_us: mpsc::UnboundedSender<Bytes>,
    from_us: mpsc::UnboundedReceiver<Bytes>,
}

struct Out(mpsc::UnboundedSender<Bytes>);

struct In(mpsc::UnboundedReceiver<Bytes>);

impl SendHalf for Out {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        let sent = self.0.send(std::mem::take(chunk));
        sent.map_err(|_| SendEnd::Link(CloseReason::LinkLost))
    }

    fn finish(&mut self) {}

    fn reset(&mut self, _: CloseReason) {}

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        pending()
    }
}

impl RecvHalf for In {
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        let lost = RecvEnd::Link(CloseReason::LinkLost);
        into.push(self.0.recv().await.ok_or(lost)?);
        Ok(())
    }

    async fn reset(&mut self) -> CloseReason {
        pending().await
    }

    fn stop(&mut self, _: CloseReason) {}
}

fn pair() -> ((Out, In), Peer) {
    let (to_us, inn) = mpsc::unbounded_channel();
    let (out, from_us) = mpsc::unbounded_channel();
    ((Out(out), In(inn)), Peer { to_us, from_us })
}

impl Peer {
    fn say(&self, notice: Notice) {
        let mut bytes = BytesMut::new();
        notice.encode(&mut bytes);
        self.to_us.send(bytes.freeze()).unwrap();
    }

    async fn hear(&mut self) -> Vec<Notice> {
        let bytes = self.from_us.recv().await.unwrap();
        let (mut rest, mut notices) = (&bytes[..], Vec::new());
        while let Some((notice, size)) = Notice::decode(rest).unwrap() {
            notices.push(notice);
            rest = &rest[size..];
        }
        notices
    }
}

fn state(bytes: u64) -> SessionState {
    let bounds = Bounds {
        bytes,
        window: 1 << 20,
        budget: Budget::new(1 << 30),
        held: Gauge::default(),
    };
    SessionState::new(SessionId::new([1; 16]), Arc::new(bounds))
}

fn confirm(number: VarInt, written: u64) -> Notice {
    let accepted = Accepted {
        written,
        ..Accepted::default()
    };
    let confirmation = Confirmation {
        accepted,
        status: Status::Open,
        is_safe: true,
    };
    Notice::Confirm(number, confirmation)
}

/// Runs `test` beside the notices of a tunnel, in virtual time.
fn run<F: Future<Output = ()>>(test: impl FnOnce(Rc<Notices>, Peer) -> F) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        pause();
        let (halves, peer) = pair();
        let notices = Notices::new(|| Duration::from_millis(1));
        let ran = notices.clone();
        tokio::task::spawn_local(async move { ran.run(halves, || ()).await });
        test(notices, peer).await;
    });
}

#[test]
fn a_session_is_offered_when_it_is_old_enough_and_held_when_the_agent_agrees() {
    run(|notices, mut peer| async move {
        let (key, session) = notices.begin(state(1000));
        advance(PLAIN - DELAY).await;
        assert!(!session.is_held());
        let Notice::Confirm(number, offer) = peer.hear().await[0] else {
            panic!("no offer");
        };
        assert_eq!((number, offer.is_safe), (key.number, false));
        let hold = session.change(|state| state.session.hold());
        assert_eq!(hold, Some(Hold::Offered));
        peer.say(confirm(key.number, 0));
        tokio::time::sleep(DELAY).await;
        assert!(session.is_held() && session.is_movable());
        // The other end asks for a life sign more often while there is such a session.
        assert!(notices.next_use().is_some());
    });
}

#[test]
fn an_agent_that_does_not_know_a_session_leaves_it_plain() {
    run(|notices, mut peer| async move {
        let (key, session) = notices.begin(state(1000));
        peer.hear().await;
        session.change(|state| state.sent(Some(Bytes::from_static(b"kept")), 4));
        peer.say(Notice::Unknown(key.number));
        tokio::time::sleep(DELAY).await;
        let kept = session.change(|state| (state.session.hold(), state.kept()));
        assert_eq!(kept, Some((Hold::Plain, 0)));
    });
}

#[test]
fn an_end_answers_for_sessions_that_it_does_not_know() {
    run(|_notices, mut peer| async move {
        let number = VarInt::from(7_u8);
        peer.say(confirm(number, 0));
        assert_eq!(peer.hear().await, [Notice::Unknown(number)]);
        // A peer that talks of nothing else is answered within a bound.
        for _ in 0..3 * MAX_UNKNOWN {
            peer.say(confirm(number, 0));
        }
        tokio::time::sleep(DELAY).await;
    });
}

#[test]
fn a_peer_that_confirms_too_much_ends_its_session_alone() {
    run(|notices, mut peer| async move {
        let [(bad, bad_session), (good, good_session)] = [1, 2].map(|_| notices.begin(state(1000)));
        peer.hear().await;
        peer.say(confirm(bad.number, 1));
        peer.say(confirm(good.number, 0));
        tokio::time::sleep(DELAY).await;
        assert_eq!(bad_session.reset(), Some(CloseReason::ProtocolError));
        assert_eq!(good_session.reset(), None);
        assert!(good_session.is_held());
    });
}

/// A peer that takes everything and confirms nothing.
#[test]
fn a_session_keeps_no_more_than_its_bound() {
    let mut state = state(10_000);
    state.offer();
    let mut kept = 0;
    while state.has_room() {
        state.sent(Some(Bytes::from_static(&[0; 100])), 100);
        kept += 100;
    }
    assert!(kept <= 10_000, "{kept} bytes");
    // Small chunks cost more than their bytes.
    assert!(kept <= 10_000 * 100 / 200, "{kept} bytes");
}

#[test]
fn the_end_of_the_tunnel_is_told_to_a_relay_that_waits_for_a_confirmation() {
    run(|notices, peer| async move {
        let (_, session) = notices.begin(state(1000));
        drop(peer);
        tokio::time::sleep(2 * PLAIN).await;
        assert_eq!(session.lost(), Some(CloseReason::LinkLost));
        assert_eq!(notices.lost(), Some(CloseReason::LinkLost));
    });
}

/// A peer that never settles what has ended keeps no entry.
#[test]
fn a_session_that_is_not_settled_expires() {
    run(|notices, mut peer| async move {
        let (key, session) = notices.begin(state(1000));
        peer.hear().await;
        peer.say(confirm(key.number, 0));
        tokio::time::sleep(DELAY).await;
        session.orphan();
        tokio::time::sleep(DELAY).await;
        assert_eq!(notices.sessions.borrow().len(), 1);
        tokio::time::sleep(SETTLE + PLAIN).await;
        assert!(notices.sessions.borrow().is_empty());
        assert!(notices.next_use().is_none());
    });
}
