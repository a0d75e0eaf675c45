//! A small kernel: descriptors, UDP and TCP over simulated paths, epoll, and a clock that moves only when
//! nothing is left to do. Sans-IO and deterministic: the same calls have the same results.
//!
//! [`crate::interpose`] leads the calls of the C library here. All calls return a number, or an errno.

mod epoll;
pub mod filter;
pub mod network;
mod sockets;
mod tcp;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};

use self::epoll::Epoll;
use self::filter::Instruction;
use self::network::{Link, Packet, Path};
use self::tcp::{Arrival, Listener, Tcp};
use crate::random::{Random, mix};

/// The lowest descriptor: below it are those of the real kernel.
pub const FIRST: i32 = 1 << 24;

/// Result of a call: a number, or an errno.
pub type Outcome<T = usize> = Result<T, i32>;

/// Number of an open file description.
pub(crate) type FileId = usize;

/// Bytes that a UDP socket queues.
const RECEIVE_BUFFER: usize = 4 << 20;

/// The first port of those that the kernel chooses.
const EPHEMERAL: u16 = 32_768;

/// An open file description.
#[derive(Debug)]
struct File {
    kind: Kind,
    /// Descriptors that refer to it.
    descriptors: usize,
    /// Epoll instances and descriptors that watch it.
    watchers: Vec<(FileId, i32)>,
}

#[derive(Debug)]
enum Kind {
    Epoll(Epoll),
    Event(u64),
    /// A TCP socket that neither listens nor connects yet.
    Fresh(Fresh),
    Listener(Listener),
    Tcp(Tcp),
    Udp(Udp),
}

#[derive(Debug)]
struct Fresh {
    host: usize,
    local: Option<SocketAddrV4>,
    is_reset_on_close: bool,
}

#[derive(Debug)]
struct Udp {
    host: usize,
    local: Option<SocketAddrV4>,
    is_shared: bool,
    program: Vec<Instruction>,
    queue: VecDeque<Packet>,
    bytes: usize,
}

/// Something that happens at a time.
#[derive(Debug)]
enum Event {
    Packet(Packet),
    Tcp(FileId, Arrival),
    Connect { client: FileId, to: SocketAddrV4 },
}

/// A host.
#[derive(Debug)]
struct Host {
    address: Ipv4Addr,
    next_port: u16,
    /// Difference of the ports that others see to those of its UDP sockets.
    mapping: u16,
}

/// The kernel of all hosts.
#[derive(Debug)]
pub struct Kernel {
    now: u64,
    random: Random,
    trace: u64,
    /// Number of events in the trace.
    events: u64,
    hosts: Vec<Host>,
    /// Host of the process that runs.
    current: usize,
    files: Vec<Option<File>>,
    descriptors: BTreeMap<i32, FileId>,
    next_descriptor: i32,
    listeners: BTreeMap<SocketAddrV4, FileId>,
    /// Sockets by address; several share one in the order of their binding.
    udp: BTreeMap<SocketAddrV4, Vec<FileId>>,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    queued: BTreeMap<u64, Event>,
    sequence: u64,
    links: BTreeMap<(usize, usize), Link>,
    default_path: Path,
    /// Delay of TCP between hosts.
    tcp_delay: u64,
    /// Room of a TCP connection in each direction.
    window: usize,
    /// Addresses that answer no connect.
    silent: Vec<Ipv4Addr>,
    last_epoll: FileId,
    /// Calls that the kernel does not know.
    pub(crate) unknown: Vec<String>,
}

impl Kernel {
    /// Creates a kernel whose clock shows `now` nanoseconds.
    pub fn new(seed: u64, now: u64) -> Self {
        Self {
            now,
            random: Random::new(seed),
            trace: 0,
            events: 0,
            hosts: Vec::new(),
            current: 0,
            files: Vec::new(),
            descriptors: BTreeMap::new(),
            next_descriptor: FIRST,
            listeners: BTreeMap::new(),
            udp: BTreeMap::new(),
            queue: BinaryHeap::new(),
            queued: BTreeMap::new(),
            sequence: 0,
            links: BTreeMap::new(),
            default_path: Path::default(),
            tcp_delay: 200_000,
            window: 64 << 10,
            silent: Vec::new(),
            last_epoll: 0,
            unknown: Vec::new(),
        }
    }

    /// Adds a host.
    pub fn add_host(&mut self, address: Ipv4Addr) -> usize {
        self.hosts.push(Host {
            address,
            next_port: EPHEMERAL,
            mapping: 0,
        });
        self.hosts.len() - 1
    }

    /// Makes the following calls those of a process of `host`.
    pub fn enter(&mut self, host: usize) {
        self.current = host;
    }

