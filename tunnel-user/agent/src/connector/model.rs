//! The connector against a simple world of servers, over random events.
//!
//! A server has one process at a time. A tunnel leads to the process that welcomed the agent; a server
//! that drains does so until its end.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use proptest::sample::Index;

use super::*;
use cpc_config::TunnelKind;
use tunnel_proto::session::InstanceId;

const SERVERS: usize = 3;
const NAMES: [&str; 3] = ["a:1", "b:1", "c:1"];

/// An event of the world, or of the agent.
#[derive(Clone, Debug)]
enum Step {
    /// Time passes.
    Wait(u64),
    /// A name leads to the addresses whose bits are set.
    Resolve(usize, u8),
    /// A name is not resolved.
    NotResolved(usize),
    /// A dial goes on, towards this server.
    Proceed(Index, usize),
    /// A dial fails.
    Fail(Index),
    /// The server of a tunnel falls silent, drains, or is heard again.
    Change(Index, Health),
    /// A tunnel ends.
    End(Index),
    /// Another process takes the place of a server's.
    Restart(usize),
    /// Foreign servers are counted.
    Count(Option<u32>),
    /// The agent drains.
    Drain,
    /// The agent ends.
    Stop,
}

fn step() -> impl Strategy<Value = Step> {
    let health = prop_oneof![
        Just(Health::Live),
        Just(Health::Silent),
        Just(Health::Draining),
    ];
    prop_oneof![
        60 => (0..3_000_u64).prop_map(Step::Wait),
        10 => (0..NAMES.len(), 0..8_u8).prop_map(|(name, set)| Step::Resolve(name, set)),
        5 => (0..NAMES.len()).prop_map(Step::NotResolved),
        120 => (any::<Index>(), 0..SERVERS).prop_map(|(dial, server)| Step::Proceed(dial, server)),
        20 => any::<Index>().prop_map(Step::Fail),
        60 => (any::<Index>(), health).prop_map(|(tunnel, health)| Step::Change(tunnel, health)),
        20 => any::<Index>().prop_map(Step::End),
        10 => (0..SERVERS).prop_map(Step::Restart),
        3 => proptest::option::of(0..5_u32).prop_map(Step::Count),
        1 => Just(Step::Drain),
        1 => Just(Step::Stop),
    ]
}

/// State of a dial.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Dialling,
    /// Waits for an answer.
    Reached(usize),
    Introduced(usize),
    /// Waits for an answer.
    Welcomed(usize),
}

/// A kept tunnel.
#[derive(Debug)]
struct Tunnel {
    kind: TunnelKind,
    server: usize,
    process: u8,
    health: Health,
    is_draining: bool,
    is_retired: bool,
    is_closed: bool,
}

struct World {
    connector: Connector,
    now: Instant,
    wanted: usize,
    processes: [u8; SERVERS],
    dials: BTreeMap<u64, (ServerEndpoint, Stage)>,
    tunnels: BTreeMap<u64, Tunnel>,
    last: u64,
    is_draining: bool,
    is_stopping: bool,
    addresses: [u8; NAMES.len()],
}

