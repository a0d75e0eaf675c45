//! An end of a session between two honest ends, with the program behind it. Everything else belongs to the other end or
//! to the tunnel.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use prometheus_client::metrics::gauge::Gauge;
use prost::Message;
use tunnel_proto::close::CloseReason;
use tunnel_proto::handover;
use tunnel_proto::preface::{ResumeRequest, ResumeResponse, StreamHead};
use tunnel_proto::resumption::{Confirmation, Notice, SessionId, SessionKey};
use tunnel_proto::varint::VarInt;

use super::{Bounds, Detached, Hold, Resumed, SessionState};
use crate::Budget;

/// Kept bytes of an end: soon reached.
const KEPT: u64 = 600;

/// Number of bytes that a program writes at most, so that the end comes soon.
const WRITTEN: u64 = 1 << 14;

/// Number of the server's end.
pub const SERVER: usize = 0;
/// Number of the agent's end.
pub const AGENT: usize = 1;

/// Number of the session on each tunnel.
const NUMBER: VarInt = VarInt::MAX;

/// End of the output of an end, as the program behind the end sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The end of file.
    Finished,
    /// A reset.
    Reset,
    /// The program reads no more.
    Refused,
}

/// Place of an end in the present tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Detached,
    /// The server waits for the answer of the agent.
    Resuming,
    Carried,
}

/// An end of a session.
pub struct Side {
    side: usize,
    /// `None` once it is forgotten.
    pub state: Option<Box<SessionState>>,
    place: Place,
    /// Bytes that the program has written and the session has not taken, and all that it has written.
    unsent: u64,
    pub input: u64,
    is_input_ended: bool,
    /// Whether the other end takes no more.
    is_input_refused: bool,
    unwritten: VecDeque<u8>,
    /// Number of bytes that the program has read.
    pub output: u64,
    /// End of the output, once it is there.
    pub ending: Option<Ending>,
    /// Confirmation that came before this end had resumed.
    early: Option<Confirmation>,
    /// Beginning of a head, and of a notice.
    head: BytesMut,
    notice: BytesMut,
}

/// A direction of a tunnel: its stream and its notices.
#[derive(Default)]
pub struct Way {
    stream: VecDeque<u8>,
    is_ended: bool,
    reset: Option<CloseReason>,
    /// Whether the receiver takes no more.
    is_stopped: bool,
    notices: VecDeque<u8>,
}

/// Returns the byte that the program of `side` writes at `offset`.
fn byte(side: usize, offset: u64) -> u8 {
    (offset % 251) as u8 ^ side as u8
}

fn bounds() -> Arc<Bounds> {
    Arc::new(Bounds {
        bytes: KEPT,
        window: KEPT,
        budget: Budget::new(1 << 20),
        held: Gauge::default(),
    })
}

impl Side {
    /// Creates the end of a plain session, on a tunnel.
    pub fn new(side: usize) -> Self {
        let id = SessionId::new([7; 16]);
        Self {
            side,
            state: Some(Box::new(SessionState::new(id, bounds()))),
            place: Place::Carried,
            unsent: 0,
            input: 0,
            is_input_ended: false,
            is_input_refused: false,
            unwritten: VecDeque::new(),
            output: 0,
            ending: None,
            early: None,
            head: BytesMut::new(),
            notice: BytesMut::new(),
        }
    }

    /// Holds the session from its start.
    pub fn hold(&mut self) {
        let held = self
            .carried()
            .map(|it| it.confirmed(&Confirmation::default()));
        assert!(matches!(held, Some(Ok(_))));
    }

    /// Offers to hold the session.
    pub fn offer(&mut self) {
        if let Some(state) = self.carried() {
            state.offer();
        }
    }

    /// Resets the socket.
    fn reset(&mut self) {
        // Nothing resets a socket that is closed.
        if !self.is_over() {
            self.ending = Some(Ending::Reset);
        }
        self.unwritten.clear();
    }

    /// Returns the state while the present tunnel carries the session.
    fn carried(&mut self) -> Option<&mut SessionState> {
        let is_carried = self.place == Place::Carried;
        self.state.as_deref_mut().filter(|_| is_carried)
    }

