//! An agent, a server and the stream between them, on one virtual clock.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::control::VERSION;
use crate::session::*;

pub(super) const LATENCY: Duration = Duration::from_millis(20);

pub(super) fn hello() -> Hello {
    Hello {
        version: VERSION,
        agent_id: "w1".to_owned(),
        instance_id: InstanceId([1; 16]),
        node: "worker-1".to_owned(),
        software_version: "0.1.0".to_owned(),
        features: vec!["extra".to_owned()],
        offer: Vec::new(),
        predecessor: Some(InstanceId([9; 16])),
        incarnation: 3,
    }
}

pub(super) fn welcome() -> Welcome {
    Welcome {
        version: VERSION,
        server_id: "s1".to_owned(),
        server_count: 2,
        instance_id: InstanceId([2; 16]),
        accepted: Vec::new(),
        refused: vec![Refusal {
            claim: "10.0.0.0/8".to_owned(),
            why: "not granted".to_owned(),
        }],
        heartbeat: Timers::default().heartbeat,
        incarnation: 0,
    }
}

/// One direction of a stream: it keeps order and loses nothing, but may stop or end.
#[derive(Debug, Default)]
pub(super) struct Pipe {
    in_flight: VecDeque<(Instant, Vec<u8>)>,
    /// Nothing arrives, as on a path that is down, until the path is up again.
    pub(super) stalled: bool,
    /// Nothing arrives from now on, as after the end of the process.
    pub(super) dead: bool,
    /// Number of bytes that arrive at a time.
    pub(super) piece: usize,
}

impl Pipe {
    pub(super) fn send(&mut self, bytes: &[u8], now: Instant) {
        self.in_flight.push_back((now + LATENCY, bytes.to_vec()));
    }

    fn next_arrival(&self) -> Option<Instant> {
        let open = !self.stalled && !self.dead;
        self.in_flight.front().map(|(at, _)| *at).filter(|_| open)
    }

    fn arrive(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.next_arrival().filter(|at| *at <= now)?;
        self.in_flight.pop_front().map(|(_, bytes)| bytes)
    }
}

/// Events, with the time since the start.
type Log<E> = Vec<(Duration, E)>;

pub(super) struct Pair {
    pub(super) start: Instant,
    pub(super) now: Instant,
    pub(super) agent: AgentSession,
    pub(super) server: ServerSession,
    pub(super) to_server: Pipe,
    pub(super) to_agent: Pipe,
    pub(super) agent_events: Log<AgentEvent>,
    pub(super) server_events: Log<ServerEvent>,
    /// Answer the Hello with [`welcome`].
    pub(super) welcoming: bool,
}

impl Pair {
    pub(super) fn new(piece: usize) -> Self {
        // The only use of a clock: there is no other way to an Instant.
        let now = Instant::now();
        let timers = Timers::default();
        Self {
            start: now,
            now,
            agent: AgentSession::new(hello(), timers, now).unwrap(),
            server: ServerSession::new(timers, now),
            to_server: Pipe {
                piece,
                ..Pipe::default()
            },
            to_agent: Pipe {
                piece,
                ..Pipe::default()
            },
            agent_events: Vec::new(),
            server_events: Vec::new(),
            welcoming: true,
        }
    }

    /// Returns a pair after the introductions, without the events of these.
    pub(super) fn established(piece: usize) -> Self {
        let mut pair = Self::new(piece);
        pair.run(3 * LATENCY).unwrap();
        assert_eq!(pair.server_events, [(LATENCY, ServerEvent::Hello(hello()))]);
        assert_eq!(
            pair.agent_events,
            [(2 * LATENCY, AgentEvent::Welcomed(welcome()))]
        );
        pair.server_events.clear();
        pair.agent_events.clear();
        pair
    }

    /// Lets time pass, from one due event to the next. Ends early with the error of the side whose
    /// session ends.
    pub(super) fn run(&mut self, time: Duration) -> Result<(), SessionError> {
        let end = self.now + time;
        loop {
            self.settle()?;
            let due = [
                self.agent.poll_timeout(),
                self.server.poll_timeout(),
                self.to_agent.next_arrival(),
                self.to_server.next_arrival(),
            ];
            match due.into_iter().flatten().min() {
                Some(due) if due <= end => {
                    // What stays due without time passing would never end.
                    assert!(due > self.now || self.arrives(), "due again at once");
                    self.now = self.now.max(due);
                }
                _ => {
                    self.now = end;
                    return Ok(());
                }
            }
        }
    }

    fn arrives(&self) -> bool {
        let arrivals = [self.to_agent.next_arrival(), self.to_server.next_arrival()];
        arrivals.into_iter().flatten().any(|at| at <= self.now)
    }

    /// Does all that is due now.
    fn settle(&mut self) -> Result<(), SessionError> {
        let now = self.now;
        while let Some(bytes) = self.to_server.arrive(now) {
            for piece in bytes.chunks(self.to_server.piece) {
                self.server.handle_bytes(piece, now)?;
            }
        }
        while let Some(bytes) = self.to_agent.arrive(now) {
            for piece in bytes.chunks(self.to_agent.piece) {
                self.agent.handle_bytes(piece, now)?;
            }
        }
        self.agent.handle_timeout(now)?;
        self.server.handle_timeout(now)?;

        while let Some(event) = self.server.poll_event() {
            match &event {
                ServerEvent::Hello(_) if self.welcoming => self.server.welcome(welcome(), now)?,
                ServerEvent::Offer(claims) => self.server.verdict(claims.clone(), Vec::new())?,
                _ => {}
            }
            self.server_events.push((now - self.start, event));
        }
        while let Some(event) = self.agent.poll_event() {
            self.agent_events.push((now - self.start, event));
        }
        while let Some(bytes) = self.agent.poll_transmit() {
            self.to_server.send(&bytes, now);
        }
        while let Some(bytes) = self.server.poll_transmit() {
            self.to_agent.send(&bytes, now);
        }
        Ok(())
    }
}