impl World {
    fn new(protocols: [Protocol; 3], wanted: u8) -> Self {
        let names = NAMES.iter().map(|name| Arc::from(*name)).zip(protocols);
        Self {
            connector: Connector::new(names, wanted, false),
            now: Instant::now(),
            wanted: wanted.into(),
            processes: [0; SERVERS],
            dials: BTreeMap::new(),
            tunnels: BTreeMap::new(),
            last: 0,
            is_draining: false,
            is_stopping: false,
            addresses: [0; NAMES.len()],
        }
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Wait(ms) => {
                self.now += Duration::from_millis(*ms);
                self.handle(Event::Timeout);
            }
            Step::Resolve(name, set) => {
                self.addresses[*name] = *set;
                let addresses = (0..8).filter(|bit| set & (1 << bit) != 0);
                let addresses = addresses.map(|bit| ([10, 0, 0, bit], 8132).into());
                self.handle(Event::Resolved(
                    NAMES[*name].into(),
                    Ok(addresses.collect()),
                ));
            }
            Step::NotResolved(name) => {
                self.handle(Event::Resolved(NAMES[*name].into(), Err("none".into())));
            }
            Step::Proceed(dial, server) => self.proceed(*dial, *server),
            Step::Fail(dial) => {
                if let Some(number) = pick(&self.dials, *dial) {
                    self.dials.remove(&number);
                    self.handle(Event::Failed(number, "test".into()));
                }
            }
            Step::Change(tunnel, health) => {
                let Some(number) = pick(&self.tunnels, *tunnel) else {
                    return;
                };
                let tunnel = self.tunnels.get_mut(&number).unwrap();
                tunnel.is_draining |= *health == Health::Draining;
                tunnel.health = match health {
                    Health::Live if tunnel.is_draining => Health::Draining,
                    health => *health,
                };
                let health = tunnel.health;
                self.handle(Event::Changed(number, health));
            }
            Step::End(tunnel) => {
                if let Some(number) = pick(&self.tunnels, *tunnel) {
                    self.tunnels.remove(&number);
                    let end = TunnelEnd::new(CloseReason::LinkLost, "test");
                    self.handle(Event::Ended(number, end));
                }
            }
            Step::Restart(server) => self.processes[*server] += 1,
            Step::Count(count) => self.handle(Event::ForeignServers(*count)),
            Step::Drain => {
                self.is_draining = true;
                self.handle(Event::Draining);
            }
            Step::Stop if self.is_stopping => {}
            Step::Stop => {
                (self.is_draining, self.is_stopping) = (true, true);
                self.handle(Event::Stopping(CloseReason::Shutdown));
                assert!(self.tunnels.values().all(|tunnel| tunnel.is_closed));
            }
        }
    }

    fn proceed(&mut self, dial: Index, server: usize) {
        let Some(number) = pick(&self.dials, dial) else {
            return;
        };
        let (endpoint, stage) = self.dials.get_mut(&number).unwrap();
        let event = match *stage {
            Stage::Dialling if endpoint.kind.is_native() => {
                *stage = Stage::Reached(server);
                Event::Reached(number, id(server))
            }
            Stage::Dialling => {
                *stage = Stage::Welcomed(server);
                Event::Welcomed(number, self.info(server, None))
            }
            Stage::Introduced(server) => {
                *stage = Stage::Welcomed(server);
                let process = InstanceId([self.processes[server]; 16]);
                Event::Welcomed(number, self.info(server, Some(process)))
            }
            stage => panic!("{stage:?} was not answered"),
        };
        self.handle(event);
    }

    fn info(&self, server: usize, instance: Option<InstanceId>) -> ServerInfo {
        ServerInfo {
            server: id(server),
            instance,
            server_count: SERVERS as u32,
        }
    }

    fn handle(&mut self, event: Event) {
        self.connector.handle(event, self.now, 0.5);
        while let Some(action) = self.connector.poll_action() {
            self.execute(action);
        }
        let waits = |stage: &Stage| matches!(stage, Stage::Reached(_) | Stage::Welcomed(_));
        let unanswered = self.dials.values().find(|(_, stage)| waits(stage));
        assert_eq!(unanswered, None, "has no answer");
        self.check_numbers();
        self.check_progress();
    }

    fn execute(&mut self, action: Action) {
        match action {
            Action::Dial(dial) => {
                assert!(!self.is_draining, "{dial:?} while draining");
                assert!(dial.number > self.last, "{dial:?} is not a fresh number");
                self.last = dial.number;
                let mut dials = self.dials.values();
                let again = dials.any(|(endpoint, _)| *endpoint == dial.endpoint);
                assert!(!again, "{dial:?} is under way already");
                let stage = (dial.endpoint, Stage::Dialling);
                self.dials.insert(dial.number, stage);
            }
            Action::Introduce(number) => {
                let (_, stage) = self.dials.get_mut(&number).unwrap();
                let Stage::Reached(server) = *stage else {
                    panic!("{stage:?} was not reached");
                };
                *stage = Stage::Introduced(server);
            }
            Action::Keep(number) => {
                let (endpoint, stage) = self.dials.remove(&number).unwrap();
                let Stage::Welcomed(server) = stage else {
                    panic!("{stage:?} was not welcomed");
                };
                assert!(!self.is_stopping, "keeps a tunnel of an agent that ends");
                let tunnel = Tunnel {
                    kind: endpoint.kind,
                    server,
                    process: self.processes[server],
                    health: Health::Live,
                    is_draining: false,
                    is_retired: false,
                    is_closed: false,
                };
                self.tunnels.insert(number, tunnel);
            }
            Action::Decline(number) => {
                let (_, stage) = self.dials.remove(&number).unwrap();
                assert!(matches!(stage, Stage::Reached(_) | Stage::Welcomed(_)));
            }
            Action::Retire(number) => {
                let tunnel = self.tunnels.get_mut(&number).unwrap();
                assert!(!tunnel.is_retired, "{tunnel:?} is retired already");
                tunnel.is_retired = true;
            }
            Action::Close(number, _) => {
                assert!(self.is_stopping);
                let tunnel = self.tunnels.get_mut(&number).unwrap();
                assert!(!tunnel.is_closed, "{tunnel:?} is closed already");
                tunnel.is_closed = true;
            }
            Action::Log(_) => {}
        }
    }

    /// No process of a server has more live tunnels than wanted, of our protocol or a foreign one.
    fn check_numbers(&self) {
        for tunnel in self.tunnels.values() {
            let same = self.tunnels.values().filter(|other| {
                let family = other.kind.is_native() == tunnel.kind.is_native();
                let is_same = other.process == tunnel.process || !tunnel.kind.is_native();
                family && other.server == tunnel.server && is_same
            });
            let live = same.filter(|it| it.health == Health::Live && !it.is_retired);
            let most = match tunnel.kind.is_native() {
                true => self.wanted,
                false => 1,
            };
            assert!(live.count() <= most, "{:?}", self.tunnels);
        }
    }

    /// An agent without a tunnel dials, or will, as long as a name leads anywhere.
    fn check_progress(&self) {
        let is_idle = self.dials.is_empty() && self.tunnels.is_empty();
        if is_idle && !self.is_draining && self.addresses != [0; NAMES.len()] {
            assert!(self.connector.poll_timeout().is_some(), "dials no more");
        }
    }
}

fn id(server: usize) -> Arc<str> {
    format!("s{server}").into()
}

fn pick<T>(map: &BTreeMap<u64, T>, index: Index) -> Option<u64> {
    let keys: Vec<_> = map.keys().copied().collect();
    (!keys.is_empty()).then(|| *index.get(&keys))
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![
        Just(Protocol::Quic),
        Just(Protocol::Konnectivity),
        Just(Protocol::Auto),
    ]
}

proptest! {
    #[test]
    fn over_any_events(
        protocols in [protocol(), protocol(), protocol()],
        wanted in 1..4_u8,
        steps in vec(step(), 0..200),
    ) {
        let mut world = World::new(protocols, wanted);
        steps.iter().for_each(|step| world.take(step));
    }
}