    /// The program acts; `ways` are those to the other end and back. Returns whether it has reset its socket.
    pub fn act(&mut self, what: u8, ways: Option<(&mut Way, &mut Way)>) -> bool {
        let is_carried = self.place == Place::Carried;
        let state = self.state.as_mut();
        let Some(state) = state.filter(|it| !it.session.is_aborted()) else {
            return false;
        };
        match what {
            0..192 if !self.is_input_ended && self.input < WRITTEN => {
                self.input += u64::from(what);
                self.unsent += u64::from(what);
            }
            192..224 => self.is_input_ended = true,
            224..240 if is_carried && self.ending.is_none() => {
                state.session.inbound.refuse();
                self.ending = Some(Ending::Refused);
                self.unwritten.clear();
                if let Some((_, back)) = ways {
                    back.is_stopped = true;
                }
            }
            240.. if is_carried && self.ending != Some(Ending::Finished) => {
                let reason = CloseReason::PeerReset;
                state.abort(reason);
                self.reset();
                if let Some((to, _)) = ways {
                    to.reset = Some(reason);
                }
                return true;
            }
            _ => {}
        }
        false
    }

    /// Sends at most `credit` bytes.
    pub fn send(&mut self, way: &mut Way, mut credit: usize) {
        let (side, unsent) = (self.side, self.unsent);
        let is_ended = self.is_input_ended;
        let Some(state) = self.carried() else {
            return;
        };
        if state.session.is_aborted() || way.is_ended {
            return;
        }
        while let Some(next) = state.resend() {
            let n = next.len().min(credit);
            if n == 0 {
                return;
            }
            way.stream.extend(next.split_to(n));
            state.resent(n);
            credit -= n;
        }
        if state.session.outbound.is_done() {
            way.is_ended = true;
            return;
        }
        let n = credit
            .min(usize::try_from(unsent).unwrap_or(credit))
            .min(255);
        let start = state.session.outbound.taken();
        if n > 0 && (!state.keeps() || state.has_room()) {
            let chunk: Bytes = (start..start + n as u64).map(|it| byte(side, it)).collect();
            way.stream.extend(&chunk);
            let copy = state.keeps().then_some(chunk);
            state.sent(copy, n);
            self.unsent -= n as u64;
        }
        if is_ended
            && self.unsent == 0
            && let Some(state) = self.carried()
        {
            state.session.outbound.end();
            way.is_ended = true;
        }
    }

    /// Takes at most `size` bytes off the stream of `from`; `to` is the way to the other end.
    pub fn receive(&mut self, from: &mut Way, to: &mut Way, size: usize) {
        if self.place != Place::Carried {
            self.head.extend_from_slice(&take(&mut from.stream, size));
            let head = self.head.split().freeze();
            match self.read_head(&head, to) {
                // The rest of what came is data.
                Some(size) => self.take_in(head[size..].to_vec(), false),
                None => self.head.extend_from_slice(&head),
            }
            return;
        }
        if let Some(reason) = from.reset.take()
            && let Some(state) = &mut self.state
        {
            state.reset_by_peer(reason);
            return self.reset();
        }
        let bytes = take(&mut from.stream, size);
        let is_end = from.is_ended && from.stream.is_empty();
        self.take_in(bytes, is_end);
        if to.is_stopped
            && let Some(state) = self.carried()
        {
            state.stopped_by_peer();
        }
    }

    fn take_in(&mut self, bytes: Vec<u8>, is_end: bool) {
        let Some(state) = self.carried() else {
            return;
        };
        let inbound = &mut state.session.inbound;
        let received = inbound.receive(bytes.len() as u64);
        received.expect("an honest end sends nothing behind its end");
        if is_end {
            inbound.end();
        }
        if self.ending.is_none() {
            self.unwritten.extend(bytes);
        }
    }

