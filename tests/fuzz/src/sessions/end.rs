//! An end of a session, with a peer and a local socket that do anything at any time. A model beside the end
//! checks it. The calls are those of the halves of a stream, of the notices, and of the resumption.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use prometheus_client::metrics::gauge::Gauge;
use prost::Message;
use tunnel_proto::close::CloseReason;
use tunnel_proto::handover;
use tunnel_proto::preface::{ResumeRequest, ResumeResponse, StreamHead};
use tunnel_proto::resumption::{Accepted, Confirmation, Notice, SessionId, SessionKey, Status};
use tunnel_proto::varint::VarInt;

use super::pattern::{self, MAX_PART, part};
use super::peer::confirmation;
use super::{Bounds, Detached, Hold, Registration, Resumed, SessionState};
use crate::{Budget, take_byte, take_number, take_piece};

/// Kept bytes of one session, and of all: soon reached.
const BOUNDS: (u64, u64) = (24 << 10, 56 << 10);

/// An end with its model.
pub struct End {
    /// `None` once the end has forgotten the session.
    state: Option<Box<SessionState>>,
    bounds: Arc<Bounds>,
    /// Sessions that were registered, and those that have ended.
    registered: usize,
    ended: Arc<AtomicUsize>,
    now: Instant,
    /// Whether a tunnel carries the session.
    is_carried: bool,
    /// Whether the local socket is there.
    has_socket: bool,
    /// Kept bytes that an earlier process has handed over, and their offset.
    earlier: (u64, Bytes),
    taken: u64,
    /// Offset of the next byte on the present stream.
    position: u64,
    /// Highest offset that a stream has carried.
    highest: u64,
    confirmed: u64,
    /// End of file of the local socket, once that has reached it.
    is_ended: bool,
    /// Presence of that end on the present stream.
    is_finished: bool,
    received: u64,
    accepted: Accepted,
    is_input_ended: bool,
    is_aborted: bool,
    /// Whether a session that was held is over.
    is_over: bool,
}

impl End {
    fn with(make: impl FnOnce(&Arc<Bounds>, Instant) -> Option<SessionState>) -> Option<Self> {
        let bounds = Arc::new(Bounds {
            bytes: BOUNDS.0,
            window: BOUNDS.0,
            budget: Budget::new(BOUNDS.1),
            held: Gauge::default(),
        });
        let now = Instant::now();
        let state = make(&bounds, now)?;
        let mut end = Self {
            state: None,
            bounds,
            registered: 0,
            ended: Arc::default(),
            now,
            is_carried: true,
            has_socket: true,
            earlier: (0, Bytes::new()),
            taken: 0,
            position: 0,
            highest: 0,
            confirmed: 0,
            is_ended: false,
            is_finished: false,
            received: 0,
            accepted: Accepted::default(),
            is_input_ended: false,
            is_aborted: false,
            is_over: false,
        };
        end.register(state);
        Some(end)
    }

    /// Creates the end of a plain session, on a tunnel.
    pub fn new() -> Self {
        let id = SessionId::new([7; 16]);
        let end = Self::with(|bounds, _| Some(SessionState::new(id, bounds.clone())));
        end.unwrap_or_else(|| unreachable!("it was made"))
    }

    /// Restores the end of a session that another process has saved. `None`: it contradicts itself.
    pub fn restored(saved: &handover::Session, has_socket: bool) -> Option<Self> {
        let mut end = Self::with(|bounds, now| {
            let restored = SessionState::restore(saved, bounds.clone(), now).ok()?;
            assert_eq!(restored.save(), normal(saved), "something is lost");
            Some(restored)
        })?;
        let (outbound, inbound) = (saved.outbound.as_ref()?, saved.inbound.as_ref()?);
        end.is_carried = false;
        end.is_aborted = saved.is_abort_agreed || saved.aborted.is_some();
        end.has_socket = has_socket && !end.is_aborted;
        end.earlier = (outbound.confirmed, outbound.kept.clone());
        (end.taken, end.highest) = (outbound.taken, outbound.ever_sent);
        end.confirmed = outbound.confirmed;
        end.is_ended = outbound.is_ended;
        end.received = inbound.written;
        end.accepted = Accepted {
            written: inbound.written,
            is_finished: inbound.is_finished,
            is_refused: inbound.is_refused,
        };
        end.is_input_ended = inbound.is_finished;
        end.check();
        Some(end)
    }

