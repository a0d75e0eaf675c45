//! A session that a tunnel carries: shared by the halves of its stream and the notices of the tunnel.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tunnel_proto::close::CloseReason;
use tunnel_proto::resumption::Confirmation;
use tunnel_proto::varint::VarInt;

use super::notices::Notices;
use super::session::{Effect, Hold};
use super::state::{Detached, SessionState};
use super::window;
use cpc_datapath::stream::Held;

/// Number of bytes in both directions from which on the server offers to hold a session, however young it is: its sender
/// needs confirmations. A third of the initial window, so that they come before that is full.
const LARGE: u64 = window::LEAST / 3;

/// A session that a tunnel carries.
#[derive(Debug)]
pub struct Carried {
    number: VarInt,
    notices: Weak<Notices>,
    inner: RefCell<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// `None` once the session was detached.
    state: Option<Box<SessionState>>,
    /// Number of accepted bytes in the last confirmation, or in the one that is due.
    told: u64,
    /// Whether the notices know that there is something to tell.
    is_queued: bool,
    /// Whether the halves are gone.
    is_orphan: bool,
    /// Reason for which the other end gave the session up, for the relay.
    reset: Option<CloseReason>,
    /// Whether the session can't go to any other tunnel while this one is there.
    is_fixed: bool,
    /// Whether the session is to go on over another tunnel.
    is_evicted: bool,
    /// Reason for which the tunnel was lost, once it was.
    lost: Option<CloseReason>,
    /// Waker of the relay, which runs in one task.
    waker: Option<Waker>,
    /// Whether the notices count the session as one that both ends hold.
    is_counted: bool,
    /// Confirmation that came before this end had resumed.
    early: Option<Confirmation>,
    /// Whether this end waits for the other one's answer to its resumption.
    is_resuming: bool,
    /// Duty of this end to offer to hold the session, once that is large.
    offers: bool,
}

impl Carried {
    pub(super) fn new(number: VarInt, notices: &Rc<Notices>, state: Box<SessionState>) -> Rc<Self> {
        let told = state.session.inbound.accepted().written;
        Rc::new(Self {
            number,
            notices: Rc::downgrade(notices),
            inner: RefCell::new(Inner {
                state: Some(state),
                told,
                is_queued: false,
                is_orphan: false,
                reset: None,
                is_fixed: false,
                is_evicted: false,
                lost: notices.lost(),
                waker: None,
                is_counted: false,
                early: None,
                is_resuming: false,
                offers: false,
            }),
        })
    }

    /// Returns the number on the tunnel.
    pub fn number(&self) -> VarInt {
        self.number
    }