    /// Returns the time in nanoseconds.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Returns the hash of all events so far, and their number.
    pub fn trace(&self) -> (u64, u64) {
        (self.trace, self.events)
    }

    /// Adds an event to the trace.
    pub fn note(&mut self, values: &[u64]) {
        self.events += 1;
        self.trace = mix(self.trace ^ self.now);
        for value in values {
            self.trace = mix(self.trace.rotate_left(5) ^ value);
        }
        if TRACE.load(Ordering::Relaxed) {
            eprintln!("{} {values:?}", self.now);
        }
    }

    /// Changes the path from host to host.
    pub fn set_path(&mut self, from: usize, to: usize, path: Path) {
        self.link(from, to).path = path;
    }

    /// Returns the path from host to host.
    pub fn path(&self, from: usize, to: usize) -> Path {
        let link = self.links.get(&(from, to));
        link.map_or(self.default_path, |link| link.path)
    }

    /// Sets the room of TCP connections.
    pub fn set_window(&mut self, bytes: usize) {
        self.window = bytes;
    }

    /// Makes an address answer no connect, or answer again.
    pub fn set_silent(&mut self, address: Ipv4Addr, is_silent: bool) {
        self.silent.retain(|it| *it != address);
        if is_silent {
            self.silent.push(address);
        }
    }

    /// Changes the ports under which others see the UDP sockets of a host, as a restarted NAT does: packets
    /// to the former ones are lost.
    pub fn set_mapping(&mut self, host: usize, mapping: u16) {
        self.hosts[host].mapping = mapping;
    }

    /// Sends a packet that no socket has sent.
    pub fn inject(&mut self, from: SocketAddrV4, to: SocketAddrV4, bytes: Vec<u8>) {
        let packet = Packet {
            from,
            to,
            ecn: 0,
            bytes,
        };
        self.schedule(self.now, Event::Packet(packet));
    }

    fn link(&mut self, from: usize, to: usize) -> &mut Link {
        let path = self.default_path;
        let new = || Link::new(path);
        self.links.entry((from, to)).or_insert_with(new)
    }

    fn host_of(&self, address: Ipv4Addr) -> Option<usize> {
        if address.is_loopback() {
            return Some(self.current);
        }
        self.hosts.iter().position(|host| host.address == address)
    }

