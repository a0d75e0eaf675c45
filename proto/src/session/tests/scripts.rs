//! Arbitrary scripts of events in a session, and the properties that hold for all of them. proptest
//! prints the shortest script that fails, with its seed.

use std::time::Duration;

use proptest::prelude::*;

use super::pair::{LATENCY, Pair, hello, welcome};
use crate::close::CloseReason;
use crate::control::Statistics;
use crate::route::Claim;
use crate::session::*;

#[derive(Debug, Clone)]
enum Step {
    Wait(Duration),
    /// The path to the server, or to the agent, goes down or up.
    Stall {
        server: bool,
        down: bool,
    },
    Offer(u8),
    Traffic,
    Statistics(u64),
    AgentDrains,
    ServerDrains,
    NoMoreStreams(u64),
    /// A message of a later release, to the server or to the agent.
    Unknown {
        server: bool,
    },
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..8000_u64).prop_map(|ms| Step::Wait(Duration::from_millis(ms))),
        2 => any::<(bool, bool)>().prop_map(|(server, down)| Step::Stall { server, down }),
        2 => any::<u8>().prop_map(Step::Offer),
        2 => Just(Step::Traffic),
        1 => any::<u64>().prop_map(Step::Statistics),
        1 => Just(Step::AgentDrains),
        1 => Just(Step::ServerDrains),
        1 => any::<u64>().prop_map(Step::NoMoreStreams),
        1 => any::<bool>().prop_map(|server| Step::Unknown { server }),
    ]
}

fn claim(octet: u8) -> Vec<Claim> {
    vec![Claim::Address([10, 0, 0, octet].into())]
}

/// Messages that one side sent or the other received, in order, apart from life signs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Told {
    offers: Vec<Vec<Claim>>,
    verdicts: Vec<Vec<Claim>>,
    statistics: Vec<u64>,
    agent_drains: usize,
    server_drains: usize,
    streams: Vec<u64>,
}

/// Life signs of one side: their times, and whether the other side fell silent.
#[derive(Debug, Default)]
struct Signs(Vec<(Duration, bool)>);

impl Signs {
    /// Whether the other side is silent at the end.
    fn check(&self) -> Result<bool, TestCaseError> {
        for (n, (at, silent)) in self.0.iter().enumerate() {
            prop_assert_eq!(
                *silent,
                n % 2 == 0,
                "Silent and Alive take turns: {:?}",
                self
            );
            prop_assert!(
                !silent || *at >= Timers::default().silent_busy,
                "silent too soon: {:?}",
                self
            );
        }
        Ok(self.0.last().is_some_and(|(_, silent)| *silent))
    }
}

/// A session under test, and its messages.
struct Session {
    pair: Pair,
    said: Told,
}

impl Session {
    fn begin(piece: usize) -> Result<Self, TestCaseError> {
        let mut pair = Pair::new(piece);
        prop_assert_eq!(pair.run(2 * LATENCY), Ok(()));
        Ok(Self {
            pair,
            said: Told::default(),
        })
    }

    fn play(&mut self, step: &Step) -> Result<(), SessionError> {
        let Self { pair, said } = self;
        match *step {
            Step::Wait(time) => pair.run(time)?,
            Step::Stall { server: true, down } => pair.to_server.stalled = down,
            Step::Stall {
                server: false,
                down,
            } => pair.to_agent.stalled = down,
            Step::Offer(octet) => {
                pair.agent.offer(claim(octet))?;
                said.offers.push(claim(octet));
                said.verdicts.push(claim(octet));
            }
            Step::Traffic => {
                pair.agent.note_traffic(pair.now);
                pair.server.note_traffic(pair.now);
            }
            Step::Statistics(dials) => {
                pair.agent.statistics(Statistics {
                    dials,
                    ..Statistics::default()
                })?;
                said.statistics.push(dials);
            }
            Step::AgentDrains => {
                pair.agent
                    .drain(Duration::from_secs(30), CloseReason::Shutdown)?;
                said.agent_drains += 1;
            }
            Step::ServerDrains => {
                pair.server
                    .drain(Duration::from_secs(30), CloseReason::Drained)?;
                said.server_drains += 1;
            }
            Step::NoMoreStreams(opened) => {
                pair.server.no_more_streams(opened)?;
                said.streams.push(opened);
            }
            Step::Unknown { server: true } => pair.to_server.send(b"\x03\xa2\x06\x00", pair.now),
            Step::Unknown { server: false } => pair.to_agent.send(b"\x03\xa2\x06\x00", pair.now),
        }
        // Does what is due, and fails if something is then still.
        pair.run(Duration::ZERO)
    }