    fn register(&mut self, mut state: SessionState) {
        let ended = self.ended.clone();
        state.register(Registration(Box::new(move |_| {
            ended.fetch_add(1, Ordering::Relaxed);
        })));
        self.registered += 1;
        self.state = Some(Box::new(state));
    }

    /// Does what `data` says, to its end or that of the session.
    pub fn run(mut self, mut data: &[u8]) {
        while let Some(action) = take_byte(&mut data) {
            self.act(action, &mut data);
            self.check();
            if self.state.is_none() {
                break;
            }
        }
        self.send(usize::MAX);
        self.check();
        if self.is_carried
            && self.has_socket
            && self.state.as_ref().is_some_and(|it| is_sending(it))
        {
            assert_eq!(self.position, self.taken, "kept bytes are missing");
        }
        self.state = None;
        assert_eq!(self.ended.load(Ordering::Relaxed), self.registered);
        assert_eq!(self.bounds.budget.used(), 0);
        assert_eq!(self.bounds.held.get(), 0);
    }

    fn act(&mut self, action: u8, data: &mut &[u8]) {
        let Some(state) = &mut self.state else {
            return;
        };
        let is_carried = self.is_carried;
        let has_stream = is_carried && self.has_socket;
        let is_receiving = has_stream && !(self.accepted.is_finished || self.accepted.is_refused);
        match action % 20 {
            0 | 1 if has_stream => {
                let amount = usize::from(take_byte(data).unwrap_or_default());
                // Short ones by the byte, long ones so that the bounds are soon reached.
                let length = if amount < 64 { amount } else { amount << 6 };
                self.read(length, usize::from(take_byte(data).unwrap_or(255)));
            }
            2 if has_stream => self.send(usize::from(take_byte(data).unwrap_or_default())),
            3 if has_stream && is_sending(state) && state.resend().is_none() => {
                state.session.outbound.end();
                (self.is_ended, self.is_finished) = (true, true);
            }
            4 if is_carried && self.is_finished && self.position == self.taken => {
                state.session.outbound.acknowledge();
            }
            5 if has_stream => match action {
                ..64 => state.stopped_by_peer(),
                64..128 => self.abort(CloseReason::PeerReset),
                _ => {
                    state.reset_by_peer(CloseReason::Stalled);
                    self.has_socket = false;
                }
            },
            6 if is_receiving => {
                let n = u64::from(take_byte(data).unwrap_or_default()) << (action / 20);
                let received = state.session.inbound.receive(n);
                assert_eq!(received.is_err(), self.is_input_ended && n > 0);
                match received {
                    Ok(()) => self.received += n,
                    Err(_) => self.abort(CloseReason::ProtocolError),
                }
            }
            7 if is_receiving => {
                state.session.inbound.end();
                self.is_input_ended = true;
            }
            8 if has_stream => {
                let n = u64::from(take_byte(data).unwrap_or_default()) << (action / 20);
                let n = n.min(self.received - self.accepted.written);
                state.session.inbound.write(n);
                self.accepted.written += n;
            }
            9 if has_stream => {
                state.session.inbound.finish();
                self.accepted.is_finished |=
                    self.is_input_ended && self.accepted.written == self.received;
            }
            10 if has_stream => {
                state.session.inbound.refuse();
                self.accepted.is_refused = true;
            }
            11 if is_carried => {
                self.tell();
            }
            12 if is_carried => {
                let mut bytes = take_piece(data).unwrap_or_default();
                while let Ok(Some((notice, size))) = Notice::decode(bytes) {
                    bytes = &bytes[size..];
                    self.hear(&notice);
                }
            }
            13 | 14 if is_carried => {
                let confirmation = self.confirmation(data);
                self.hear(&Notice::Confirm(VarInt::MAX, confirmation));
            }
            15 if is_carried => match action {
                ..128 => state.offer(),
                _ => self.hear(&Notice::Unknown(VarInt::MAX)),
            },
            16 if is_carried => self.cut(),
            17 if !is_carried => self.resume_as_server(data),
            18 if !is_carried => self.resume_as_agent(data),
            19 if !is_carried && state.session.hold() == Hold::Held => self.hand_over(),
            // The sessions of a tunnel are forgotten without a relay alone.
            19 if !self.has_socket && state.session.is_over() => self.state = None,
            _ => {}
        }
    }

