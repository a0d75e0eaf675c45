//! The simulated world: servers and agents as they are, with their hosts, clients and targets, driven
//! until a time.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, anyhow, bail, ensure};
use cpc_agent::extension;
use cpc_config::server::AttachmentConfig;
use cpc_config::{AgentConfig, ServerConfig};
use cpc_host::environment::{Controller, Environment};
use cpc_observe::logging::LogHandle;
use cpc_server::{Capture, Origin, Origins};

use crate::endpoint::{End, Found, Script, Seen, Stream};
use crate::interpose::{Installed, kernel};
use crate::kernel::Kernel;
use crate::pki::Pki;
use crate::process::{Process, has_thread};
use crate::random::Random;
use crate::topology::{self, CAPTURE_PORT, Topology};

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

    // Programs.

    /// Starts a server that does not run.
    ///
    /// # Errors
    /// Its runtime can't be made.
    pub fn start_server(&mut self, index: usize) -> Result<()> {
        let origins = Box::new(Redirected(self.requested[index].clone()));
        let config = self.topology.server_config(&self.shared, index);
        let attachment: AttachmentConfig = serde_json::from_value(serde_json::json!({
            "name": "simulated", "cgroup": "/", "capture": [{"cidr": "10.0.0.0/8"}],
            "listen": [format!("127.0.0.1:{CAPTURE_PORT}")],
        }))?;
        let log = self.shared.log.clone();
        self.servers[index].start(move |environment| async move {
            let captures = vec![Capture {
                attachment,
                origins,
            }];
            let again = config.clone();
            let reread = move || Ok(again.clone());
            let ran = cpc_server::run_embedded(config, log, environment, captures, reread);
            Ok(ran.await?)
        })
    }

    /// Starts an agent that does not run.
    ///
    /// # Errors
    /// Its runtime can't be made.
    pub fn start_agent(&mut self, index: usize) -> Result<()> {
        let run = self.agents[index].started;
        let config = { &self.topology }.agent_config(&self.shared, index, run, &self.state);
        let log = self.shared.log.clone();
        self.agents[index].start(move |environment| async move {
            let again = config.clone();
            let reread = move || Ok(again.clone());
            Ok(cpc_agent::run_in(environment, config, log, extension::none, reread).await?)
        })
    }

    /// Ends a server at once: a crash.
    pub fn crash_server(&mut self, index: usize) {
        self.servers[index].runs.clear();
    }

    /// Ends an agent at once.
    pub fn crash_agent(&mut self, index: usize) {
        self.agents[index].runs.clear();
    }

    /// Requests the orderly end of a server; a second time its immediate one.
    pub fn stop_server(&mut self, index: usize) {
        self.servers[index].stop();
    }

    /// Requests the orderly end of an agent; a second time its immediate one.
    pub fn stop_agent(&mut self, index: usize) {
        self.agents[index].stop();
    }

    /// Requests the orderly end of the process before the last one of an agent.
    pub fn stop_former_agent(&mut self, index: usize) {
        if let [.., former, _] = &mut self.agents[index].runs[..] {
            former.is_stopping = true;
            former.control(Controller::stop);
        }
    }

    /// Requests a reload of every program.
    pub fn reload(&mut self) {
        for program in self.servers.iter_mut().chain(&mut self.agents) {
            for run in &mut program.runs {
                run.control(Controller::reload);
            }
        }
    }

    /// Whether a server has a process, one that drains included.
    pub fn has_server(&self, index: usize) -> bool {
        !self.servers[index].runs.is_empty()
    }

    /// Whether an agent has a process that does not drain.
    pub fn has_agent(&self, index: usize) -> bool {
        self.agents[index].runs.iter().any(|run| !run.is_stopping)
    }

    /// Whether a program drains.
    pub fn is_stopping(&self) -> bool {
        let mut runs = self
            .servers
            .iter()
            .chain(&self.agents)
            .flat_map(|it| &it.runs);
        runs.any(|run| run.is_stopping)
    }

    /// Ends every drain.
    pub fn end_drains(&mut self) {
        let programs = self.servers.iter_mut().chain(&mut self.agents);
        for run in programs
            .flat_map(|it| &mut it.runs)
            .filter(|run| run.is_stopping)
        {
            run.control(Controller::stop);
        }
    }

    /// Moves the wall clock of a program's host.
    pub fn step_clock(&mut self, is_server: bool, index: usize, by: i64) {
        let programs = match is_server {
            true => &mut self.servers,
            false => &mut self.agents,
        };
        let program = &mut programs[index];
        program.wall += by;
        for run in &mut program.runs {
            run.process.step_clock(by);
        }
    }

    // Connections.

    /// Starts a request, and returns its number.
    ///
    /// # Errors
    /// The client can't be made.
    pub fn dial(&mut self, request: Request) -> Result<usize> {
        let id = self.connections.len();
        let host = self.servers[request.server].host;
        let (fd, local) = kernel(|kernel| {
            kernel.enter(host);
            let fd = kernel.tcp_socket();
            let to = SocketAddrV4::new(Ipv4Addr::LOCALHOST, CAPTURE_PORT);
            match kernel.connect(fd, to) {
                Ok(_) | Err(libc::EINPROGRESS) => {}
                Err(error) => return Err(error),
            }
            Ok((fd, kernel.local(fd)?))
        })
        .map_err(|error| anyhow!("connect: {error}"))?;
        let mut requested = self.requested[request.server]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        requested.insert(local.into(), request.to.into());
        drop(requested);
        let mut client = End::new(fd, request.client);
        let number = id as u64;
        client.outgoing = Some(Stream {
            id: number,
            is_answer: false,
        });
        client.incoming = Some(Stream {
            id: number,
            is_answer: true,
        });
        let now = self.now();
        self.watch(fd)?;
        self.clients_by_fd.insert(fd, id);
        if let Some(at) = client.alarm(now) {
            self.alarms.push(Reverse((at, true, id)));
        }
        let wait = self.topology.dial_timeout + SECOND;
        self.alarms.push(Reverse((now + wait, true, id)));
        self.connections.push(Connection {
            request,
            client,
            target: None,
            start: now,
            deadline: now + wait,
            is_checked: false,
        });
        Ok(id)
    }

    /// Whether no connection is open, at a client or at a target.
    pub fn is_quiet(&self) -> bool {
        self.clients_by_fd.is_empty() && self.accepted_by_fd.is_empty()
    }

    /// Whether a connection has ended on the side of its client.
    pub fn is_over(&self, id: usize) -> bool {
        self.connections[id].client.fd.is_none()
    }

    fn poll_client(&mut self, id: usize) -> Result<()> {
        let now = self.now();
        let connection = &mut self.connections[id];
        let fd = connection.client.fd;
        let found = connection.client.poll(now);
        if let Found::WrongByte { at } = found {
            bail!("request {id}: byte {at} at the client is not the target's");
        }
        if let Some(at) = connection.client.alarm(now) {
            self.alarms.push(Reverse((at, true, id)));
        }
        if connection.client.fd.is_none()
            && let Some(fd) = fd
        {
            self.clients_by_fd.remove(&fd);
        }
        self.check_client(id)?;
        self.check_deadline(id, now)
    }

    /// Every dial ends within its time.
    fn check_deadline(&mut self, id: usize, now: u64) -> Result<()> {
        let connection = &self.connections[id];
        let client = &connection.client;
        let host = self.topology.host_of(*connection.request.to.ip());
        // The first bytes may be lost on the way to a target that has accepted the connection.
        let may_be = |it: &Accepted| {
            Some(it.host) == host && it.at >= connection.start && it.request.is_none()
        };
        let has_outcome = client.fd.is_none()
            || client.seen.is_some()
            || client.received > 0
            || connection.target.is_some()
            || self.accepted.iter().any(may_be);
        if now < connection.deadline {
            return Ok(());
        }
        ensure!(
            has_outcome,
            "request {id} to {} has no outcome {} s after its start",
            connection.request.to,
            self.topology.dial_timeout / SECOND + 1,
        );
        Ok(())
    }

    /// Checks what the client has seen against what its target has done.
    fn check_client(&mut self, id: usize) -> Result<()> {
        let connection = &mut self.connections[id];
        let client = &connection.client;
        let target = connection.target.map(|at| &self.accepted[at].end);
        let sent = target.map_or(0, |target| target.sent);
        ensure!(
            client.received <= sent,
            "request {id}: the client has {} bytes of {sent}",
            client.received,
        );
        if connection.is_checked || client.seen.is_none() {
            return Ok(());
        }
        connection.is_checked = true;
        match client.seen {
            Some(Seen::Eof) => {
                let is_orderly = target.is_some_and(|target| target.has_finished);
                ensure!(
                    is_orderly && client.received == sent,
                    "request {id}: the client's connection ended in order after {} bytes; the \
                     target has sent {sent}, finished: {is_orderly}",
                    client.received,
                );
            }
            Some(Seen::Error(error)) => ensure!(
                !connection.request.must_succeed,
                "request {id} from server {} to {} failed with errno {error} after {} bytes sent and \
                 {} received, although nothing was wrong",
                connection.request.server,
                connection.request.to,
                client.sent,
                client.received,
            ),
            None => {}
        }
        Ok(())
    }

    fn accept(&mut self, listener: i32, host: usize) -> Result<()> {
        while let Ok((fd, from)) = kernel(|kernel| kernel.accept(listener)) {
            let (local, address) = kernel(|kernel| (kernel.local(fd), *from.ip()));
            let local = local.map_err(|error| anyhow!("getsockname: {error}"))?;
            ensure!(
                self.topology.may_serve(address, local),
                "{address} has dialled {local}, which it may not serve",
            );
            let script = self.topology.until_header();
            self.accepted.push(Accepted {
                end: End::new(fd, script),
                host,
                at: self.now(),
                request: None,
            });
            let at = self.accepted.len() - 1;
            self.accepted_by_fd.insert(fd, at);
            self.watch(fd)?;
            self.poll_accepted(at)?;
        }
        Ok(())
    }

    fn poll_accepted(&mut self, at: usize) -> Result<()> {
        let now = self.now();
        loop {
            let accepted = &mut self.accepted[at];
            let fd = accepted.end.fd;
            match accepted.end.poll(now) {
                Found::Nothing => {}
                Found::WrongByte { at: offset } => {
                    bail!(
                        "accepted connection {at}: byte {offset} at the target is not the client's"
                    )
                }
                Found::Header(id) => {
                    self.identified(at, id)?;
                    continue;
                }
            }
            let accepted = &self.accepted[at];
            if let Some(alarm) = accepted.end.alarm(now) {
                self.alarms.push(Reverse((alarm, false, at)));
            }
            if accepted.end.fd.is_none()
                && let Some(fd) = fd
            {
                self.accepted_by_fd.remove(&fd);
            }
            return self.check_accepted(at);
        }
    }

    /// The target has got the number of a request: this is its one run.
    fn identified(&mut self, at: usize, id: u64) -> Result<()> {
        let Some(connection) = self.connections.get_mut(id as usize) else {
            bail!("a target has got request {id}, which no client has sent");
        };
        ensure!(
            connection.target.is_none(),
            "request {id} runs twice: at {:?} and at {:?}",
            connection.target,
            at,
        );
        connection.target = Some(at);
        let host = self.accepted[at].host;
        let expected = self.topology.host_of(*connection.request.to.ip());
        ensure!(
            Some(host) == expected,
            "request {id} to {} runs at host {host}",
            connection.request.to,
        );
        let now = kernel(|kernel| kernel.now());
        let accepted = &mut self.accepted[at];
        accepted.request = Some(id);
        accepted.end.begin(connection.request.target, id, now);
        Ok(())
    }

    fn check_accepted(&self, at: usize) -> Result<()> {
        let accepted = &self.accepted[at];
        let Some(id) = accepted.request else {
            ensure!(
                accepted.end.seen != Some(Seen::Eof),
                "a connection without a byte has ended in order at a target",
            );
            return Ok(());
        };
        let client = &self.connections[id as usize].client;
        let end = &accepted.end;
        ensure!(
            end.received <= client.sent,
            "request {id}: the target has {} bytes of {}",
            end.received,
            client.sent,
        );
        if end.seen == Some(Seen::Eof) {
            ensure!(
                client.has_finished && end.received == client.sent,
                "request {id}: the target's connection ended in order after {} bytes; the client has \
                 sent {}, finished: {}",
                end.received,
                client.sent,
                client.has_finished,
            );
        }
        Ok(())
    }

    // Time.

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

    // Pages.

    /// Fetches a page of a program at `address` of `host`.
    ///
    /// # Errors
    /// No page comes within a second.
    pub fn fetch(&mut self, host: usize, address: SocketAddrV4, path: &str) -> Result<String> {
        let fd = kernel(|kernel| {
            kernel.enter(host);
            let fd = kernel.tcp_socket();
            let _ = kernel.connect(fd, address);
            fd
        });
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let (mut left, mut page) = (request.as_bytes(), Vec::new());
        for _ in 0..1000 {
            if let Ok(sent) = kernel(|kernel| kernel.send(fd, left)) {
                left = &left[sent..];
            }
            match kernel(|kernel| kernel.recv(fd, 1 << 16)) {
                Ok(bytes) if bytes.is_empty() => break,
                Ok(bytes) => page.extend(bytes),
                Err(libc::EAGAIN) => self.run_until(self.now() + MS)?,
                Err(error) => bail!("{address}{path} at host {host}: errno {error}"),
            }
        }
        let _ = kernel(|kernel| kernel.close(fd));
        Ok(String::from_utf8_lossy(&page).into_owned())
    }

    /// Checks that programs without connections hold nothing for them.
    ///
    /// # Errors
    /// A limit of which something is used.
    pub fn check_limits(&mut self) -> Result<()> {
        let mut pages = Vec::new();
        for program in &self.servers {
            pages.push((program.name.clone(), program.host, topology::SERVER_ADMIN));
        }
        for program in &self.agents {
            for run in &program.runs {
                let address = topology::agent_admin(run.number);
                pages.push((program.name.clone(), program.host, address));
            }
        }
        for (at, (name, host, address)) in pages.into_iter().enumerate() {
            let mut page = self.fetch(host, address, "/metrics")?;
            let is_server = at < self.servers.len();
            let mut limits = vec!["connections"];
            if is_server {
                limits.push("dials");
                let tunnels = self.topology.tunnels();
                let line = format!("limit_used{{limit=\"agents\"}} {tunnels}\n");
                let deadline = self.now() + LOST_TUNNEL;
                while !page.contains(&line) && self.now() < deadline {
                    self.run_until(self.now() + SECOND)?;
                    page = self.fetch(host, address, "/metrics")?;
                }
                ensure!(page.contains(&line), "{name} has not {line}{page}");
            }
            for limit in limits {
                let line = format!("limit_used{{limit=\"{limit}\"}} 0\n");
                ensure!(page.contains(&line), "{name} has not {line}{page}");
            }
            let (_, held) = page
                .split_once("limit_used{limit=\"stalled_bytes\"} ")
                .unwrap_or_default();
            let held: u64 = held.lines().next().unwrap_or_default().parse()?;
            ensure!(held <= KEPT, "{name} holds {held} bytes for nothing");
        }
        Ok(())
    }

    // The end.

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
        ensure!(!has_thread(), "a program has started a thread");
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

impl Program {
    fn start<F>(&mut self, task: impl FnOnce(Environment) -> F) -> Result<()>
    where
        F: Future<Output = Result<()>> + 'static,
    {
        let mut process = Process::new(self.host, self.wall)?;
        let (environment, controller) = Environment::embedded();
        let done = process.spawn(task(environment));
        self.runs.push(Run {
            process,
            controller,
            done,
            number: self.started,
            is_stopping: false,
            has_ended: false,
        });
        self.started += 1;
        Ok(())
    }

    /// Requests the end of the last process.
    fn stop(&mut self) {
        if let Some(run) = self.runs.last_mut() {
            run.is_stopping = true;
            run.control(Controller::stop);
        }
    }
}

impl Run {
    fn control(&mut self, request: impl Fn(&Controller)) {
        self.process.run(|| request(&self.controller));
    }
}
