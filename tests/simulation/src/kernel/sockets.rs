//! Calls that every kind of socket has: open, bind, names, options.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};

use super::filter::Instruction;
use super::{EPHEMERAL, FileId, Kernel, Kind, Outcome, Udp};

impl Kernel {
    /// Opens a UDP socket.
    pub fn udp_socket(&mut self) -> i32 {
        let host = self.current;
        self.open(Kind::Udp(Udp {
            host,
            local: None,
            is_shared: false,
            program: Vec::new(),
            queue: VecDeque::new(),
            bytes: 0,
        }))
    }

    /// Binds a socket.
    pub fn bind(&mut self, fd: i32, at: SocketAddrV4) -> Outcome {
        let id = self.id(fd)?;
        match self.kind(fd)? {
            Kind::Udp(_) => self.bind_udp(id, Some(at)),
            Kind::Fresh(fresh) => {
                let host = fresh.host;
                self.check_address(host, at)?;
                let at = match at.port() {
                    0 => SocketAddrV4::new(*at.ip(), self.next_port(host)),
                    _ if self.is_taken(host, at) => return Err(libc::EADDRINUSE),
                    _ => at,
                };
                if let Kind::Fresh(fresh) = self.kind(fd)? {
                    fresh.local = Some(at);
                }
                Ok(0)
            }
            _ => Err(libc::EINVAL),
        }
    }

    fn check_address(&self, host: usize, at: SocketAddrV4) -> Outcome<()> {
        let ip = *at.ip();
        let is_own = ip.is_unspecified() || ip.is_loopback() || self.hosts[host].address == ip;
        if is_own {
            Ok(())
        } else {
            Err(libc::EADDRNOTAVAIL)
        }
    }

    pub(super) fn next_port(&mut self, host: usize) -> u16 {
        let port = self.hosts[host].next_port;
        self.hosts[host].next_port = port.checked_add(1).unwrap_or(EPHEMERAL);
        port
    }

    /// Binds a UDP socket, to any port without `at`. Without effect on one that is bound.
    pub(super) fn bind_udp(&mut self, id: FileId, at: Option<SocketAddrV4>) -> Outcome {
        let Some(Kind::Udp(udp)) = self.file(id).map(|file| &mut file.kind) else {
            return Err(libc::EINVAL);
        };
        if udp.local.is_some() {
            return if at.is_some() {
                Err(libc::EINVAL)
            } else {
                Ok(0)
            };
        }
        let (host, is_shared) = (udp.host, udp.is_shared);
        let at = at.unwrap_or(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
        self.check_address(host, at)?;
        let port = match at.port() {
            0 => self.next_port(host),
            port => port,
        };
        // All hosts share the table, so an unspecified address stands for the host's own.
        let ip = match *at.ip() {
            ip if ip.is_unspecified() => self.hosts[host].address,
            ip => ip,
        };
        let local = SocketAddrV4::new(ip, port);
        let others = self.udp.get(&local).cloned().unwrap_or_default();
        let may_share = |id: &FileId| match &self.files[*id] {
            Some(file) => match &file.kind {
                Kind::Udp(udp) => udp.is_shared && is_shared || udp.host != host,
                _ => true,
            },
            None => true,
        };
        if !others.iter().all(may_share) {
            return Err(libc::EADDRINUSE);
        }
        self.udp.entry(local).or_default().push(id);
        if let Some(Kind::Udp(udp)) = self.file(id).map(|file| &mut file.kind) {
            udp.local = Some(local);
        }
        Ok(0)
    }

    /// Returns the local address.
    pub fn local(&mut self, fd: i32) -> Outcome<SocketAddrV4> {
        let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
        Ok(match self.kind(fd)? {
            Kind::Udp(udp) => udp.local.unwrap_or(any),
            Kind::Fresh(fresh) => fresh.local.unwrap_or(any),
            Kind::Listener(listener) => listener.local,
            Kind::Tcp(tcp) => tcp.local,
            _ => return Err(libc::ENOTSOCK),
        })
    }

    /// Returns the remote address.
    pub fn remote(&mut self, fd: i32) -> Outcome<SocketAddrV4> {
        match self.kind(fd)? {
            Kind::Tcp(tcp) => Ok(tcp.remote),
            _ => Err(libc::ENOTCONN),
        }
    }

    /// Whether a socket is one of UDP.
    pub(crate) fn is_udp(&mut self, fd: i32) -> bool {
        matches!(self.kind(fd), Ok(Kind::Udp(_)))
    }

    /// Lets a port be shared.
    pub(crate) fn share_port(&mut self, fd: i32) -> Outcome {
        if let Kind::Udp(udp) = self.kind(fd)? {
            udp.is_shared = true;
        }
        Ok(0)
    }

    /// Sets the program that chooses among sockets of one port.
    pub(crate) fn steer(&mut self, fd: i32, program: Vec<Instruction>) -> Outcome {
        if let Kind::Udp(udp) = self.kind(fd)? {
            udp.program = program;
        }
        Ok(0)
    }

    /// Takes the pending error of a socket.
    pub(crate) fn take_error(&mut self, fd: i32) -> Outcome<i32> {
        Ok(match self.kind(fd)? {
            Kind::Tcp(tcp) => tcp.take_error(),
            _ => 0,
        })
    }

    /// Returns the number of bytes that the peer's kernel does not have (SIOCOUTQ).
    pub(crate) fn unsent(&mut self, fd: i32) -> usize {
        match self.kind(fd) {
            Ok(Kind::Tcp(tcp)) => tcp.unsent,
            _ => 0,
        }
    }

    /// Adds to the count of an event descriptor.
    pub(crate) fn event_add(&mut self, fd: i32, count: u64) -> Outcome {
        let id = self.id(fd)?;
        let Kind::Event(value) = self.kind(fd)? else {
            return Err(libc::EINVAL);
        };
        *value = value.saturating_add(count);
        self.notify(id);
        Ok(size_of::<u64>())
    }

    /// Takes the count of an event descriptor.
    pub(crate) fn event_take(&mut self, fd: i32) -> Outcome<u64> {
        let Kind::Event(value) = self.kind(fd)? else {
            return Err(libc::EINVAL);
        };
        match std::mem::take(value) {
            0 => Err(libc::EAGAIN),
            count => Ok(count),
        }
    }

    /// Whether a descriptor is an event descriptor.
    pub(crate) fn is_event(&mut self, fd: i32) -> bool {
        matches!(self.kind(fd), Ok(Kind::Event(_)))
    }
}
