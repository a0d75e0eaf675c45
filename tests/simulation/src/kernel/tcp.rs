//! TCP connections: both ends in one kernel, bytes in order, windows, orderly ends and resets as Linux
//! has them.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};

use super::{Event, File, FileId, Fresh, Kernel, Kind, Outcome};

/// A listening socket.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) host: usize,
    pub(super) local: SocketAddrV4,
    pub(super) is_reset_on_close: bool,
    waiting: VecDeque<FileId>,
}

impl Listener {
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Tcp {
    pub(super) host: usize,
    pub(super) local: SocketAddrV4,
    pub(super) remote: SocketAddrV4,
    peer: Option<FileId>,
    is_connected: bool,
    received: VecDeque<u8>,
    /// Bytes of ours that the peer's program has not read.
    outstanding: usize,
    /// Bytes of ours that the peer's kernel does not have.
    pub(super) unsent: usize,
    /// Time of the last scheduled arrival at the peer.
    last_arrival: u64,
    /// A write found no room.
    is_blocked: bool,
    has_finished: bool,
    /// The peer's end of file has arrived.
    is_ended: bool,
    /// The connection is reset.
    is_reset: bool,
    error: Option<i32>,
    pub(super) is_reset_on_close: bool,
    /// No descriptor refers to it.
    is_closed: bool,
}

/// Arrival at an end.
#[derive(Debug)]
pub(super) enum Arrival {
    Established,
    Failed(i32),
    Bytes(Vec<u8>),
    Finish,
    Reset,
}

impl Tcp {
    fn new(host: usize, local: SocketAddrV4, remote: SocketAddrV4) -> Self {
        Self {
            host,
            local,
            remote,
            peer: None,
            is_connected: false,
            received: VecDeque::new(),
            outstanding: 0,
            unsent: 0,
            last_arrival: 0,
            is_blocked: false,
            has_finished: false,
            is_ended: false,
            is_reset: false,
            error: None,
            is_reset_on_close: false,
            is_closed: false,
        }
    }

    pub(super) fn readiness(&self, window: usize) -> i32 {
        let mut flags = 0;
        if !self.is_connected && !self.is_reset {
            return 0;
        }
        if !self.received.is_empty() || self.is_ended || self.is_reset {
            flags |= libc::EPOLLIN;
        }
        if self.is_ended || self.is_reset {
            flags |= libc::EPOLLRDHUP;
        }
        if self.is_reset || self.has_finished || self.outstanding < window {
            flags |= libc::EPOLLOUT;
        }
        if self.error.is_some() {
            flags |= libc::EPOLLERR;
        }
        if self.is_reset || (self.is_ended && self.has_finished) {
            flags |= libc::EPOLLHUP;
        }
        flags
    }

    fn reset(&mut self, error: i32) {
        self.is_reset = true;
        self.error = Some(error);
    }

    /// Takes the pending error (SO_ERROR).
    pub(super) fn take_error(&mut self) -> i32 {
        self.error.take().unwrap_or(0)
    }
}

impl Kernel {
    fn tcp(&mut self, id: FileId) -> Option<&mut Tcp> {
        match self.file(id) {
            Some(File {
                kind: Kind::Tcp(tcp),
                ..
            }) => Some(tcp),
            _ => None,
        }
    }

    fn tcp_of(&mut self, fd: i32) -> Outcome<(FileId, &mut Tcp)> {
        let id = self.id(fd)?;
        self.tcp(id).map(|tcp| (id, tcp)).ok_or(libc::ENOTCONN)
    }

    /// Opens a TCP socket.
    pub fn tcp_socket(&mut self) -> i32 {
        let host = self.current;
        self.open(Kind::Fresh(Fresh {
            host,
            local: None,
            is_reset_on_close: false,
        }))
    }

    /// Listens.
    pub fn listen(&mut self, fd: i32) -> Outcome {
        let id = self.id(fd)?;
        let Kind::Fresh(fresh) = self.kind(fd)? else {
            return Err(libc::EINVAL);
        };
        let local = fresh.local.ok_or(libc::EINVAL)?;
        let (host, is_reset_on_close) = (fresh.host, fresh.is_reset_on_close);
        *self.kind(fd)? = Kind::Listener(Listener {
            host,
            local,
            is_reset_on_close,
            waiting: VecDeque::new(),
        });
        let address = self.address_of(host, local);
        self.listeners.insert(address, id);
        Ok(0)
    }

