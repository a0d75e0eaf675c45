//! Connections of the world: requests of clients, the ends at the targets, and the invariants of both.

use std::cmp::Reverse;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::PoisonError;

use anyhow::{Result, anyhow, bail, ensure};

use super::{Accepted, Connection, Request, SECOND, World};
use crate::endpoint::{End, Found, Seen, Stream};
use crate::interpose::kernel;
use crate::topology::CAPTURE_PORT;

impl World {
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

    /// Checks that a request has succeeded in both directions: everything arrived, and both ends were
    /// orderly.
    ///
    /// # Errors
    /// The ends of the connection.
    pub fn check_succeeded(&self, id: usize) -> Result<()> {
        let Connection { client, target, .. } = &self.connections[id];
        let target = target.map(|at| &self.accepted[at].end);
        let is_whole = target.is_some_and(|target| {
            let received = (client.received, target.received);
            let ends = [client, target].iter().all(|end| end.has_succeeded());
            ends && received == (target.sent, client.sent)
        });
        ensure!(
            is_whole,
            "request {id} has not succeeded: {client:?}, {target:?}"
        );
        Ok(())
    }

    pub(super) fn poll_client(&mut self, id: usize) -> Result<()> {
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
    pub(super) fn check_deadline(&mut self, id: usize, now: u64) -> Result<()> {
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

    pub(super) fn accept(&mut self, listener: i32, host: usize) -> Result<()> {
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

    pub(super) fn poll_accepted(&mut self, at: usize) -> Result<()> {
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
}
