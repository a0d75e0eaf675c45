//! One end of a session with the bytes that it keeps. It may move between threads.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use prometheus_client::metrics::gauge::Gauge;
use tunnel_proto::close::CloseReason;
use tunnel_proto::handover;
use tunnel_proto::resumption::{Confirmation, SessionId};

use super::saved::InvalidState;
use super::session::{Effect, Hold, Resumed, Session};
use super::unconfirmed::Unconfirmed;
use super::violation::Violation;
use super::window::Window;
use cpc_datapath::Budget;
use cpc_datapath::budget::Charge;
use cpc_observe::metrics::GaugeGuard;

/// Granularity of charges for kept bytes.
const CHARGE_STEP: u64 = 16 << 10;

/// Bytes of memory that a kept chunk takes beside its own.
const CHUNK_COST: u64 = 128;

/// Common bounds of the sessions of one tunnel, or of one agent.
#[derive(Debug)]
pub struct Bounds {
    /// Maximum number of bytes that one session keeps. A sender waits for confirmations from there on.
    pub bytes: u64,
    /// Maximum number of bytes on their way to the other end's socket.
    pub window: u64,
    /// Budget that is charged for them.
    pub budget: Budget,
    /// Counts the sessions that both ends hold.
    pub held: Gauge,
}

/// One end of a session.
#[derive(Debug)]
pub struct SessionState {
    /// The decisions.
    pub session: Session,
    kept: Unconfirmed,
    /// Bound on the bytes on their way to the other end's socket.
    window: Window,
    /// Kept bytes that the present stream has yet to carry.
    resend: VecDeque<Bytes>,
    bounds: Arc<Bounds>,
    charge: Option<Charge>,
    /// Counts the session while both ends hold it.
    held: Option<GaugeGuard>,
    registration: Option<Registration>,
}

/// Called when a session ends, with its name.
pub struct Registration(pub Box<dyn FnOnce(SessionId) + Send>);

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registration")
    }
}

impl Drop for SessionState {
    fn drop(&mut self) {
        if let Some(Registration(end)) = self.registration.take() {
            end(self.session.id());
        }
    }
}

/// Fate of a session whose tunnel was lost.
#[derive(Debug)]
pub enum Detached {
    /// The session can go on over another tunnel.
    Safe(Box<SessionState>),
    /// The session has ended. The other end learns that over another tunnel.
    Ended(Box<SessionState>),
    /// Both directions had ended in order, and the other end knows.
    Finished,
    /// The session ends with its tunnel.
    Plain,
}

impl SessionState {
    /// Creates a plain session.
    pub fn new(id: SessionId, bounds: Arc<Bounds>) -> Self {
        Self {
            session: Session::new(id),
            kept: Unconfirmed::default(),
            window: Window::new(bounds.window),
            resend: VecDeque::new(),
            bounds,
            charge: None,
            held: None,
            registration: None,
        }
    }

    /// Sets what to do when the session ends.
    pub fn register(&mut self, registration: Registration) {
        self.registration = Some(registration);
    }

    /// Offers the other end to hold the session.
    pub fn offer(&mut self) {
        self.change_hold(|session| {
            session.offer();
            Ok(Effect::default())
        })
        // An offer asks nothing of the other end.
        .ok();
    }

    /// Makes a change that may be the first to keep bytes, and does what follows for them.
    fn change_hold(
        &mut self,
        change: impl FnOnce(&mut Session) -> Result<Effect, Violation>,
    ) -> Result<Effect, Violation> {
        let was_plain = self.session.hold() == Hold::Plain;
        let effect = change(&mut self.session)?;
        if was_plain && self.session.hold() != Hold::Plain {
            self.kept = Unconfirmed::new(self.session.outbound.taken());
        }
        if self.held.is_none() && self.session.hold() == Hold::Held {
            self.held = Some(GaugeGuard::new(&self.bounds.held));
        }
        self.release(effect.release);
        Ok(effect)
    }

    /// Takes in a confirmation of the present tunnel. See [`Session::confirmed`].
    ///
    /// # Errors
    /// [`Violation`].
    pub fn confirmed(&mut self, peer: &Confirmation) -> Result<Effect, Violation> {
        self.change_hold(|session| session.confirmed(peer))
    }

    /// Adapts the window to what the other end has confirmed, over a path with this round-trip time.
    pub fn adapt_window(&mut self, now: Instant, rtt: Duration) {
        let confirmed = self.session.outbound.confirmed();
        self.window.confirmed(confirmed, now, rtt);
    }

    /// Returns the number of bytes that may be sent now. Otherwise confirmations make room.
    pub fn room(&mut self) -> u64 {
        let outbound = &self.session.outbound;
        match outbound.is_done() {
            true => u64::MAX,
            false => self.window.room(outbound.taken() - outbound.confirmed()),
        }
    }