    /// Returns the received messages, and whether the server and the agent call the other silent.
    fn heard(&self) -> Result<(Told, bool, bool), TestCaseError> {
        let mut told = Told::default();
        let (mut server, mut agent) = (Signs::default(), Signs::default());
        prop_assert_eq!(&self.pair.server_events[0].1, &ServerEvent::Hello(hello()));
        for (at, event) in self.pair.server_events.iter().skip(1) {
            match event {
                ServerEvent::Hello(_) => prop_assert!(false, "a second Hello"),
                ServerEvent::Offer(claims) => told.offers.push(claims.clone()),
                ServerEvent::Statistics(statistics) => told.statistics.push(statistics.dials),
                ServerEvent::Draining { .. } => told.agent_drains += 1,
                ServerEvent::Silent => server.0.push((*at, true)),
                ServerEvent::Alive => server.0.push((*at, false)),
                ServerEvent::CertificateRequest(_) => prop_assert!(false, "nobody asked"),
            }
        }
        prop_assert_eq!(
            &self.pair.agent_events[0].1,
            &AgentEvent::Welcomed(welcome())
        );
        for (at, event) in self.pair.agent_events.iter().skip(1) {
            match event {
                AgentEvent::Welcomed(_) => prop_assert!(false, "a second Welcome"),
                AgentEvent::Verdict { accepted, .. } => told.verdicts.push(accepted.clone()),
                AgentEvent::Draining { .. } => told.server_drains += 1,
                AgentEvent::NoMoreStreams(opened) => told.streams.push(*opened),
                AgentEvent::Silent => agent.0.push((*at, true)),
                AgentEvent::Alive => agent.0.push((*at, false)),
                AgentEvent::Certificate(_) => prop_assert!(false, "nobody answered"),
            }
        }
        Ok((told, server.check()?, agent.check()?))
    }

    /// With the path up, all messages arrive, and both sides are alive.
    fn end_well(mut self) -> Result<(), TestCaseError> {
        self.pair.to_server.stalled = false;
        self.pair.to_agent.stalled = false;
        prop_assert_eq!(self.pair.run(Duration::from_secs(20)), Ok(()));
        prop_assert_eq!(self.heard()?, (self.said, false, false));
        for rtt in [self.pair.agent.rtt(), self.pair.server.rtt()] {
            prop_assert!(rtt >= Some(2 * LATENCY), "{:?}", rtt);
        }
        Ok(())
    }

    /// The agent's process is killed: the server sees a silent agent, and no message that was not
    /// sent.
    fn agent_dies(mut self) -> Result<(), TestCaseError> {
        self.pair.to_server.dead = true;
        self.pair.to_agent.dead = true;
        prop_assert_eq!(self.pair.run(Duration::from_secs(10)), Ok(()));
        let (told, agent_is_silent, _) = self.heard()?;
        prop_assert!(agent_is_silent);
        prop_assert!(self.said.offers.starts_with(&told.offers));
        prop_assert!(self.said.verdicts.starts_with(&told.verdicts));
        Ok(())
    }
}

proptest! {
    /// Several sessions in sequence, as when the agent is restarted.
    #[test]
    fn whatever_befalls_a_session(
        lives in prop::collection::vec(prop::collection::vec(any_step(), 0..40), 1..4),
        piece in 1..100_usize,
    ) {
        let mut lives = lives.iter().peekable();
        while let Some(steps) = lives.next() {
            let mut session = Session::begin(piece)?;
            for step in steps {
                prop_assert_eq!(session.play(step), Ok(()), "{:?}", step);
            }
            if lives.peek().is_some() { session.agent_dies()? } else { session.end_well()? }
        }
    }

    /// All messages of one direction are lost, from some time on: the side that receives nothing
    /// notices within its limit, the other goes on.
    #[test]
    fn loss_of_all_messages(before in 0..30_000_u64, traffic: bool, to_server: bool) {
        let mut pair = Pair::established(usize::MAX);
        prop_assert_eq!(pair.run(Duration::from_millis(before)), Ok(()));
        pair.to_server.dead = to_server;
        pair.to_agent.dead = !to_server;
        let heard = if to_server { pair.server.last_heard() } else { pair.agent.last_heard() };
        if traffic {
            pair.server.note_traffic(pair.now);
            pair.agent.note_traffic(pair.now);
        }
        prop_assert_eq!(pair.run(Duration::from_secs(60)), Ok(()));

        let Timers { silent_busy, silent_idle, .. } = Timers::default();
        // Traffic that comes later than its own limit makes the silence count at once.
        let limit = if traffic { silent_busy } else { silent_idle };
        let at = heard + limit - pair.start;
        let server_events = to_server.then_some((at, ServerEvent::Silent));
        let agent_events = (!to_server).then_some((at, AgentEvent::Silent));
        prop_assert_eq!(pair.server_events, Vec::from_iter(server_events));
        prop_assert_eq!(pair.agent_events, Vec::from_iter(agent_events));
    }

    /// Any bytes, before or after the introduction, give an error or none, never a panic, and the
    /// same however they are divided.
    #[test]
    fn any_bytes(bytes: Vec<u8>, piece in 1..20_usize, established: bool) {
        let outcome = |piece: usize| {
            let mut pair = if established { Pair::established(1000) } else { Pair::new(1000) };
            let now = pair.now;
            let server = bytes.chunks(piece).try_for_each(|piece| pair.server.handle_bytes(piece, now));
            let agent = bytes.chunks(piece).try_for_each(|piece| pair.agent.handle_bytes(piece, now));
            let server_events = std::iter::from_fn(|| pair.server.poll_event()).count();
            let agent_events = std::iter::from_fn(|| pair.agent.poll_event()).count();
            (server, agent, server_events, agent_events)
        };
        prop_assert_eq!(outcome(piece), outcome(usize::MAX));
    }
}