    /// Reads the request of the server or the answer of the agent. Returns the number of its bytes, once it is
    /// whole.
    fn read_head(&mut self, head: &[u8], to: &mut Way) -> Option<usize> {
        if self.side == AGENT {
            let (request, size) = StreamHead::decode(head).expect("honest")?;
            let StreamHead::Resume(request) = request else {
                unreachable!("{request:?}")
            };
            self.answer(&request, to);
            return Some(size);
        }
        let (answer, size) = ResumeResponse::decode(head).expect("honest")?;
        let peer = match &answer {
            ResumeResponse::Resumed(peer) => Some(peer),
            ResumeResponse::Unknown | ResumeResponse::Busy => None,
        };
        self.place = Place::Detached;
        let state = self.state.take()?;
        let (goes_on, _) = self.resume(state, peer);
        if goes_on {
            if let Some(early) = self.early.take() {
                self.hear(&Notice::Confirm(NUMBER, early), to);
            }
            self.close(to);
        }
        Some(size)
    }

    /// Asks the agent to continue the session. Returns whether the server has it.
    pub fn request(&mut self, way: &mut Way) -> bool {
        let Some(mut state) = self.state.take() else {
            return false;
        };
        let request = ResumeRequest {
            key: SessionKey {
                id: state.session.id(),
                number: NUMBER,
            },
            state: self.drop_received(&mut state),
        };
        let mut bytes = BytesMut::new();
        request.encode(&mut bytes);
        way.stream.extend(bytes);
        self.state = Some(state);
        self.place = Place::Resuming;
        true
    }

    fn answer(&mut self, request: &ResumeRequest, way: &mut Way) {
        let (goes_on, answer) = match self.state.take() {
            Some(mut state) => {
                self.drop_received(&mut state);
                let (goes_on, answer) = self.resume(state, Some(&request.state));
                (goes_on, ResumeResponse::Resumed(answer))
            }
            None => (false, ResumeResponse::Unknown),
        };
        let mut bytes = BytesMut::new();
        answer.encode(&mut bytes);
        way.stream.extend(bytes);
        if goes_on {
            self.close(way);
        }
    }

    /// The transport of the other end has the end of file, wherever that end is with reading.
    pub fn acknowledge(&mut self, way: &Way) {
        if way.is_ended
            && let Some(state) = self.carried()
        {
            state.session.outbound.acknowledge();
        }
    }

    /// The program reads at most `n` bytes.
    pub fn write(&mut self, n: usize) {
        if self.ending.is_some() {
            return;
        }
        let n = n.min(self.unwritten.len());
        let Some(state) = self.state.as_mut().filter(|it| !it.session.is_aborted()) else {
            return;
        };
        for read in self.unwritten.drain(..n) {
            assert_eq!(read, byte(1 - self.side, self.output), "another byte");
            self.output += 1;
        }
        state.session.inbound.write(n as u64);
        if state.session.inbound.is_at_end() {
            state.session.inbound.finish();
            self.ending = Some(Ending::Finished);
        }
    }

    /// Says what the other end lacks, and forgets a session that is over.
    pub fn tell(&mut self, way: Option<&mut Way>) {
        if let Some(way) = way
            && let Some(state) = self.carried()
            && let Some(confirmation) = state.session.confirmation()
        {
            say(way, Notice::Confirm(NUMBER, confirmation));
        }
        let is_waiting = self.place == Place::Resuming;
        self.state
            .take_if(|state| state.session.is_over() && !is_waiting);
    }

    /// Takes at most `size` bytes off the notices of `from`; `to` is the way to the other end.
    pub fn hear_some(&mut self, from: &mut Way, to: &mut Way, size: usize) {
        { &mut self.notice }.extend_from_slice(&take(&mut from.notices, size));
        while let Some((notice, n)) = Notice::decode(&self.notice).expect("honest") {
            let _ = self.notice.split_to(n);
            self.hear(&notice, to);
        }
    }

    fn hear(&mut self, notice: &Notice, to: &mut Way) {
        let confirmation = match notice {
            Notice::Confirm(_, confirmation) => Some(confirmation),
            Notice::Unknown(_) => None,
        };
        if self.place == Place::Resuming {
            self.early = confirmation.copied();
            return;
        }
        let reset = match (self.carried(), confirmation) {
            (Some(state), Some(confirmation)) => {
                let effect = state.confirmed(confirmation);
                effect.expect("the peer is honest").reset
            }
            (Some(state), None) => state.unknown_to_peer().reset,
            (None, Some(_)) => return say(to, Notice::Unknown(NUMBER)),
            (None, None) => None,
        };
        if reset.is_some() {
            self.reset();
        }
    }