    /// Returns the number of bytes that the session has carried.
    pub fn carried(&self) -> u64 {
        self.session.outbound.taken() + self.session.inbound.received()
    }

    /// Notes that the other end does not know the session. See [`Session::unknown_to_peer`].
    pub fn unknown_to_peer(&mut self) -> Effect {
        let effect = self.session.unknown_to_peer();
        self.held = None;
        self.window.open();
        self.release(effect.release);
        effect
    }

    /// Notes that the other end has reset the stream.
    pub fn reset_by_peer(&mut self, reason: CloseReason) {
        let effect = self.session.reset_by_peer(reason);
        self.release(effect.release);
    }

    /// Gives the session up.
    pub fn abort(&mut self, reason: CloseReason) {
        self.session.abort(reason);
        self.release(u64::MAX);
    }

    /// Ends the direction to the other end, which takes no more.
    pub fn stopped_by_peer(&mut self) {
        let released = self.session.outbound.abandon();
        self.release(released);
    }

    /// Whether bytes that are sent have to be kept.
    pub fn keeps(&self) -> bool {
        self.session.hold() != Hold::Plain && !self.session.outbound.is_done()
    }

    /// Whether another chunk may be kept. Otherwise confirmations make room.
    pub fn has_room(&self) -> bool {
        let cost = self.cost();
        let charged = self.charge.as_ref().map_or(0, Charge::bytes);
        // One chunk may wait uncharged: without any there would be no confirmation to wait for.
        cost == 0 || cost < self.bounds.bytes && charged >= cost
    }

    /// Notes the first bytes of `chunk` that the stream has taken, `n` of them.
    pub fn sent(&mut self, chunk: Option<Bytes>, n: usize) {
        let outbound = &mut self.session.outbound;
        outbound.take(n as u64);
        outbound.send(n as u64);
        if let Some(mut chunk) = chunk {
            chunk.truncate(n);
            self.kept.push(chunk);
            self.charge();
        }
    }

    /// Returns the next kept bytes that the present stream has yet to carry.
    pub fn resend(&mut self) -> Option<&mut Bytes> {
        while self.resend.front().is_some_and(Bytes::is_empty) {
            self.resend.pop_front();
        }
        self.resend.front_mut()
    }

    /// Notes that the present stream has carried `n` kept bytes again.
    pub fn resent(&mut self, n: usize) {
        self.session.outbound.send(n as u64);
        if self.kept.is_empty() {
            self.discharge();
        }
    }

    /// Returns the number of bytes of memory that keeping takes.
    fn cost(&self) -> u64 {
        let cost = |bytes, chunks| bytes + chunks as u64 * CHUNK_COST;
        let kept = cost(self.kept.len(), self.kept.chunks());
        match self.session.outbound.unsent() {
            0 => kept,
            // A peer that does not know the session any more needs nothing kept, but takes the rest of the stream.
            unsent => kept.max(cost(unsent, self.resend.len())),
        }
    }

    fn charge(&mut self) {
        let cost = self.cost();
        let budget = &self.bounds.budget;
        let charge = self
            .charge
            .get_or_insert_with(|| Charge::new(budget.clone()));
        if cost > charge.bytes() {
            // Refused: the session waits, see `has_room`.
            let _ = charge.set(cost.next_multiple_of(CHARGE_STEP));
        }
    }

    fn release(&mut self, n: u64) {
        if n == 0 {
            return;
        }
        self.kept.release(n);
        if self.session.outbound.is_done() {
            self.resend.clear();
        }
        self.discharge();
    }

    /// Lowers the charge to what keeping takes.
    fn discharge(&mut self) {
        let needed = self.cost().next_multiple_of(CHARGE_STEP);
        let Some(charge) = &mut self.charge else {
            return;
        };
        // A charge goes down without asking. One step more saves the next one.
        if needed == 0 || charge.bytes() > needed + CHARGE_STEP {
            let _ = charge.set(needed);
        }
    }

    /// Returns the number of kept bytes.
    pub fn kept(&self) -> u64 {
        self.kept.len()
    }

    /// Notes the loss of the tunnel.
    pub(super) fn detach(mut self: Box<Self>, reason: CloseReason, now: Instant) -> Detached {
        let was_plain = self.session.hold() == Hold::Plain;
        if self.session.detach(reason, now) {
            self.release(u64::MAX);
        }
        if was_plain {
            Detached::Plain
        } else if self.session.is_over() && !self.session.is_aborted() {
            Detached::Finished
        } else if self.session.is_over() {
            Detached::Plain
        } else if self.session.is_safe() {
            Detached::Safe(self)
        } else {
            Detached::Ended(self)
        }
    }

