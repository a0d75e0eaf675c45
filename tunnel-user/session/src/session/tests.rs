use std::collections::VecDeque;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::{Strategy, TestCaseError, any, prop_oneof, proptest};
use proptest::sample::Index;
use proptest::{prop_assert, prop_assert_eq};
use prost::Message as _;
use tunnel_proto::varint::VarInt;

use super::*;
use crate::unconfirmed::Unconfirmed;

/// Next act of the program behind an end.
#[derive(Clone, Debug)]
enum Act {
    Write(u8),
    End,
    Reset,
}

/// One step of the world. `Side` is 0 for the server and 1 for the agent.
#[derive(Clone, Debug)]
enum Step {
    Act(usize),
    /// The server offers to hold the session.
    Offer,
    Send(usize, u8),
    Receive(usize),
    Write(usize, u8),
    Tell(usize),
    Hear(usize),
    Cut,
    Connect,
    /// The process of an end hands the session over to another one, which it can without a tunnel.
    HandOver(usize),
    /// The process of an end is killed: the end forgets everything, and its socket is reset.
    Kill(usize),
}

/// Data on a stream.
#[derive(Debug)]
enum Datum {
    Bytes(Bytes),
    End,
}

/// Message beside the data.
#[derive(Debug)]
enum Message {
    /// State of the end; `None` where it does not know the session.
    Resume(Option<Confirmation>),
    Confirm(Confirmation),
    /// On the present tunnel the end has no such session.
    Unknown,
    /// The stream was reset.
    Reset,
}

/// One way of a tunnel.
#[derive(Debug, Default)]
struct Way {
    data: VecDeque<Datum>,
    messages: VecDeque<Message>,
    is_end_sent: bool,
}

/// End of the output of an end, as the program behind the end sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Finished,
    Reset,
}

struct End {
    /// `None` once it is forgotten.
    session: Option<Session>,
    kept: Unconfirmed,
    script: VecDeque<Act>,
    input: Vec<u8>,
    is_input_ended: bool,
    unwritten: VecDeque<u8>,
    output: Vec<u8>,
    ending: Option<Ending>,
    /// Whether the present tunnel carries the session for this end.
    is_carried: bool,
}

impl End {
    fn new(script: Vec<Act>) -> Self {
        Self {
            session: Some(Session::new(SessionId::new([7; 16]))),
            kept: Unconfirmed::default(),
            script: script.into(),
            input: Vec::new(),
            is_input_ended: false,
            unwritten: VecDeque::new(),
            output: Vec::new(),
            ending: None,
            is_carried: true,
        }
    }

    fn reset(&mut self) {
        self.ending = Some(Ending::Reset);
        self.unwritten.clear();
    }

    /// Whether both directions of the local socket have ended in order: nothing can reset it any more.
    fn is_closed(&self) -> bool {
        self.is_input_ended && self.ending == Some(Ending::Finished)
    }

    /// Returns whether the program has reset its socket.
    fn act(&mut self) -> bool {
        if self.ending == Some(Ending::Reset) || self.is_input_ended {
            return false;
        }
        let Some(session) = &mut self.session else {
            return false;
        };
        match self.script.pop_front() {
            Some(Act::Write(n)) => {
                let start = self.input.len();
                let bytes: Vec<u8> = (start..start + usize::from(n)).map(|i| i as u8).collect();
                self.input.extend(&bytes);
                session.outbound.take(n.into());
                // Kept or not, what has not been sent is at hand.
                self.kept.push(bytes.into());
            }
            Some(Act::End) | None => {
                session.outbound.end();
                self.is_input_ended = true;
            }
            Some(Act::Reset) => {
                session.abort(CloseReason::PeerReset);
                self.reset();
                return true;
            }
        }
        false
    }
}

struct World {
    ends: [End; 2],
    tunnel: Option<[Way; 2]>,
    now: Instant,
    /// Whether a program has reset its socket, or a process was killed.
    is_reset: bool,
    /// Whether both ends keep every byte from the start.
    is_kept: bool,
}