    fn abort(&mut self, reason: CloseReason) {
        if let Some(state) = &mut self.state {
            state.abort(reason);
            // Even where both directions are over, the peer has to learn of the abort.
            self.is_over = false;
        }
        self.has_socket = false;
    }

    /// Sends bytes of the local socket, of which the stream takes at most `credit`.
    fn read(&mut self, length: usize, credit: usize) {
        self.send(usize::MAX);
        let Some(state) = self.state.as_mut().filter(|it| is_sending(it)) else {
            return;
        };
        if self.is_ended {
            return;
        }
        let chunk = part(self.taken, length);
        let n = chunk.len().min(credit << 6);
        let copy = match state.keeps() {
            true if !state.has_room() => return,
            true => Some(chunk),
            false => None,
        };
        if n > 0 {
            state.sent(copy, n);
            self.taken += n as u64;
            self.position = self.taken;
            self.highest = self.taken;
        }
    }

    /// Sends kept bytes again, `credit` of them at most.
    fn send(&mut self, mut credit: usize) {
        if !self.is_carried || !self.has_socket {
            return;
        }
        let Some(state) = self.state.as_mut().filter(|it| is_sending(it)) else {
            return;
        };
        while credit > 0
            && let Some(next) = state.resend()
        {
            let n = next.len().min(credit);
            let sent = next.split_to(n);
            state.resent(n);
            credit -= n;
            assert_at(&self.earlier, self.position, &sent);
            self.position += n as u64;
        }
        self.highest = self.highest.max(self.position);
    }

    /// Sends the confirmation that the peer lacks.
    fn tell(&mut self) {
        let Some(state) = &mut self.state else {
            return;
        };
        if let Some(told) = state.session.confirmation() {
            assert_ne!(state.session.hold(), Hold::Plain);
            assert_eq!(told.accepted, self.accepted);
            let notice = Notice::Confirm(VarInt::MAX, told);
            let mut bytes = BytesMut::new();
            notice.encode(&mut bytes);
            assert_eq!(Notice::decode(&bytes), Ok(Some((notice, bytes.len()))));
            assert_eq!(state.session.confirmation(), None, "told twice");
        }
    }

    /// Makes a state of the peer, mostly near that of the end.
    fn confirmation(&self, data: &mut &[u8]) -> Confirmation {
        let [how, flags] = [(); 2].map(|()| take_byte(data).unwrap_or_default());
        let some = u64::from(how / 8);
        let written = match how % 8 {
            0 => self.position,
            1 => self.confirmed,
            2 => self.highest,
            3 => self.taken,
            4 => self.confirmed + some,
            5 => self.position.saturating_sub(some),
            6 => self.position + some,
            _ => take_number(data).unsigned_abs(),
        };
        confirmation(written, flags)
    }