    /// Returns the session, which has no tunnel and is held, for another process.
    pub fn save(&self) -> handover::Session {
        let mut kept = BytesMut::with_capacity(usize::try_from(self.kept.len()).unwrap_or(0));
        if !self.session.outbound.is_done() {
            let chunks = self.kept.from(self.session.outbound.confirmed());
            chunks.for_each(|chunk| kept.extend_from_slice(&chunk));
        }
        self.session.save(kept.freeze())
    }

    /// Restores a session that another process has [saved](Self::save), and that has no tunnel since
    /// `detached`.
    ///
    /// # Errors
    /// [`InvalidState`].
    pub fn restore(
        saved: &handover::Session,
        bounds: Arc<Bounds>,
        detached: Instant,
    ) -> Result<Self, InvalidState> {
        let session = Session::restore(saved, detached)?;
        let mut kept = Unconfirmed::new(session.outbound.confirmed());
        let bytes = saved.outbound.as_ref().map(|outbound| &outbound.kept);
        if let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) {
            // A slice would keep the whole message.
            kept.push(Bytes::copy_from_slice(bytes));
        }
        let mut restored = Self {
            session,
            kept,
            resend: VecDeque::new(),
            held: Some(GaugeGuard::new(&bounds.held)),
            window: Window::new(bounds.window),
            bounds,
            charge: None,
            registration: None,
        };
        if !restored.kept.is_empty() {
            restored.charge();
        }
        Ok(restored)
    }

    /// Prepares the session for another tunnel, and returns the state to tell there.
    pub fn resumption(&mut self) -> Confirmation {
        let (state, _dropped) = self.session.resumption();
        state
    }

    /// Continues on another tunnel. See [`Session::resume`].
    ///
    /// # Errors
    /// [`Violation`].
    pub fn resume(&mut self, peer: Option<&Confirmation>) -> Result<Resumed, Violation> {
        let resumed = self.session.resume(peer)?;
        if let Resumed::Continues(release) = resumed {
            self.release(release);
            let from = self.session.outbound.sent();
            self.resend = if self.session.outbound.is_done() {
                VecDeque::new()
            } else {
                self.kept.from(from).collect()
            };
        } else {
            self.release(u64::MAX);
        }
        Ok(resumed)
    }
}

#[cfg(test)]
mod tests {
    use tunnel_proto::resumption::Accepted;

    use super::*;

    const CHUNK: usize = 100 << 10;

    /// Returns a held session that has sent a chunk, has lost its tunnel, and goes on over another one. The budget is
    /// its own.
    fn resumed() -> (Box<SessionState>, Budget) {
        let budget = Budget::new(1 << 20);
        let bounds = Bounds {
            bytes: 1 << 20,
            window: 1 << 20,
            budget: budget.clone(),
            held: Gauge::default(),
        };
        let mut state = Box::new(SessionState::new(SessionId::new([1; 16]), bounds.into()));
        state.confirmed(&Confirmation::default()).unwrap();
        state.sent(Some(vec![0; CHUNK].into()), CHUNK);
        let Detached::Safe(mut state) = state.detach(CloseReason::LinkLost, Instant::now()) else {
            panic!("every byte is kept")
        };
        state.resumption();
        let resumed = state.resume(Some(&Confirmation::default())).unwrap();
        assert_eq!(resumed, Resumed::Continues(0));
        (state, budget)
    }

    /// Confirmations of bytes that this stream has not carried would release what is to be sent.
    #[test]
    fn a_stream_has_carried_nothing_when_the_answer_is_told() {
        let (mut state, _) = resumed();
        state.session.tell();
        assert_eq!(state.session.outbound.sent(), 0);
        let early = Confirmation {
            accepted: Accepted {
                written: 1,
                ..Accepted::default()
            },
            ..Confirmation::default()
        };
        assert_eq!(state.confirmed(&early), Err(Violation::TooMuch));
    }

    /// A peer that takes no bytes, and says that it does not know the session, must not make memory free of charge.
    #[test]
    fn bytes_that_wait_to_be_sent_again_are_charged() {
        let (mut state, budget) = resumed();
        state.unknown_to_peer();
        assert_eq!(state.kept(), 0);
        assert!(budget.used() >= CHUNK as u64);
        let waiting = state.resend().unwrap();
        let sent = waiting.split_to(CHUNK - 1).len();
        state.resent(sent);
        assert!(budget.used() < CHUNK as u64);
        state.resend().unwrap().clear();
        state.resent(1);
        assert_eq!((state.resend(), budget.used()), (None, 0));
    }
}
