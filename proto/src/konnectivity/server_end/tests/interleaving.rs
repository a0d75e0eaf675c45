//! Random interleavings with an agent that behaves as the real one does: it handles packets one at
//! a time, dials beside that, sends what a target sent before CLOSE_RSP, and numbers connections
//! from 1.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone, Copy)]
enum Step {
    Dial,
    /// The agent handles a packet.
    Handle,
    /// A target answers a dial of the agent's, or refuses it.
    Connect(u8, bool),
    TargetSends(u8, u16),
    TargetCloses(u8),
    /// The server takes a packet, if it takes any.
    Take,
    Read(u8),
    Finish(u8),
    Stop(u8),
    Reset(u8),
    Release(u8),
    Wait(u16),
    Stray(u8, i8),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::Dial),
        6 => Just(Step::Handle),
        3 => (any::<u8>(), prop::bool::weighted(0.8)).prop_map(|(i, ok)| Step::Connect(i, ok)),
        4 => (any::<u8>(), any::<u16>()).prop_map(|(i, n)| Step::TargetSends(i, n)),
        1 => any::<u8>().prop_map(Step::TargetCloses),
        8 => Just(Step::Take),
        4 => any::<u8>().prop_map(Step::Read),
        1 => any::<u8>().prop_map(Step::Finish),
        1 => any::<u8>().prop_map(Step::Stop),
        1 => any::<u8>().prop_map(Step::Reset),
        1 => any::<u8>().prop_map(Step::Release),
        2 => (0..2000_u16).prop_map(Step::Wait),
        1 => (any::<u8>(), any::<i8>()).prop_map(|(kind, id)| Step::Stray(kind, id)),
    ]
}

/// A user of a dial, with its knowledge.
#[derive(Debug, Default)]
struct Client {
    read: Vec<u8>,
    end: Option<ReadEnd>,
    /// The client dropped or cancelled something.
    careless: bool,
}

/// A connection of the agent's.
#[derive(Debug)]
struct Target {
    dial: DialId,
    /// All its sent bytes.
    sent: Vec<u8>,
    open: bool,
    /// Number of CLOSE_REQ for it.
    told: usize,
}

struct World {
    bench: Bench,
    to_agent: VecDeque<Packet>,
    to_server: VecDeque<Packet>,
    next_dial: i64,
    next_id: i64,
    clients: BTreeMap<DialId, Client>,
    /// Concurrent dials of the agent.
    dialling: Vec<(DialId, i64)>,
    targets: BTreeMap<i64, Target>,
    answered: BTreeMap<DialId, usize>,
    /// The agent sends packets that real agents don't send.
    strays: bool,
}

fn pick<T: Copy>(from: impl IntoIterator<Item = T>, at: u8) -> Option<T> {
    let all: Vec<T> = from.into_iter().collect();
    (!all.is_empty()).then(|| all[usize::from(at) % all.len()])
}

impl World {
    fn new() -> Self {
        Self {
            bench: Bench::new(),
            to_agent: VecDeque::new(),
            to_server: VecDeque::new(),
            next_dial: 0,
            next_id: 0,
            clients: BTreeMap::new(),
            dialling: Vec::new(),
            targets: BTreeMap::new(),
            answered: BTreeMap::new(),
            strays: false,
        }
    }

    fn step(&mut self, step: Step) {
        let now = self.bench.now;
        let end = &mut self.bench.end;
        let client = |at| pick(self.clients.keys().copied(), at);
        match step {
            Step::Dial => {
                self.next_dial += 1;
                let dial = DialId(self.next_dial);
                end.dial(dial, "w1:1".into(), "client").unwrap();
                self.clients.insert(dial, Client::default());
            }
            Step::Handle => self.handle(),
            Step::Connect(at, ok) => self.connect(at, ok),
            Step::TargetSends(at, length) => self.target_sends(at, length),
            Step::TargetCloses(at) => {
                let open = self.targets.iter().filter(|(_, target)| target.open);
                if let Some(id) = pick(open.map(|(id, _)| *id), at) {
                    self.close_target(id);
                }
            }
            Step::Take => self.take(),
            Step::Read(at) => {
                if let Some(dial) = client(at) {
                    self.read(dial);
                }
            }
            Step::Finish(at) => {
                if let Some(dial) = client(at) {
                    end.finish(dial, now);
                }
            }
            Step::Stop(at) => {
                if let Some(dial) = client(at) {
                    end.stop(dial, now);
                    self.clients.get_mut(&dial).unwrap().careless = true;
                }
            }
            Step::Reset(at) => {
                if let Some(dial) = client(at) {
                    end.reset(dial, CloseReason::PeerReset, now);
                    self.clients.get_mut(&dial).unwrap().careless = true;
                }
            }
            Step::Release(at) => {
                if let Some(dial) = client(at) {
                    end.release(dial, now);
                    self.clients.remove(&dial);
                }
            }
            Step::Wait(milliseconds) => {
                // Ends early when the agent is lost, which takes longer than this.
                self.bench
                    .pass(Duration::from_millis(milliseconds.into()))
                    .unwrap();
            }
            Step::Stray(kind, id) => {
                self.strays = true;
                self.to_server.push_back(stray(kind, id.into()));
            }
        }
        self.settle();
    }