    /// Takes in a notice of the present tunnel.
    fn hear(&mut self, notice: &Notice) {
        let Some(state) = &mut self.state else {
            return;
        };
        let Notice::Confirm(_, peer) = notice else {
            assert_eq!(state.unknown_to_peer().reset, None);
            return;
        };
        let is_live = is_sending(state);
        let had_abort = state.session.is_aborted();
        match state.confirmed(peer) {
            Ok(effect) => {
                assert_eq!(
                    effect.reset.is_some(),
                    !had_abort && state.session.is_aborted()
                );
                if is_live && !state.session.is_aborted() {
                    assert!(peer.accepted.written <= self.position, "never sent");
                }
                if peer.status == Status::Settled && !had_abort {
                    assert!(state.session.outbound.is_done());
                }
                if effect.reset.is_some() {
                    self.has_socket = false;
                }
            }
            Err(_) => self.abort(CloseReason::ProtocolError),
        }
    }

    /// Loses the tunnel.
    fn cut(&mut self) {
        let Some(state) = self.state.take() else {
            return;
        };
        let (was_safe, was_plain) = (state.session.is_safe(), state.session.hold() == Hold::Plain);
        self.is_carried = false;
        match state.detach(CloseReason::LinkLost, self.now) {
            Detached::Safe(state) => {
                assert!(was_safe);
                self.state = Some(state);
            }
            Detached::Ended(state) => {
                assert!(!was_safe && state.session.is_aborted());
                self.has_socket = false;
                self.state = Some(state);
            }
            Detached::Finished => assert!(!was_plain && !self.is_aborted),
            Detached::Plain => assert!(was_plain || self.is_aborted),
        }
    }

    /// Drops what was received and not written: the peer sends it again.
    fn drop_received(&mut self) {
        self.received = self.accepted.written;
        self.is_input_ended &= self.accepted.is_finished;
    }

    fn resume_as_server(&mut self, data: &mut &[u8]) {
        let Some(state) = &mut self.state else {
            return;
        };
        let key = SessionKey {
            id: state.session.id(),
            number: VarInt::MAX,
        };
        let told = state.resumption();
        assert_eq!(told.accepted, self.accepted);
        self.drop_received();
        let request = ResumeRequest { key, state: told };
        let mut bytes = BytesMut::new();
        request.encode(&mut bytes);
        let head = StreamHead::decode(&bytes).map(|it| it.map(|(head, _)| head));
        assert_eq!(head, Ok(Some(StreamHead::Resume(request))));
        let peer = match take_byte(data).unwrap_or_default() {
            // The tunnel did not carry the exchange.
            0..16 => return,
            16..32 => match ResumeResponse::decode(take_piece(data).unwrap_or_default()) {
                Ok(Some((ResumeResponse::Resumed(peer), _))) => Some(peer),
                Ok(Some((ResumeResponse::Unknown, _))) => None,
                _ => return,
            },
            32..64 => None,
            _ => Some(self.confirmation(data)),
        };
        self.resumed(peer.as_ref());
    }

    fn resume_as_agent(&mut self, data: &mut &[u8]) {
        let peer = self.confirmation(data);
        if let Some(state) = &mut self.state {
            state.resumption();
        }
        self.drop_received();
        self.resumed(Some(&peer));
        if let Some(state) = &mut self.state {
            let answer = state.session.tell();
            assert_eq!(answer.accepted, self.accepted);
        }
    }

    /// Continues on another tunnel, where the peer is in the state `peer`.
    fn resumed(&mut self, peer: Option<&Confirmation>) {
        let Some(mut state) = self.state.take() else {
            return;
        };
        match state.resume(peer) {
            Ok(Resumed::Continues(_)) => {
                let is_live = is_sending(&state);
                let outbound = &mut state.session.outbound;
                self.position = outbound.sent();
                if is_live {
                    assert_eq!(Some(self.position), peer.map(|it| it.accepted.written));
                }
                self.is_finished = outbound.is_done() || outbound.is_confirmed_to_its_end();
                if !self.has_socket {
                    // Both directions of the stream are closed.
                    outbound.end();
                    state.session.inbound.refuse();
                    (self.is_ended, self.is_finished) = (true, true);
                    self.accepted.is_refused = true;
                }
                self.is_carried = true;
                self.state = Some(state);
            }
            Ok(Resumed::Over) => assert!(peer.is_none() && state.session.is_over()),
            Ok(Resumed::Lost(_)) => assert!(state.session.is_aborted()),
            Err(_) => {}
        }
    }