    /// Loses the tunnel.
    pub fn cut(&mut self, now: Instant) {
        let is_attached = self.place != Place::Detached;
        let was_resuming = self.place == Place::Resuming;
        self.place = Place::Detached;
        self.early = None;
        self.head.clear();
        self.notice.clear();
        let Some(state) = self.state.take_if(|_| is_attached) else {
            return;
        };
        if was_resuming {
            self.state = Some(state);
            return;
        }
        match state.detach(CloseReason::LinkLost, now) {
            Detached::Safe(state) => self.state = Some(state),
            Detached::Ended(state) => {
                self.state = Some(state);
                self.reset();
            }
            Detached::Finished => {}
            Detached::Plain if self.is_over() => {}
            Detached::Plain => self.reset(),
        }
    }

    /// Whether the program has no socket any more.
    pub fn is_over(&self) -> bool {
        let is_input_over = self.is_input_ended || self.is_input_refused;
        self.ending == Some(Ending::Reset) || is_input_over && self.ending.is_some()
    }

    /// Drops what was received and not written: it comes again.
    fn drop_received(&mut self, state: &mut SessionState) -> Confirmation {
        let told = state.resumption();
        self.unwritten.clear();
        assert_eq!(state.session.inbound.unwritten(), 0);
        told
    }

    /// Continues over the present tunnel, where the other end is in the state `peer`. Returns the answer to it.
    fn resume(
        &mut self,
        mut state: Box<SessionState>,
        peer: Option<&Confirmation>,
    ) -> (bool, Confirmation) {
        let resumed = state.resume(peer).expect("the peer is honest");
        let answer = state.session.tell();
        let goes_on = matches!(resumed, Resumed::Continues(_));
        if goes_on {
            self.place = Place::Carried;
            self.state = Some(state);
        }
        if matches!(resumed, Resumed::Lost(_)) {
            self.reset();
        }
        (goes_on, answer)
    }

    /// Ends the stream of a session without a socket, and one of which the other end needs no byte.
    fn close(&mut self, way: &mut Way) {
        let is_over = self.is_over();
        let Some(state) = &mut self.state else {
            return;
        };
        let outbound = &mut state.session.outbound;
        if is_over && (outbound.is_done() || self.ending == Some(Ending::Reset)) {
            outbound.end();
            state.session.inbound.refuse();
            way.is_ended = true;
        } else {
            way.is_ended = outbound.is_done() || outbound.is_confirmed_to_its_end();
        }
    }

    /// Forgets a session that no tunnel will continue, and resets its socket. Returns whether there was one.
    pub fn forget(&mut self) -> bool {
        let had_session = self.state.take().is_some();
        if had_session {
            self.reset();
        }
        had_session
    }

    /// Gives the session to another process.
    pub fn hand_over(&mut self, now: Instant) {
        let is_held = |state: &mut Box<SessionState>| state.session.hold() == Hold::Held;
        let Some(state) = self.state.take_if(is_held) else {
            return;
        };
        let saved = state.save().encode_to_vec();
        let saved = handover::Session::decode(&*saved).expect("whole");
        let restored = SessionState::restore(&saved, bounds(), now);
        self.state = Some(Box::new(restored.expect("consistent")));
        self.unwritten.clear();
    }

    /// Checks what holds at any time.
    pub fn check(&mut self, other: &Self) {
        if let Some(state) = &self.state {
            self.is_input_refused |= state.session.outbound.is_done();
            assert!(state.kept() < KEPT + 255);
            assert_eq!(state.kept(), state.session.outbound.kept());
        }
        if self.ending == Some(Ending::Finished) {
            assert!(other.is_input_ended && self.output == other.input);
        }
    }
}

fn say(way: &mut Way, notice: Notice) {
    let mut bytes = BytesMut::new();
    notice.encode(&mut bytes);
    way.notices.extend(bytes);
}

fn take(bytes: &mut VecDeque<u8>, n: usize) -> Vec<u8> {
    let n = n.min(bytes.len());
    bytes.drain(..n).collect()
}