    fn schedule(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse((at, self.sequence)));
        self.queued.insert(self.sequence, event);
    }

    /// Returns the time of the next event.
    pub fn next_event(&self) -> Option<u64> {
        self.queue.peek().map(|Reverse((at, _))| *at)
    }

    /// Moves the clock, at most to the next event, and handles the events that are due.
    pub fn advance(&mut self, to: u64) {
        self.now = self.now.max(to);
        while let Some(Reverse((at, sequence))) = self.queue.peek().copied()
            && at <= self.now
        {
            self.queue.pop();
            if let Some(event) = self.queued.remove(&sequence) {
                self.happen(event);
            }
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Packet(packet) => self.arrive(packet),
            Event::Tcp(to, arrival) => self.tcp_arrives(to, arrival),
            Event::Connect { client, to } => self.connect_arrives(client, to),
        }
    }

    // Descriptors.

    fn open(&mut self, kind: Kind) -> i32 {
        self.files.push(Some(File {
            kind,
            descriptors: 1,
            watchers: Vec::new(),
        }));
        self.descriptor_of(self.files.len() - 1)
    }

    fn descriptor_of(&mut self, file: FileId) -> i32 {
        let fd = self.next_descriptor;
        self.next_descriptor += 1;
        self.descriptors.insert(fd, file);
        fd
    }

    /// Whether a descriptor is one of this kernel's.
    pub fn owns(fd: i32) -> bool {
        fd >= FIRST
    }

    fn id(&self, fd: i32) -> Outcome<FileId> {
        self.descriptors.get(&fd).copied().ok_or(libc::EBADF)
    }

    fn file(&mut self, id: FileId) -> Option<&mut File> {
        self.files.get_mut(id)?.as_mut()
    }

    fn kind(&mut self, fd: i32) -> Outcome<&mut Kind> {
        let id = self.id(fd)?;
        self.file(id).map(|file| &mut file.kind).ok_or(libc::EBADF)
    }

    /// Returns the number of open descriptors.
    pub fn open_descriptors(&self) -> usize {
        self.descriptors.len()
    }

    pub(crate) fn dup(&mut self, fd: i32) -> Outcome<i32> {
        let id = self.id(fd)?;
        self.file(id).ok_or(libc::EBADF)?.descriptors += 1;
        Ok(self.descriptor_of(id))
    }

    pub(crate) fn close(&mut self, fd: i32) -> Outcome {
        let id = self.descriptors.remove(&fd).ok_or(libc::EBADF)?;
        let Some(file) = self.file(id) else {
            return Err(libc::EBADF);
        };
        file.descriptors -= 1;
        file.watchers.retain(|(_, watched)| *watched != fd);
        if file.descriptors == 0 {
            self.release(id);
        }
        Ok(0)
    }

    fn release(&mut self, id: FileId) {
        match self.file(id).map(|file| &mut file.kind) {
            Some(Kind::Tcp(_)) => self.close_tcp(id),
            Some(Kind::Listener(_)) => self.close_listener(id),
            Some(Kind::Udp(udp)) => {
                if let Some(local) = udp.local
                    && let Some(group) = self.udp.get_mut(&local)
                {
                    group.retain(|it| *it != id);
                    if group.is_empty() {
                        self.udp.remove(&local);
                    }
                }
                self.files[id] = None;
            }
            _ => self.files[id] = None,
        }
    }

    // Events and epoll.

    pub(crate) fn eventfd(&mut self) -> i32 {
        self.open(Kind::Event(0))
    }

    pub(crate) fn epoll_create(&mut self) -> i32 {
        let fd = self.open(Kind::Epoll(Epoll::default()));
        self.last_epoll = self.files.len() - 1;
        fd
    }

    /// Returns the epoll instance that was created last.
    pub(crate) fn last_epoll(&self) -> FileId {
        self.last_epoll
    }

    /// Whether an epoll instance has something to report.
    pub(crate) fn has_news(&self, epoll: FileId) -> bool {
        match self.files.get(epoll) {
            Some(Some(File {
                kind: Kind::Epoll(epoll),
                ..
            })) => epoll.has_news(),
            _ => false,
        }
    }

    pub(crate) fn epoll_ctl(
        &mut self,
        epoll: i32,
        operation: i32,
        fd: i32,
        interest: (u32, u64),
    ) -> Outcome {
        let epoll_id = self.id(epoll)?;
        if !Self::owns(fd) {
            // The real kernel's: never ready here.
            return Ok(0);
        }
        let id = self.id(fd)?;
        let watchers = &mut self.file(id).ok_or(libc::EBADF)?.watchers;
        watchers.retain(|it| *it != (epoll_id, fd));
        let is_removal = operation == libc::EPOLL_CTL_DEL;
        if !is_removal {
            watchers.push((epoll_id, fd));
        }
        let Kind::Epoll(epoll) = self.kind(epoll)? else {
            return Err(libc::EINVAL);
        };
        match is_removal {
            true if !epoll.remove(fd) => Err(libc::ENOENT),
            true => Ok(0),
            false => {
                epoll.set(fd, interest.0, interest.1);
                Ok(0)
            }
        }
    }

    /// Fetches up to `most` events: flags and data of each.
    pub(crate) fn epoll_take(&mut self, epoll: i32, most: usize) -> Outcome<Vec<(u32, u64)>> {
        let mut events = Vec::new();
        while events.len() < most {
            let Kind::Epoll(instance) = self.kind(epoll)? else {
                return Err(libc::EINVAL);
            };
            let Some((fd, wanted, data)) = instance.next() else {
                break;
            };
            let always = (libc::EPOLLERR | libc::EPOLLHUP) as u32;
            let ready = self.readiness(fd) & (wanted | always);
            if ready != 0 {
                events.push((ready, data));
            }
        }
        Ok(events)
    }

    /// Returns the epoll flags that hold for a descriptor now.
    pub(crate) fn readiness(&mut self, fd: i32) -> u32 {
        let window = self.window;
        let Ok(kind) = self.kind(fd) else {
            return libc::EPOLLHUP as u32;
        };
        let flags = match kind {
            Kind::Event(count) if *count > 0 => libc::EPOLLIN | libc::EPOLLOUT,
            Kind::Event(_) => libc::EPOLLOUT,
            Kind::Udp(udp) if udp.queue.is_empty() => libc::EPOLLOUT,
            Kind::Udp(_) => libc::EPOLLIN | libc::EPOLLOUT,
            Kind::Listener(listener) if listener.has_waiting() => libc::EPOLLIN,
            Kind::Tcp(tcp) => tcp.readiness(window),
            Kind::Listener(_) | Kind::Epoll(_) => 0,
            // tcp_poll of a closed socket.
            Kind::Fresh(_) => libc::EPOLLOUT | libc::EPOLLHUP,
        };
        flags as u32
    }

    /// Tells the watchers of a file that its readiness may have changed.
    fn notify(&mut self, id: FileId) {
        let watchers = match self.file(id) {
            Some(file) => file.watchers.clone(),
            None => return,
        };
        for (epoll, fd) in watchers {
            if let Some(File {
                kind: Kind::Epoll(epoll),
                ..
            }) = self.file(epoll)
            {
                epoll.note(fd);
            }
        }
    }

    // UDP.

    fn arrive(&mut self, mut packet: Packet) {
        if !packet.to.ip().is_loopback()
            && let Some(host) = self.host_of(*packet.to.ip())
        {
            let mapping = self.hosts[host].mapping;
            packet.to.set_port(packet.to.port().wrapping_sub(mapping));
        }
        let size = packet.bytes.len();
        let ports = [u64::from(packet.from.port()), u64::from(packet.to.port())];
        let address = u64::from(packet.to.ip().to_bits());
        self.note(&[1, address, ports[0], ports[1], size as u64]);
        let Some(id) = self.receiver(&packet) else {
            return;
        };
        if let Some(File {
            kind: Kind::Udp(udp),
            ..
        }) = self.file(id)
        {
            if udp.bytes + size > RECEIVE_BUFFER {
                return;
            }
            udp.bytes += size;
            udp.queue.push_back(packet);
            self.notify(id);
        }
    }

    /// Returns the socket that a packet is for.
    fn receiver(&mut self, packet: &Packet) -> Option<FileId> {
        let exact = self.udp.get(&packet.to);
        let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, packet.to.port());
        let host = self.host_of(*packet.to.ip())?;
        let is_there = |id: &FileId| match &self.files[*id] {
            Some(File {
                kind: Kind::Udp(udp),
                ..
            }) => udp.host == host,
            _ => false,
        };
        let group = exact.or_else(|| self.udp.get(&any))?;
        let group: Vec<_> = group.iter().copied().filter(is_there).collect();
        let first = *group.first()?;
        let Some(File {
            kind: Kind::Udp(udp),
            ..
        }) = &self.files[first]
        else {
            return None;
        };
        let chosen = filter::run(&udp.program, &packet.bytes) as usize;
        Some(group.get(chosen).copied().unwrap_or(first))
    }

    /// Sends datagrams of `segment` bytes each, the last of which may be shorter.
    pub(crate) fn send_datagrams(
        &mut self,
        fd: i32,
        to: SocketAddrV4,
        bytes: &[u8],
        segment: usize,
        ecn: u8,
    ) -> Outcome {
        let id = self.id(fd)?;
        self.bind_udp(id, None)?;
        let Kind::Udp(udp) = self.kind(fd)? else {
            return Err(libc::EINVAL);
        };
        let (host, local) = (udp.host, udp.local.ok_or(libc::EINVAL)?);
        let is_loopback = to.ip().is_loopback();
        let source = match local.ip().is_unspecified() {
            true if is_loopback => Ipv4Addr::LOCALHOST,
            true => self.hosts[host].address,
            false => *local.ip(),
        };
        let mapping = match is_loopback {
            true => 0,
            false => self.hosts[host].mapping,
        };
        let from = SocketAddrV4::new(source, local.port().wrapping_add(mapping));
        for part in bytes.chunks(segment.max(1)) {
            let packet = Packet {
                from,
                to,
                ecn,
                bytes: part.to_vec(),
            };
            if is_loopback {
                self.arrive(packet);
                continue;
            }
            self.note(&[2, u64::from(to.ip().to_bits()), part.len() as u64]);
            let Some(receiver) = self.host_of(*to.ip()) else {
                continue;
            };
            let (now, mut random) = (self.now, self.random);
            let mut arrivals = Vec::new();
            let link = self.link(host, receiver);
            link.carry(packet, now, &mut random, |at, packet| {
                arrivals.push((at, packet));
            });
            self.random = random;
            for (at, packet) in arrivals {
                self.schedule(at, Event::Packet(packet));
            }
        }
        Ok(bytes.len())
    }

    /// Takes a datagram: its source, its destination, its ECN mark and its bytes.
    pub(crate) fn receive_datagram(
        &mut self,
        fd: i32,
    ) -> Outcome<(SocketAddrV4, Ipv4Addr, u8, Vec<u8>)> {
        let Kind::Udp(udp) = self.kind(fd)? else {
            return Err(libc::EINVAL);
        };
        let packet = udp.queue.pop_front().ok_or(libc::EAGAIN)?;
        udp.bytes -= packet.bytes.len();
        Ok((packet.from, *packet.to.ip(), packet.ecn, packet.bytes))
    }
}

/// Whether events are printed.
pub static TRACE: AtomicBool = AtomicBool::new(false);