    /// Hands the session over to another process.
    fn hand_over(&mut self) {
        let Some(state) = self.state.take() else {
            return;
        };
        let saved = state.save();
        // Its budget is that of another process.
        drop(state);
        let decoded = handover::Session::decode(&*saved.encode_to_vec());
        assert_eq!(decoded.as_ref(), Ok(&saved));
        let restored = SessionState::restore(&saved, self.bounds.clone(), self.now);
        let restored = restored.expect("a process understands its own state");
        assert_eq!(restored.save(), saved);
        self.drop_received();
        self.register(restored);
    }

    /// Checks what holds at any time.
    fn check(&mut self) {
        let Some(state) = &self.state else {
            return;
        };
        let session = &state.session;
        let outbound = &session.outbound;
        assert_eq!(state.kept(), outbound.kept());
        assert_eq!(outbound.taken(), self.taken);
        assert!(self.confirmed <= outbound.confirmed(), "taken back");
        self.confirmed = outbound.confirmed();
        assert!(self.confirmed <= self.highest && self.highest <= self.taken);
        let is_carried = self.is_carried;
        assert_eq!(session.detached().is_none(), is_carried);
        if is_carried && is_sending(state) {
            assert_eq!(outbound.sent(), self.position);
        }
        let handed_over = self.earlier.1.len() as u64;
        assert!(state.kept() < BOUNDS.0.max(handed_over) + MAX_PART as u64);
        assert!(self.bounds.budget.used() <= BOUNDS.1);
        assert_eq!(session.inbound.accepted(), self.accepted);
        assert_eq!(
            session.inbound.unwritten(),
            self.received - self.accepted.written
        );
        let is_held = session.hold() == Hold::Held;
        // A peer that breaks the protocol with its first confirmation is not counted.
        assert!(session.is_aborted() || self.bounds.held.get() == i64::from(is_held));
        assert!(session.is_aborted() || !self.is_aborted, "aborted once");
        self.is_aborted = session.is_aborted();
        assert!(session.is_over() || !self.is_over, "over once");
        self.is_over = session.is_over() && session.hold() != Hold::Plain;
        if let Some(progress) = session.progress() {
            assert!(!self.is_aborted && progress.confirmed <= progress.taken);
            assert_eq!(progress.written, self.accepted.written);
        }
        assert!(!(session.is_safe() && self.is_aborted));
        // Bytes that wait to be sent again are in memory, kept or not.
        if is_carried && is_sending(state) && self.has_socket {
            let waits = self.taken - self.position;
            let is_charged = waits <= self.bounds.budget.used() + MAX_PART as u64 + handed_over;
            assert!(is_charged, "{waits} bytes are not charged");
        }
    }
}

impl Default for End {
    fn default() -> Self {
        Self::new()
    }
}

/// Asserts that a stream has `bytes` at `offset`, from which on an earlier process may have handed some over.
fn assert_at((start, earlier): &(u64, Bytes), offset: u64, bytes: &[u8]) {
    let skipped = usize::try_from(offset - start).unwrap_or(usize::MAX);
    let earlier = earlier.get(skipped..).unwrap_or_default();
    let (head, tail) = bytes.split_at(bytes.len().min(earlier.len()));
    assert!(earlier.starts_with(head), "other bytes at {offset}");
    pattern::assert_at(offset + head.len() as u64, tail);
}

/// Returns `saved` as this release writes it.
fn normal(saved: &handover::Session) -> handover::Session {
    let known = |code: u32| CloseReason::from_code(code.into()).unwrap_or(CloseReason::PeerReset);
    let aborted = saved.aborted.filter(|_| !saved.is_abort_agreed);
    handover::Session {
        aborted: aborted.map(|code| known(code) as u32),
        ..saved.clone()
    }
}

/// Whether the other end takes bytes.
fn is_sending(state: &SessionState) -> bool {
    !state.session.is_aborted() && !state.session.outbound.is_done()
}