impl World {
    fn new(scripts: [Vec<Act>; 2], is_kept: bool) -> Self {
        let [server, agent] = scripts;
        let mut ends = [server, agent].map(End::new);
        if is_kept {
            for end in &mut ends {
                let session = end.session.as_mut().unwrap();
                session.hold = Hold::Held;
                session.outbound.keep();
            }
        }
        Self {
            ends,
            tunnel: Some(Default::default()),
            now: Instant::now(),
            is_reset: false,
            is_kept,
        }
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Act(side) => self.act(side),
            Step::Offer => {
                if let Some(session) = &mut self.ends[0].session {
                    session.offer();
                }
            }
            Step::Send(side, n) => self.send(side, n),
            Step::Receive(side) => self.receive(side),
            Step::Write(side, n) => self.write(side, n),
            Step::Tell(side) => self.tell(side),
            Step::Hear(side) => self.hear(side)?,
            Step::Cut => self.cut(),
            Step::Kill(side) => {
                self.cut();
                if self.ends[side].session.take().is_some() {
                    self.is_reset = true;
                    self.ends[side].reset();
                }
            }
            Step::Connect => self.connect(),
            Step::HandOver(side) => self.hand_over(side)?,
        }
        self.check()
    }

    fn act(&mut self, side: usize) {
        let end = &mut self.ends[side];
        if !end.act() {
            return;
        }
        self.is_reset = true;
        if let Some(ways) = &mut self.tunnel
            && end.is_carried
        {
            ways[side].messages.push_back(Message::Reset);
        }
    }

    fn send(&mut self, side: usize, n: u8) {
        let end = &mut self.ends[side];
        let (Some(ways), Some(session)) = (&mut self.tunnel, &mut end.session) else {
            return;
        };
        if !end.is_carried || session.is_aborted() {
            return;
        }
        let out = &mut session.outbound;
        let wanted = out.unsent().min(n.into()) as usize;
        let bytes: Vec<u8> = end.kept.from(out.sent()).flatten().take(wanted).collect();
        assert_eq!(bytes.len(), wanted, "what is unsent is at hand");
        let way = &mut ways[side];
        if wanted > 0 {
            out.send(wanted as u64);
            way.data.push_back(Datum::Bytes(bytes.into()));
        }
        if out.is_at_end() && !way.is_end_sent {
            way.is_end_sent = true;
            way.data.push_back(Datum::End);
            // The transport has it at once, wherever the other end is with reading.
            out.acknowledge();
        }
    }

    /// `side` receives what the other one sent.
    fn receive(&mut self, side: usize) {
        let end = &mut self.ends[side];
        let (Some(ways), Some(session)) = (&mut self.tunnel, &mut end.session) else {
            return;
        };
        if !end.is_carried {
            return;
        }
        match ways[1 - side].data.pop_front() {
            Some(Datum::Bytes(bytes)) => {
                let received = session.inbound.receive(bytes.len() as u64);
                received.expect("an honest end sends nothing behind its end");
                if end.ending.is_none() {
                    end.unwritten.extend(&bytes);
                }
            }
            Some(Datum::End) => session.inbound.end(),
            None => {}
        }
    }

    fn write(&mut self, side: usize, n: u8) {
        let end = &mut self.ends[side];
        let Some(session) = &mut end.session else {
            return;
        };
        if end.ending.is_some() || session.is_aborted() {
            return;
        }
        let n = end.unwritten.len().min(n.into());
        end.output.extend(end.unwritten.drain(..n));
        session.inbound.write(n as u64);
        if session.inbound.is_at_end() {
            end.ending = Some(Ending::Finished);
            session.inbound.finish();
        }
    }

    fn tell(&mut self, side: usize) {
        let end = &mut self.ends[side];
        let Some(session) = &mut end.session else {
            return;
        };
        if let Some(ways) = &mut self.tunnel
            && end.is_carried
            && let Some(confirmation) = session.confirmation()
        {
            ways[side]
                .messages
                .push_back(Message::Confirm(confirmation));
        }
        if session.is_over() && (self.tunnel.is_none() || end.is_carried) {
            end.session = None;
        }
    }

    fn hear(&mut self, side: usize) -> Result<(), TestCaseError> {
        let Some(ways) = &mut self.tunnel else {
            return Ok(());
        };
        let end = &mut self.ends[side];
        let message = ways[1 - side].messages.pop_front();
        match (message, &mut end.session) {
            (Some(Message::Confirm(confirmation)), Some(session)) => {
                let effect = session.confirmed(&confirmation);
                let Effect { release, reset } =
                    effect.map_err(|e| TestCaseError::fail(format!("{e}")))?;
                end.kept.release(release);
                if reset.is_some() && !end.is_closed() {
                    end.reset();
                }
            }
            (Some(Message::Resume(peer)), Some(session)) => {
                if side == 1 {
                    let (state, drop) = session.resumption();
                    assert!(end.ending.is_some() || drop == end.unwritten.len() as u64);
                    end.unwritten.clear();
                    ways[side].messages.push_back(Message::Resume(Some(state)));
                }
                let resumed = session.resume(peer.as_ref());
                match resumed.map_err(|e| TestCaseError::fail(format!("{e}")))? {
                    Resumed::Continues(release) => {
                        end.kept.release(release);
                        end.is_carried = true;
                    }
                    Resumed::Over => end.session = None,
                    Resumed::Lost(_) => {
                        end.is_carried = true;
                        end.reset();
                    }
                }
            }
            // Forgotten here: the server is told.
            (Some(Message::Resume(_)), None) if side == 1 => {
                ways[side].messages.push_back(Message::Resume(None));
            }
            (Some(Message::Confirm(_)), None) => {
                ways[side].messages.push_back(Message::Unknown);
            }
            (Some(message @ (Message::Unknown | Message::Reset)), Some(session)) => {
                let effect = match message {
                    Message::Unknown => session.unknown_to_peer(),
                    _ => session.reset_by_peer(CloseReason::PeerReset),
                };
                end.kept.release(effect.release);
                if effect.reset.is_some() && !end.is_closed() {
                    end.reset();
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn cut(&mut self) {
        if self.tunnel.take().is_none() {
            return;
        }
        for end in &mut self.ends {
            end.is_carried = false;
            if let Some(session) = &mut end.session
                && session.detach(CloseReason::LinkLost, self.now)
            {
                end.reset();
            }
            end.session.take_if(|session| session.is_over());
        }
    }

    fn hand_over(&mut self, side: usize) -> Result<(), TestCaseError> {
        let end = &mut self.ends[side];
        let Some(session) = end.session.as_ref().filter(|it| it.hold() == Hold::Held) else {
            return Ok(());
        };
        if self.tunnel.is_some() || !self.is_kept {
            return Ok(());
        }
        let mut kept = Vec::new();
        if !session.outbound.is_done() {
            let chunks = end.kept.from(session.outbound.confirmed());
            chunks.for_each(|chunk| kept.extend_from_slice(&chunk));
        }
        let saved = session.save(kept.into()).encode_to_vec();
        let saved = handover::Session::decode(&saved[..]).unwrap();
        let restored = Session::restore(&saved, self.now);
        let restored = restored.map_err(|e| TestCaseError::fail(format!("{e}")))?;
        end.kept = Unconfirmed::new(restored.outbound.confirmed());
        end.kept.push(saved.outbound.unwrap().kept);
        // Received bytes are not handed over: they come again.
        end.unwritten.clear();
        end.session = Some(restored);
        Ok(())
    }

    fn connect(&mut self) {
        if self.tunnel.is_some() {
            return;
        }
        let mut ways: [Way; 2] = Default::default();
        let [server, agent] = &mut self.ends;
        if let Some(session) = &mut server.session {
            let (state, drop) = session.resumption();
            assert!(server.ending.is_some() || drop == server.unwritten.len() as u64);
            server.unwritten.clear();
            ways[0].messages.push_back(Message::Resume(Some(state)));
        } else if agent.session.take().is_some() && !agent.is_closed() {
            // Nobody resumes it: it expires.
            agent.reset();
        }
        self.tunnel = Some(ways);
    }

    fn check(&self) -> Result<(), TestCaseError> {
        for (side, end) in self.ends.iter().enumerate() {
            if let Some(session) = end
                .session
                .as_ref()
                .filter(|it| self.is_kept && !it.is_aborted())
            {
                prop_assert_eq!(end.kept.len(), session.outbound.kept(), "what is kept");
            }
            let input = &self.ends[1 - side].input;
            prop_assert!(input.starts_with(&end.output), "a prefix of what was sent");
            if end.ending == Some(Ending::Finished) {
                prop_assert_eq!(input, &end.output, "a clean end is behind the last byte");
                prop_assert!(self.ends[1 - side].is_input_ended);
            }
        }
        Ok(())
    }

    /// Lets everything come to its end, over a tunnel that is not cut any more.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..400 {
            self.step(&Step::Connect)?;
            for side in 0..2 {
                for step in [
                    Step::Offer,
                    Step::Act(side),
                    Step::Send(side, 255),
                    Step::Hear(side),
                    Step::Receive(side),
                    Step::Write(side, 255),
                    Step::Tell(side),
                ] {
                    self.step(&step)?;
                }
            }
        }
        Ok(())
    }
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        20 => (1..9_u8).prop_map(Act::Write),
        2 => any::<()>().prop_map(|()| Act::End),
        1 => any::<()>().prop_map(|()| Act::Reset),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let side = 0..2_usize;
    prop_oneof![
        4 => side.clone().prop_map(Step::Act),
        1 => any::<()>().prop_map(|()| Step::Offer),
        6 => (side.clone(), 1..9_u8).prop_map(|(side, n)| Step::Send(side, n)),
        6 => side.clone().prop_map(Step::Receive),
        6 => (side.clone(), 1..9_u8).prop_map(|(side, n)| Step::Write(side, n)),
        4 => side.clone().prop_map(Step::Tell),
        4 => side.clone().prop_map(Step::Hear),
        1 => any::<()>().prop_map(|()| Step::Cut),
        1 => side.clone().prop_map(Step::HandOver),
        2 => any::<()>().prop_map(|()| Step::Connect),
    ]
}

/// An agent that was killed has lost its sessions. What may have run there is never dialled again.
#[test]
fn a_session_that_the_peer_has_lost_is_reset_unless_it_is_settled() {
    let unknown = |mut session: Session| {
        session.resumption();
        session.resume(None).unwrap()
    };
    let mut session = held();
    let lost = Resumed::Lost(CloseReason::LinkLost);
    assert_eq!(unknown(session.clone()), lost, "though no byte has left");
    session.inbound.end();
    session.inbound.finish();
    assert_eq!(unknown(session.clone()), lost);
    session.outbound.abandon();
    assert_eq!(unknown(session), Resumed::Over);
}

/// A plain end is gone when the transport has taken everything. It must not be reset for an offer that came
/// too late.
#[test]
fn an_offer_to_an_end_that_is_gone_is_taken_back() {
    let mut session = Session::new(SessionId::new([1; 16]));
    session.outbound.take(2);
    session.offer();
    session.outbound.take(3);
    session.outbound.send(5);
    session.outbound.end();
    session.outbound.acknowledge();
    session.inbound.end();
    session.inbound.finish();
    assert!(!session.is_over(), "the other end may hold it by now");
    let lost = &mut session.clone();
    assert!(!lost.detach(CloseReason::LinkLost, Instant::now()) && lost.is_over());
    let effect = session.unknown_to_peer();
    assert_eq!((effect.release, effect.reset), (3, None));
    assert!(session.is_over());
}

/// Further bytes would overflow what counts them.
#[test]
fn offsets_that_no_peer_can_be_told_are_not_restored() {
    let highest = VarInt::MAX.into_inner();
    let at = |taken, written| handover::Session {
        id: vec![1; 16].into(),
        outbound: Some(handover::Outbound {
            taken,
            ever_sent: taken,
            confirmed: taken,
            ..handover::Outbound::default()
        }),
        inbound: Some(handover::Inbound {
            written,
            ..handover::Inbound::default()
        }),
        ..handover::Session::default()
    };
    let restore = |saved| Session::restore(&saved, Instant::now());
    assert!(restore(at(highest, highest)).is_ok());
    for saved in [
        at(highest + 1, 0),
        at(0, highest + 1),
        at(u64::MAX, u64::MAX),
    ] {
        assert!(restore(saved).is_err());
    }
}

/// A peer that takes no more does not acknowledge the rest. Neither end is reset for that when the tunnel is lost.
#[test]
fn an_offered_end_that_the_peer_has_stopped_is_over_without_its_tunnel() {
    let mut session = Session::new(SessionId::new([1; 16]));
    session.offer();
    session.outbound.take(2);
    session.outbound.send(2);
    session.outbound.abandon();
    session.inbound.end();
    session.inbound.finish();
    assert!(!session.detach(CloseReason::LinkLost, Instant::now()));
    assert!(session.is_over() && !session.is_aborted());
}

fn held() -> Session {
    let mut session = Session::new(SessionId::new([1; 16]));
    session.offer();
    session.confirmed(&Confirmation::default()).unwrap();
    session
}

/// A peer that claims to need nothing more would leave the session for the life of its tunnel.
#[test]
fn a_peer_is_settled_only_when_it_has_confirmed_everything() {
    let mut session = held();
    session.outbound.take(1);
    session.outbound.send(1);
    let settled = Confirmation {
        status: Status::Settled,
        ..Confirmation::default()
    };
    assert_eq!(session.confirmed(&settled), Err(Violation::NotSettled));
}

/// Kept bytes are released once, whatever the peer repeats.
#[test]
fn a_repeated_abort_releases_nothing_more() {
    let mut session = held();
    session.outbound.take(5);
    let aborted = Confirmation {
        status: Status::Aborted(CloseReason::PeerReset),
        ..Confirmation::default()
    };
    let first = session.confirmed(&aborted).unwrap();
    assert_eq!(
        (first.release, first.reset),
        (5, Some(CloseReason::PeerReset))
    );
    assert_eq!(session.confirmed(&aborted), Ok(Effect::default()));
}

#[test]
fn a_session_without_kept_bytes_ends_with_its_tunnel() {
    let mut session = Session::new(SessionId::new([1; 16]));
    let now = Instant::now();
    assert!(session.clone().detach(CloseReason::LinkLost, now));
    session.offer();
    assert!(
        session.clone().detach(CloseReason::LinkLost, now),
        "it may be plain at the other end"
    );
    session.confirmed(&Confirmation::default()).unwrap();
    assert!(session.is_safe());
    assert!(!session.detach(CloseReason::LinkLost, now));
    assert_eq!(session.detached(), Some(now));
    assert_eq!(session.confirmation(), None, "there is no tunnel");
}

proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(1000))]

    /// Checks any order of events with any number of lost tunnels: each program reads a prefix of what the
    /// other one wrote; a clean end follows the last byte; without a reset everything arrives; and in the
    /// end neither end remembers anything.
    #[test]
    fn the_streams_are_exact_over_any_number_of_tunnels(
        scripts in [vec(act(), 0..12), vec(act(), 0..12)],
        is_kept in any::<bool>(),
        mut steps in vec(step(), 0..200),
        kill in option::weighted(0.3, (any::<Index>(), 0..2_usize)),
    ) {
        if let Some((at, side)) = kill {
            let at = at.index(steps.len() + 1);
            steps.insert(at, Step::Kill(side));
        }
        let mut world = World::new(scripts, is_kept);
        for step in &steps {
            world.step(step)?;
        }
        world.settle()?;
        let [server, agent] = &world.ends;
        prop_assert!(server.session.is_none(), "the server remembers {:?}", server.session);
        prop_assert!(agent.session.is_none(), "the agent remembers {:?}", agent.session);
        prop_assert!(server.ending.is_some() && agent.ending.is_some());
        let resets = world.ends.iter().filter(|end| end.ending == Some(Ending::Reset));
        let resets = resets.count();
        if is_kept && !world.is_reset {
            prop_assert_eq!(resets, 0);
        }
        if resets == 0 {
            prop_assert_eq!(&server.input, &agent.output);
            prop_assert_eq!(&agent.input, &server.output);
        }
    }
}
