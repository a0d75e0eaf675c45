//! The simulated world: servers and agents as they are, with their hosts, clients and targets, driven
//! until a time.

mod connections;
mod pages;
mod programs;

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, anyhow, ensure};
use cpc_config::{AgentConfig, ServerConfig};
use cpc_host::environment::Controller;
use cpc_observe::logging::LogHandle;
use cpc_server::{Origin, Origins};

use crate::endpoint::{End, Script};
use crate::interpose::{Installed, kernel};
use crate::kernel::Kernel;
use crate::pki::Pki;
use crate::process::{Process, has_thread};
use crate::random::Random;
use crate::topology::{self, Topology};

/// Nanoseconds of a second.
pub const SECOND: u64 = 1_000_000_000;
/// Nanoseconds of a millisecond.
pub const MS: u64 = 1_000_000;

/// Monotonic time at the start of each simulation.
const START: u64 = 1000 * SECOND;

/// Maximum time for which a server keeps a tunnel that was lost: three times its probe timeout, where that
/// is longer than the idle timeout (RFC 9000, section 10.1). A path that stood still has a long one.
const LOST_TUNNEL: u64 = 240 * SECOND;

/// Wall clock at the start: in 2030.
const WALL: i64 = 1_893_456_000 * SECOND as i64;

/// Bytes of memory that a program without connections may hold: quinn-proto keeps lists of ended streams
/// for later ones (`quic/ledger.rs`).
const KEPT: u64 = 1 << 20;

/// Threads of the process of a seed: the first one, which waits, and the simulation's.
const THREADS: usize = 2;

/// Steps at one instant, after which time is stuck.
const STUCK: u64 = 200_000;

/// State that all simulations of a program share.
#[derive(Debug)]
pub struct Shared {
    /// Certificates.
    pub pki: Pki,
    /// Log that no event reaches.
    pub log: LogHandle,
    /// Configurations to start from.
    pub server: ServerConfig,
    /// The same for agents.
    pub agent: AgentConfig,
}

impl Shared {
    /// Makes certificates and configurations.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn new() -> Result<Self> {
        let server = ServerConfig::default();
        Ok(Self {
            pki: topology::pki()?,
            log: LogHandle::detached(&server.log)?,
            server,
            agent: AgentConfig::default(),
        })
    }
}

/// A simulated server or agent.
struct Program {
    name: String,
    host: usize,
    /// Difference of the wall clock of its host to the monotonic clock.
    wall: i64,
    /// Processes: the last one, and earlier ones that drain.
    runs: Vec<Run>,
    /// Number of its processes so far.
    started: u16,
}

struct Run {
    process: Process,
    controller: Controller,
    done: Rc<RefCell<Option<Result<()>>>>,
    number: u16,
    is_stopping: bool,
    has_ended: bool,
}

/// Destinations of the redirected connections of one host, by client.
type Requested = Arc<Mutex<BTreeMap<SocketAddr, SocketAddr>>>;

struct Redirected(Requested);

impl Origins for Redirected {
    fn take_origin(
        &mut self,
        client: SocketAddr,
        _listener: SocketAddr,
    ) -> Result<Option<Origin>, cpc_server::RedirectError> {
        let mut requested = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(requested.remove(&client).map(|destination| Origin {
            destination,
            refused: None,
        }))
    }
}

/// A request of a client.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Server at whose host the client runs.
    pub server: usize,
    /// Destination.
    pub to: SocketAddrV4,
    /// Script of the client.
    pub client: Script,
    /// Script of the target.
    pub target: Script,
    /// Whether it must succeed.
    pub must_succeed: bool,
}

/// A connection, from the client's and from the target's side.
struct Connection {
    request: Request,
    client: End,
    /// End of the target that has got the request.
    target: Option<usize>,
    start: u64,
    /// Deadline of its dial.
    deadline: u64,
    is_checked: bool,
}

/// An end at a target.
struct Accepted {
    end: End,
    host: usize,
    /// Time of the accept.
    at: u64,
    request: Option<u64>,
}