    /// Takes the output of the server's end, and checks the invariants.
    fn settle(&mut self) {
        let end = &mut self.bench.end;
        self.to_agent
            .extend(std::iter::from_fn(|| end.poll_transmit()));
        for event in self.bench.events() {
            assert_ne!(event, Event::Draining, "nobody said so");
        }
        let end = &self.bench.end;
        let held = end.connections.values().filter(|c| c.is_full()).count();
        assert!(held <= 1, "the stream is held for one at a time");
        let unknown = end.connections.keys().find(|dial| {
            let released = end.connections[*dial].released;
            !released && !self.clients.contains_key(dial)
        });
        assert_eq!(unknown, None, "nobody asks after it");
    }

    fn handle(&mut self) {
        match self.to_agent.pop_front() {
            Some(Packet::DialRequest { random, .. }) => {
                self.next_id += 1;
                self.dialling.push((DialId(random), self.next_id));
            }
            Some(Packet::CloseRequest { connect_id }) => {
                if let Some(target) = self.targets.get_mut(&connect_id) {
                    target.told += 1;
                    assert_eq!(target.told, 1, "once is enough");
                }
                if self.targets.get(&connect_id).is_some_and(|t| t.open) {
                    self.close_target(connect_id);
                } else {
                    self.to_server.push_back(Packet::CloseResponse {
                        error: "Unknown connectID".into(),
                        connect_id,
                    });
                }
            }
            Some(Packet::CloseDial { .. }) | None => {}
            Some(other) => panic!("no server sends {other:?}"),
        }
    }

    fn connect(&mut self, at: u8, ok: bool) {
        if self.dialling.is_empty() {
            return;
        }
        let at = usize::from(at) % self.dialling.len();
        let (dial, id) = self.dialling.swap_remove(at);
        *self.answered.entry(dial).or_default() += 1;
        if ok {
            let target = Target {
                dial,
                sent: Vec::new(),
                open: true,
                told: 0,
            };
            self.targets.insert(id, target);
            self.to_server.push_back(dialled(dial, id));
        } else {
            self.to_server.push_back(Packet::DialResponse {
                error: "connection refused".into(),
                connect_id: 0,
                random: dial.0,
            });
        }
    }

    fn target_sends(&mut self, at: u8, length: u16) {
        let open = self.targets.iter().filter(|(_, target)| target.open);
        let Some(id) = pick(open.map(|(id, _)| *id), at) else {
            return;
        };
        let target = self.targets.get_mut(&id).unwrap();
        let start = target.sent.len();
        // Told apart by where it stands, so that nothing can change places.
        let bytes: Vec<u8> = (start..start + usize::from(length))
            .map(|at| (at % 251) as u8)
            .collect();
        target.sent.extend_from_slice(&bytes);
        self.to_server.push_back(Packet::Data {
            connect_id: id,
            data: bytes.into(),
        });
    }

    fn close_target(&mut self, id: i64) {
        self.targets.get_mut(&id).unwrap().open = false;
        self.to_server.push_back(closed(id));
    }

    fn take(&mut self) {
        if self.bench.end.wants_packets()
            && let Some(packet) = self.to_server.pop_front()
        {
            self.bench.receive(packet);
        }
    }

    fn read(&mut self, dial: DialId) {
        let result = self.bench.read(dial);
        let client = self.clients.get_mut(&dial).unwrap();
        match result {
            Ok(bytes) => {
                assert_eq!(client.end, None, "nothing comes after the end");
                client.read.extend(bytes);
            }
            Err(end) => {
                assert!(client.end.is_none_or(|before| before == end), "one end");
                client.end = Some(end);
            }
        }
    }