    /// Changes the state, unless the session was detached.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut SessionState) -> T) -> Option<T> {
        let mut inner = self.inner.borrow_mut();
        let state = inner.state.as_mut()?;
        Some(change(state))
    }

    /// Notes, on the server, that the agent has the session.
    pub(super) fn begun(self: &Rc<Self>) {
        self.inner.borrow_mut().offers = true;
        self.offer_if_large();
    }

    /// Notes the first bytes of `chunk` that the stream has taken, `n` of them.
    pub(super) fn sent(self: &Rc<Self>, chunk: Option<Bytes>, n: usize) {
        if n > 0 {
            self.change(|state| state.sent(chunk, n));
            self.offer_if_large();
        }
    }

    /// Offers at the server to hold the session, once it has carried enough.
    pub(super) fn offer_if_large(self: &Rc<Self>) {
        let mut inner = self.inner.borrow_mut();
        if !inner.offers {
            return;
        }
        let Some(state) = &mut inner.state else {
            return;
        };
        if state.carried() < LARGE {
            return;
        }
        state.offer();
        inner.offers = false;
        drop(inner);
        self.queue(true);
    }

    /// Queues a notice.
    pub(super) fn queue(self: &Rc<Self>, is_urgent: bool) {
        let Some(notices) = self.notices.upgrade() else {
            return;
        };
        let mut inner = self.inner.borrow_mut();
        if !std::mem::replace(&mut inner.is_queued, true) {
            drop(inner);
            notices.queue(self.number, is_urgent);
        } else if is_urgent {
            drop(inner);
            notices.hurry();
        }
    }

    /// Registers the waker of the relay.
    pub(super) fn wait(&self, cx: &Context<'_>) {
        let mut inner = self.inner.borrow_mut();
        match &inner.waker {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            _ => inner.waker = Some(cx.waker().clone()),
        }
    }

    fn wake(&self) {
        let waker = self.inner.borrow_mut().waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Returns the reason for which the other end gave the session up, if it did.
    pub(super) fn reset(&self) -> Option<CloseReason> {
        self.inner.borrow().reset
    }

    /// Whether the session is to go on over another tunnel.
    pub(super) fn is_evicted(&self) -> bool {
        self.inner.borrow().is_evicted
    }

    /// Makes the relay end as if the tunnel were lost, so that the session can go on over another one.
    pub(super) fn evict(&self) {
        self.inner.borrow_mut().is_evicted = true;
        self.wake();
    }

    /// Notes the loss of the tunnel, for a relay that waits for a confirmation alone.
    pub(super) fn lose(&self, reason: CloseReason) {
        self.inner.borrow_mut().lost = Some(reason);
        self.wake();
    }

    /// Returns the reason for which the tunnel was lost, once it was.
    pub(super) fn lost(&self) -> Option<CloseReason> {
        self.inner.borrow().lost
    }

    /// Keeps the session on its tunnel for as long as that is there.
    pub fn fix(&self) {
        self.inner.borrow_mut().is_fixed = true;
    }

    /// Whether the other end has said that it survives the loss of the tunnel.
    pub(super) fn is_peer_safe(&self) -> bool {
        self.change(|state| state.session.is_peer_safe()) == Some(true)
    }

    /// Whether the session may go to another tunnel now.
    pub(super) fn is_movable(&self) -> bool {
        self.is_safe() && self.is_peer_safe() && !self.inner.borrow().is_fixed
    }

    /// Whether the other end takes no more, and has not passed an end of file on.
    pub(super) fn is_refused(&self) -> bool {
        let refused = self.change(|state| {
            let outbound = &state.session.outbound;
            outbound.is_done() && !outbound.is_finished() && !state.session.is_aborted()
        });
        refused == Some(true)
    }

    /// Whether both ends hold the session.
    pub(super) fn is_held(&self) -> bool {
        self.change(|state| state.session.hold() == Hold::Held) == Some(true)
    }

    /// Returns the progress of a session that both ends hold.
    pub(super) fn progress(&self) -> Option<Held> {
        self.change(|state| state.session.progress()).flatten()
    }

    /// Whether the session survives the loss of the tunnel.
    pub(super) fn is_safe(&self) -> bool {
        self.change(|state| state.session.is_safe()) == Some(true)
    }

    /// Notes bytes that the local socket has taken.
    pub(super) fn accepted(self: &Rc<Self>, n: usize) {
        let mut inner = self.inner.borrow_mut();
        let told = inner.told;
        let Some(state) = &mut inner.state else {
            return;
        };
        state.session.inbound.write(n as u64);
        if state.session.hold() == Hold::Plain {
            return;
        }
        let written = state.session.inbound.accepted().written;
        let is_urgent = written - told >= window::confirm_after(written);
        if is_urgent {
            inner.told = written;
        }
        drop(inner);
        self.queue(is_urgent);
    }

    /// Takes in a notice of the other end.
    pub(super) fn heard(self: &Rc<Self>, confirmation: Option<&Confirmation>) {
        let rtt = self.notices.upgrade().map_or(Duration::ZERO, |it| it.rtt());
        let mut inner = self.inner.borrow_mut();
        if inner.is_resuming {
            inner.early = confirmation.copied();
            return;
        }
        let Some(state) = &mut inner.state else {
            return;
        };
        let milestones = |state: &SessionState| {
            let session = &state.session;
            (session.hold(), session.is_settled(), session.is_safe())
        };
        let before = milestones(state);
        let effect = match confirmation {
            Some(confirmation) => {
                let effect = state.confirmed(confirmation);
                state.adapt_window(Instant::now(), rtt);
                effect
            }
            None => Ok(state.unknown_to_peer()),
        };
        let reset = match effect {
            Ok(Effect { reset, .. }) => reset,
            Err(violation) => {
                tracing::warn!(%violation, "the peer broke the protocol of sessions");
                state.abort(CloseReason::ProtocolError);
                Some(CloseReason::ProtocolError)
            }
        };
        let after = milestones(state);
        // What the socket has taken meanwhile waits for its time: an answer at once would be answered in turn.
        let is_news = before != after || reset.is_some() || inner.is_orphan;
        inner.reset = inner.reset.or(reset);
        drop(inner);
        self.count();
        self.wake();
        if is_news && after.0 != Hold::Plain {
            self.queue(true);
        }
        self.remove_if_over();
    }

    /// Notes that this end has asked to resume. Confirmations wait until [`resumed`](Self::resumed).
    pub(super) fn resuming(&self) {
        self.inner.borrow_mut().is_resuming = true;
    }

    /// Goes on after the answer to a resumption.
    pub(super) fn resumed(self: &Rc<Self>) {
        let mut inner = self.inner.borrow_mut();
        inner.is_resuming = false;
        let early = inner.early.take();
        drop(inner);
        self.count();
        if let Some(early) = early {
            self.heard(Some(&early));
        }
    }

    /// Keeps the count of held sessions.
    fn count(&self) {
        let Some(notices) = self.notices.upgrade() else {
            return;
        };
        let mut inner = self.inner.borrow_mut();
        let is_held = match &inner.state {
            Some(state) => state.session.hold() == Hold::Held && !inner.is_orphan,
            None => false,
        };
        match (std::mem::replace(&mut inner.is_counted, is_held), is_held) {
            (false, true) => notices.count_held(),
            (true, false) => notices.discount_held(),
            _ => {}
        }
    }

    /// Returns the confirmation that the other end lacks, if any.
    pub(super) fn take_notice(&self) -> Option<Confirmation> {
        let mut inner = self.inner.borrow_mut();
        inner.is_queued = false;
        let confirmation = inner.state.as_mut()?.session.confirmation()?;
        inner.told = confirmation.accepted.written;
        Some(confirmation)
    }

    /// Whether the halves are gone.
    pub(super) fn is_orphan(&self) -> bool {
        self.inner.borrow().is_orphan
    }

    /// Notes that the halves are gone. A session that both ends hold lives on until the other end knows of its
    /// end.
    pub(super) fn orphan(self: &Rc<Self>) {
        self.inner.borrow_mut().is_orphan = true;
        self.count();
        let is_plain = self.change(|state| state.session.hold() == Hold::Plain);
        if is_plain == Some(true) {
            self.remove();
        } else {
            if let Some(notices) = self.notices.upgrade() {
                notices.orphaned(self.number);
            }
            self.queue(true);
            self.remove_if_over();
        }
    }

    /// Removes an orphan of which the other end knows everything.
    pub(super) fn remove_if_over(&self) {
        let inner = self.inner.borrow();
        let is_over = match &inner.state {
            Some(state) => state.session.is_over(),
            None => true,
        };
        if inner.is_orphan && is_over && !inner.is_queued {
            drop(inner);
            self.remove();
        }
    }

    fn remove(&self) {
        if let Some(notices) = self.notices.upgrade() {
            notices.remove(self.number);
        }
    }

    /// Ends an orphan that the other end does not settle.
    pub(super) fn expire(&self) {
        self.inner.borrow_mut().state = None;
        self.count();
        self.remove();
    }

    /// Takes back the state of a session that this end could not resume here.
    pub(super) fn take_back(&self) -> Option<Box<SessionState>> {
        let state = self.inner.borrow_mut().state.take();
        self.count();
        self.remove();
        state
    }

    /// Takes the session from its tunnel, which was lost for `reason`.
    pub fn detach(&self, reason: CloseReason, now: Instant) -> Detached {
        let state = self.inner.borrow_mut().state.take();
        self.count();
        self.remove();
        state.map_or(Detached::Plain, |state| state.detach(reason, now))
    }
}