/// The simulated world.
pub struct World {
    /// Hosts, members, targets and paths.
    pub topology: Topology,
    shared: Rc<Shared>,
    servers: Vec<Program>,
    agents: Vec<Program>,
    requested: Vec<Requested>,
    connections: Vec<Connection>,
    accepted: Vec<Accepted>,
    listeners: BTreeMap<i32, usize>,
    /// Ends by descriptor.
    clients_by_fd: BTreeMap<i32, usize>,
    accepted_by_fd: BTreeMap<i32, usize>,
    epoll: i32,
    epoll_id: usize,
    alarms: BinaryHeap<Reverse<(u64, bool, usize)>>,
    state: PathBuf,
    /// Random numbers of the scenario.
    pub random: Random,
    // Dropped last: all of the above closes descriptors.
    _installed: Installed,
}

impl World {
    /// Builds the world of a seed; nothing runs yet.
    ///
    /// # Errors
    /// A target can't listen.
    pub fn new(shared: Rc<Shared>, seed: u64, state: PathBuf) -> Result<Self> {
        let mut random = Random::new(seed);
        let (network, entropy) = (random.next(), random.next());
        let installed = Installed::new(Kernel::new(network, START), entropy);
        let topology = Topology::new(&mut random);
        kernel(|kernel| {
            for address in &topology.hosts {
                kernel.add_host(*address);
            }
            kernel.set_window(topology.window);
        });
        let program = |name: &String, host| Program {
            name: name.clone(),
            host,
            wall: WALL,
            runs: Vec::new(),
            started: 0,
        };
        let servers = topology.servers.iter().map(|it| program(&it.name, it.host));
        let agents = topology.agents.iter().map(|it| program(&it.name, it.host));
        let (servers, agents): (Vec<_>, Vec<_>) = (servers.collect(), agents.collect());
        let requested = servers.iter().map(|_| Requested::default()).collect();
        let epoll = kernel(Kernel::epoll_create);
        let mut world = Self {
            topology,
            shared,
            servers,
            agents,
            requested,
            connections: Vec::new(),
            accepted: Vec::new(),
            listeners: BTreeMap::new(),
            clients_by_fd: BTreeMap::new(),
            accepted_by_fd: BTreeMap::new(),
            epoll,
            epoll_id: kernel(|kernel| kernel.last_epoll()),
            alarms: BinaryHeap::new(),
            state,
            random,
            _installed: installed,
        };
        for target in world.topology.targets.clone() {
            world.listen(target.host, target.port)?;
        }
        Ok(world)
    }

    /// Returns the time.
    pub fn now(&self) -> u64 {
        kernel(|kernel| kernel.now())
    }