    /// Lets everything end.
    fn wind_down(&mut self) {
        // The clients go on reading, and finish what they have not finished.
        let dials: Vec<_> = self.clients.keys().copied().collect();
        let deadline = self.bench.now + LINGER * 4;
        let mut finished = false;
        while self.bench.now < deadline {
            loop {
                let before = (self.to_agent.len(), self.to_server.len());
                self.handle();
                self.connect(0, true);
                self.take();
                for dial in &dials {
                    self.read(*dial);
                }
                self.settle();
                if before == (0, 0) && self.dialling.is_empty() {
                    break;
                }
            }
            if !std::mem::replace(&mut finished, true) {
                for dial in &dials {
                    self.bench.end.finish(*dial, self.bench.now);
                }
                self.settle();
            }
            self.bench.pass(Duration::from_millis(100)).unwrap();
            self.settle();
        }
    }

    fn check(&mut self) {
        for (dial, client) in &self.clients {
            let answer = self.bench.end.answer(*dial).expect("every dial ends");
            let target = self.targets.values().find(|target| target.dial == *dial);
            if client.careless || self.strays {
                continue;
            }
            assert_eq!(answer == Answer::Connected, target.is_some());
            if let Some(target) = target {
                assert_eq!(client.end, Some(ReadEnd::Finished));
                assert!(client.read == target.sent, "all that was sent was read");
            }
        }
        assert!(self.answered.values().all(|count| *count == 1));
        let left = self.targets.values().filter(|target| target.open).count();
        assert_eq!(left, 0, "the agent keeps nothing that nobody wants");

        for dial in std::mem::take(&mut self.clients).into_keys() {
            self.bench.end.release(dial, self.bench.now);
        }
        assert!(self.bench.end.is_idle());
        self.wind_down();
        let end = &self.bench.end;
        assert!(end.ids.is_empty() && end.closing.is_empty() && end.lingering.is_empty());
        assert!(end.wants_packets());
    }
}

/// Packet of a confused agent, for connections that it never had.
fn stray(kind: u8, id: i64) -> Packet {
    // Far from those in use.
    let connect_id = if id > 0 { id + 100_000 } else { id };
    match kind % 6 {
        0 => data(connect_id, b"stray"),
        1 => Packet::CloseResponse {
            error: String::new(),
            connect_id: connect_id.max(0),
        },
        2 => Packet::DialResponse {
            error: String::new(),
            connect_id,
            random: id + 100_000,
        },
        3 => Packet::CloseDial {
            random: id + 100_000,
        },
        4 => close(connect_id),
        _ => Packet::Unknown(id as i32),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn everything_ends_once_and_nothing_stays(steps in prop::collection::vec(any_step(), 0..200)) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.wind_down();
        world.check();
    }

    #[test]
    fn no_packet_does_harm(packets in prop::collection::vec(any_packet(), 0..100)) {
        let mut bench = Bench::connected();
        for packet in packets {
            if bench.end.handle_packet(packet, bench.now).is_err() {
                break;
            }
            bench.sent();
            bench.events();
        }
        for dial in [ONE, TWO] {
            bench.end.release(dial, bench.now);
        }
        prop_assert!(bench.end.is_idle());
    }
}

/// Any packet, with small numbers so that some of them fit an existing connection.
fn any_packet() -> impl Strategy<Value = Packet> {
    let id = || prop_oneof![(-4_i64..8), any::<i64>()];
    prop_oneof![
        (".{0,4}", id()).prop_map(|(address, random)| Packet::DialRequest {
            protocol: "tcp".into(),
            address,
            random,
        }),
        (".{0,1}", id(), id()).prop_map(|(error, connect_id, random)| Packet::DialResponse {
            error,
            connect_id,
            random,
        }),
        (id(), 0..4096_usize).prop_map(|(connect_id, length)| Packet::Data {
            connect_id,
            data: vec![0; length].into(),
        }),
        id().prop_map(close),
        (".{0,1}", id())
            .prop_map(|(error, connect_id)| Packet::CloseResponse { error, connect_id }),
        id().prop_map(|random| Packet::CloseDial { random }),
        Just(Packet::Drain),
        any::<i32>().prop_map(Packet::Unknown),
    ]
}