    /// The key of a listener: hosts share neither the loopback nor the unspecified address.
    fn address_of(&self, host: usize, at: SocketAddrV4) -> SocketAddrV4 {
        let ip = match *at.ip() {
            ip if ip.is_unspecified() => self.hosts[host].address,
            ip if ip.is_loopback() => Ipv4Addr::from_bits(0x7f00_0000 + host as u32),
            ip => ip,
        };
        SocketAddrV4::new(ip, at.port())
    }

    fn listener_at(&self, host: usize, to: SocketAddrV4) -> Option<FileId> {
        let key = self.address_of(host, to);
        let own = SocketAddrV4::new(self.hosts.get(host)?.address, to.port());
        let found = self.listeners.get(&key).or_else(|| {
            let is_local = to.ip().is_loopback();
            is_local.then(|| self.listeners.get(&own)).flatten()
        });
        found.copied()
    }

    /// Whether a listener has that address.
    pub(super) fn is_taken(&self, host: usize, at: SocketAddrV4) -> bool {
        self.listeners.contains_key(&self.address_of(host, at))
    }

    /// Starts to connect: EINPROGRESS.
    pub fn connect(&mut self, fd: i32, to: SocketAddrV4) -> Outcome {
        let id = self.id(fd)?;
        let Kind::Fresh(fresh) = self.kind(fd)? else {
            return Err(libc::EISCONN);
        };
        let (host, local) = (fresh.host, fresh.local);
        let is_reset_on_close = fresh.is_reset_on_close;
        let is_loopback = to.ip().is_loopback();
        let own = match is_loopback {
            true => Ipv4Addr::LOCALHOST,
            false => self.hosts[host].address,
        };
        let local = match local {
            Some(local) if !local.ip().is_unspecified() => local,
            _ => SocketAddrV4::new(own, self.next_port(host)),
        };
        let mut tcp = Tcp::new(host, local, to);
        tcp.is_reset_on_close = is_reset_on_close;
        *self.kind(fd)? = Kind::Tcp(tcp);
        let delay = if is_loopback { 0 } else { self.tcp_delay };
        let event = Event::Connect { client: id, to };
        self.schedule(self.now + delay, event);
        Err(libc::EINPROGRESS)
    }

    pub(super) fn connect_arrives(&mut self, client: FileId, to: SocketAddrV4) {
        let delay = self.delay_to(client);
        let Some(end) = self.tcp(client).filter(|tcp| !tcp.is_closed) else {
            return;
        };
        let (host, from) = (end.host, end.local);
        self.note(&[3, u64::from(to.ip().to_bits()), u64::from(to.port())]);
        if self.silent.contains(to.ip()) {
            return;
        }
        let host = match to.ip().is_loopback() {
            true => Some(host),
            false => self.hosts.iter().position(|it| it.address == *to.ip()),
        };
        let at = self.now + delay;
        let Some(host) = host else {
            let failed = Arrival::Failed(libc::EHOSTUNREACH);
            return self.schedule(at, Event::Tcp(client, failed));
        };
        let listener = self.listener_at(host, to);
        let Some(listener) = listener else {
            let failed = Arrival::Failed(libc::ECONNREFUSED);
            return self.schedule(at, Event::Tcp(client, failed));
        };
        let mut tcp = Tcp::new(host, to, from);
        tcp.peer = Some(client);
        tcp.is_connected = true;
        self.files.push(Some(File {
            kind: Kind::Tcp(tcp),
            descriptors: 0,
            watchers: Vec::new(),
        }));
        let accepted = self.files.len() - 1;
        if let Some(end) = self.tcp(client) {
            end.peer = Some(accepted);
            end.last_arrival = at;
        }
        if let Some(File {
            kind: Kind::Listener(listener),
            ..
        }) = self.file(listener)
        {
            let is_reset_on_close = listener.is_reset_on_close;
            listener.waiting.push_back(accepted);
            if let Some(end) = self.tcp(accepted) {
                end.is_reset_on_close = is_reset_on_close;
                end.last_arrival = at;
            }
        }
        self.notify(listener);
        self.schedule(at, Event::Tcp(client, Arrival::Established));
    }