    fn watch(&self, fd: i32) -> Result<()> {
        let events = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP) as u32;
        let data = u64::try_from(fd)?;
        kernel(|kernel| kernel.epoll_ctl(self.epoll, libc::EPOLL_CTL_ADD, fd, (events, data)))
            .map_err(|error| anyhow!("epoll_ctl: {error}"))?;
        Ok(())
    }

    fn listen(&mut self, host: usize, port: u16) -> Result<()> {
        let fd = kernel(|kernel| {
            kernel.enter(host);
            let fd = kernel.tcp_socket();
            kernel.bind(fd, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
            kernel.listen(fd)?;
            Ok(fd)
        })
        .map_err(|error: i32| anyhow!("listen: {error}"))?;
        self.watch(fd)?;
        self.listeners.insert(fd, host);
        Ok(())
    }

    /// Runs until `end`.
    ///
    /// # Errors
    /// A violated invariant.
    pub fn run_until(&mut self, end: u64) -> Result<()> {
        let (mut instant, mut steps) = (self.now(), 0u64);
        loop {
            let now = self.now();
            if now != instant {
                (instant, steps) = (now, 0);
            }
            steps += 1;
            ensure!(steps < STUCK, "the world is stuck at {now}: too many steps");
            let mut is_busy = self.step_programs(now)?;
            is_busy |= self.step_world(now)?;
            if is_busy {
                continue;
            }
            let event = kernel(|kernel| kernel.next_event());
            let alarm = self.alarms.peek().map(|Reverse((at, ..))| *at);
            let programs = self.servers.iter().chain(&self.agents);
            let runs = programs.flat_map(|it| &it.runs);
            let timers = runs.filter_map(|run| run.process.alarm());
            let next = timers.chain(event).chain(alarm).min();
            match next {
                Some(next) if next <= end => kernel(|kernel| kernel.advance(next)),
                _ => {
                    kernel(|kernel| kernel.advance(end));
                    return Ok(());
                }
            }
        }
    }

    fn step_programs(&mut self, now: u64) -> Result<bool> {
        let mut is_busy = false;
        for program in self.servers.iter_mut().chain(&mut self.agents) {
            for run in &mut program.runs {
                if run.process.has_work(now) {
                    run.process.step();
                    is_busy = true;
                }
                if let Some(ended) = run.done.take() {
                    ended.map_err(|error| error.context(program.name.clone()))?;
                    ensure!(run.is_stopping, "{} has ended by itself", program.name);
                    run.has_ended = true;
                }
            }
            program.runs.retain(|run| !run.has_ended);
        }
        Ok(is_busy)
    }

    fn step_world(&mut self, now: u64) -> Result<bool> {
        let mut is_busy = false;
        while let Some(Reverse((at, is_client, index))) = self.alarms.peek().copied()
            && at <= now
        {
            self.alarms.pop();
            is_busy = true;
            match is_client {
                true => self.poll_client(index)?,
                false => self.poll_accepted(index)?,
            }
        }
        if !kernel(|kernel| kernel.has_news(self.epoll_id)) {
            return Ok(is_busy);
        }
        let events = kernel(|kernel| kernel.epoll_take(self.epoll, 64));
        for (_, data) in events.map_err(|error| anyhow!("epoll_wait: {error}"))? {
            let fd = i32::try_from(data)?;
            if let Some(host) = self.listeners.get(&fd).copied() {
                self.accept(fd, host)?;
            } else if let Some(id) = self.clients_by_fd.get(&fd).copied() {
                self.poll_client(id)?;
            } else if let Some(at) = self.accepted_by_fd.get(&fd).copied() {
                self.poll_accepted(at)?;
            }
        }
        Ok(true)
    }

    /// Checks that nothing is left of the connections.
    ///
    /// # Errors
    /// A connection that has not ended.
    pub fn check_rest(&self) -> Result<()> {
        for (id, connection) in self.connections.iter().enumerate() {
            let client = &connection.client;
            ensure!(
                client.fd.is_none(),
                "request {id} from server {} to {} has not ended: {client:?}, target: {:?}",
                connection.request.server,
                connection.request.to,
                connection.target.map(|at| &self.accepted[at].end),
            );
        }
        for accepted in &self.accepted {
            ensure!(
                accepted.end.fd.is_none(),
                "a connection at the target has not ended: {:?}, request {:?}",
                accepted.end,
                accepted.request,
            );
        }
        let threads = std::fs::read_dir("/proc/self/task")?.count();
        ensure!(
            !has_thread() && threads == THREADS,
            "a program has started a thread"
        );
        let unknown: BTreeSet<_> = kernel(|kernel| kernel.unknown.iter().cloned().collect());
        ensure!(unknown.is_empty(), "unknown calls: {unknown:?}");
        Ok(())
    }

    /// Returns the requests that ran, and all of them.
    pub fn counts(&self) -> (u64, u64) {
        let ran = { self.connections.iter() }.filter(|it| it.target.is_some());
        (ran.count() as u64, self.connections.len() as u64)
    }

    /// Describes all connections, for people.
    pub fn describe(&self) -> String {
        let each = self.connections.iter().enumerate().map(|(id, it)| {
            format!(
                "request {id}: {:?}\n  client {:?}\n  target {:?}\n",
                it.request,
                it.client,
                it.target.map(|at| &self.accepted[at].end)
            )
        });
        each.collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Before the kernel goes.
        self.servers.clear();
        self.agents.clear();
    }
}