    /// Accepts a connection. Returns it with its remote address.
    pub fn accept(&mut self, fd: i32) -> Outcome<(i32, SocketAddrV4)> {
        let Kind::Listener(listener) = self.kind(fd)? else {
            return Err(libc::EINVAL);
        };
        let accepted = listener.waiting.pop_front().ok_or(libc::EAGAIN)?;
        let tcp = self.tcp(accepted).ok_or(libc::ECONNABORTED)?;
        let remote = tcp.remote;
        if let Some(file) = self.file(accepted) {
            file.descriptors = 1;
        }
        Ok((self.descriptor_of(accepted), remote))
    }

    pub(super) fn close_listener(&mut self, id: FileId) {
        let Some(File {
            kind: Kind::Listener(listener),
            ..
        }) = self.file(id)
        else {
            return;
        };
        let waiting = std::mem::take(&mut listener.waiting);
        let (host, local) = (listener.host, listener.local);
        let address = self.address_of(host, local);
        self.listeners.remove(&address);
        for end in waiting {
            self.send_to_peer(end, Arrival::Reset);
            self.files[end] = None;
        }
        self.files[id] = None;
    }

    fn delay_to(&mut self, id: FileId) -> u64 {
        let delay = self.tcp_delay;
        let is_local = self
            .tcp(id)
            .is_some_and(|tcp| tcp.remote.ip().is_loopback());
        if is_local { 0 } else { delay }
    }

    fn send_to_peer(&mut self, id: FileId, arrival: Arrival) {
        let delay = self.delay_to(id);
        let now = self.now;
        if let Some(tcp) = self.tcp(id)
            && let Some(peer) = tcp.peer
        {
            // Loopback takes some time too: else two programs could answer each other while the clock
            // stands still.
            let at = tcp.last_arrival.max(now + delay + 1_000);
            tcp.last_arrival = at;
            self.schedule(at, Event::Tcp(peer, arrival));
        }
    }

    pub(super) fn tcp_arrives(&mut self, id: FileId, arrival: Arrival) {
        let Some(tcp) = self.tcp(id) else {
            return;
        };
        let (local, remote) = (tcp.local, tcp.remote);
        let what = match &arrival {
            Arrival::Established => 0,
            Arrival::Failed(error) => 100 + *error as u64,
            Arrival::Bytes(bytes) => 1000 + bytes.len() as u64,
            Arrival::Finish => 1,
            Arrival::Reset => 2,
        };
        let (at, from) = (u64::from(local.port()), u64::from(remote.port()));
        self.note(&[4, u64::from(local.ip().to_bits()), at, from, what]);
        let Some(tcp) = self.tcp(id) else {
            return;
        };
        let is_gone = tcp.is_closed || tcp.is_reset;
        match arrival {
            Arrival::Established => tcp.is_connected = true,
            Arrival::Failed(error) => {
                tcp.reset(error);
                tcp.peer = None;
            }
            Arrival::Bytes(bytes) => {
                let len = bytes.len();
                if is_gone {
                    // RFC 9293 section 3.10.7.1: data for a closed connection is answered by a reset.
                    if tcp.is_closed {
                        self.send_to_peer(id, Arrival::Reset);
                        self.forget(id);
                    }
                    return;
                }
                tcp.received.extend(bytes);
                let peer = tcp.peer;
                if let Some(peer) = peer.and_then(|peer| self.tcp(peer)) {
                    peer.unsent = peer.unsent.saturating_sub(len);
                }
            }
            Arrival::Finish if is_gone => {
                if self.tcp(id).is_some_and(|tcp| tcp.is_closed) {
                    self.forget(id);
                }
                return;
            }
            Arrival::Finish => tcp.is_ended = true,
            Arrival::Reset => {
                // tcp_reset: EPIPE where the peer had ended its half before.
                let error = if tcp.is_ended {
                    libc::EPIPE
                } else {
                    libc::ECONNRESET
                };
                if !is_gone {
                    tcp.reset(error);
                }
                tcp.peer = None;
                if tcp.is_closed {
                    self.files[id] = None;
                    return;
                }
            }
        }
        self.notify(id);
    }

    /// Removes an end, which its peer then has no more.
    fn forget(&mut self, id: FileId) {
        let peer = self.tcp(id).and_then(|tcp| tcp.peer);
        if let Some(peer) = peer.and_then(|peer| self.tcp(peer)) {
            peer.peer = None;
        }
        self.files[id] = None;
    }

    pub(super) fn close_tcp(&mut self, id: FileId) {
        let Some(tcp) = self.tcp(id) else {
            return;
        };
        tcp.is_closed = true;
        // One that still connects answers the SYN-ACK by a reset.
        let is_abort = tcp.is_reset_on_close || !tcp.received.is_empty() || !tcp.is_connected;
        tcp.received.clear();
        match tcp {
            tcp if tcp.peer.is_none() && tcp.is_connected || tcp.is_reset => self.files[id] = None,
            _ if is_abort => {
                self.send_to_peer(id, Arrival::Reset);
                self.forget(id);
            }
            tcp => {
                let has_finished = std::mem::replace(&mut tcp.has_finished, true);
                let is_over = tcp.is_ended;
                if !has_finished {
                    self.send_to_peer(id, Arrival::Finish);
                }
                if is_over {
                    self.files[id] = None;
                }
            }
        }
    }

    /// Reads up to `most` bytes; none is the end of file.
    pub fn recv(&mut self, fd: i32, most: usize) -> Outcome<Vec<u8>> {
        let window = self.window;
        let (_, tcp) = self.tcp_of(fd)?;
        if tcp.received.is_empty() {
            return match tcp.error.take() {
                Some(error) => Err(error),
                None if tcp.is_ended || tcp.is_reset => Ok(Vec::new()),
                None if !tcp.is_connected => Err(libc::EAGAIN),
                None => Err(libc::EAGAIN),
            };
        }
        let len = most.min(tcp.received.len());
        let (first, second) = tcp.received.as_slices();
        let mut bytes = first[..len.min(first.len())].to_vec();
        bytes.extend_from_slice(&second[..len - bytes.len()]);
        tcp.received.drain(..len);
        if let Some(peer) = tcp.peer
            && let Some(sender) = self.tcp(peer)
        {
            sender.outstanding = sender.outstanding.saturating_sub(len);
            // sk_stream_is_writeable: a third of the room has to be free.
            if sender.is_blocked && sender.outstanding <= window / 3 * 2 {
                sender.is_blocked = false;
                self.notify(peer);
            }
        }
        Ok(bytes)
    }

    /// Writes as much as there is room for.
    pub fn send(&mut self, fd: i32, bytes: &[u8]) -> Outcome {
        let window = self.window;
        let (id, tcp) = self.tcp_of(fd)?;
        if let Some(error) = tcp.error.take() {
            return Err(error);
        }
        if tcp.is_reset || tcp.has_finished {
            return Err(libc::EPIPE);
        }
        if !tcp.is_connected {
            return Err(libc::EAGAIN);
        }
        let room = window.saturating_sub(tcp.outstanding);
        if room == 0 && !bytes.is_empty() {
            tcp.is_blocked = true;
            return Err(libc::EAGAIN);
        }
        let len = room.min(bytes.len());
        if len < bytes.len() {
            tcp.is_blocked = true;
        }
        tcp.outstanding += len;
        tcp.unsent += len;
        if len > 0 {
            self.send_to_peer(id, Arrival::Bytes(bytes[..len].to_vec()));
        }
        Ok(len)
    }

    /// Ends the sending half, for `SHUT_WR` and `SHUT_RDWR`.
    pub fn shutdown(&mut self, fd: i32, how: i32) -> Outcome {
        if how == libc::SHUT_RD {
            return Ok(0);
        }
        let (id, tcp) = self.tcp_of(fd)?;
        if tcp.is_reset || !tcp.is_connected {
            return Err(libc::ENOTCONN);
        }
        if !std::mem::replace(&mut tcp.has_finished, true) {
            self.send_to_peer(id, Arrival::Finish);
            if self.tcp(id).is_some_and(|tcp| tcp.is_ended) {
                self.notify(id);
            }
        }
        Ok(0)
    }

    /// Sets whether closing resets the connection.
    pub fn set_reset_on_close(&mut self, fd: i32, reset: bool) -> Outcome {
        match self.kind(fd)? {
            Kind::Tcp(tcp) => tcp.is_reset_on_close = reset,
            Kind::Listener(listener) => listener.is_reset_on_close = reset,
            Kind::Fresh(fresh) => fresh.is_reset_on_close = reset,
            _ => {}
        }
        Ok(0)
    }
}
