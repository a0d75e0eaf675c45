//! The keeper: one thread that waits for its clients and for the deaths of owners.
//!
//! [`sets`](crate::sets) decides, [`requests`](crate::requests) answers; this file waits and accepts.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use prost::bytes::Bytes;
use sd_notify::NotifyState;
use socket2::Socket;

use crate::connection::{Connection, ConnectionId, MAX_CONNECTIONS, Phase};
use crate::error::KeeperError;
use crate::filter;
use crate::listener;
use crate::owner::{Owner, check};
use crate::sets::{SetId, Sets};
use cpc_host::report::report;
use cpc_host::{descriptors, lifecycle};

/// Pause after a failed accept.
const REST: Duration = Duration::from_secs(1);

/// Minimum time between two warnings of one kind.
const QUIET: Duration = Duration::from_secs(10);

/// Descriptors that no kept socket takes: a full keeper still has some to give its sockets away.
const RESERVE: usize = 128;

/// A keeper.
#[derive(Debug)]
pub struct Service {
    listener: Socket,
    path: PathBuf,
    /// Maximum number of kept sockets.
    pub(crate) room: usize,
}

impl Service {
    /// Opens the socket at `path`, whose directory exists. Replaces the socket of a dead keeper. The keeper has room
    /// for as many sockets as `RLIMIT_NOFILE` allows now, but for 128.
    ///
    /// # Errors
    /// [`KeeperError::Bind`], [`KeeperError::Busy`], [`KeeperError::NotASocket`].
    pub fn open(path: &Path) -> Result<Self, KeeperError> {
        Ok(Self {
            listener: listener::open(path)?,
            path: path.to_owned(),
            room: descriptors::limit().saturating_sub(RESERVE),
        })
    }

    /// Serves until `stop` is readable. All kept sockets are then closed. The file of the socket stays: the next
    /// keeper replaces it.
    ///
    /// Restricts all threads of this process to the system calls of a keeper, where the kernel can. None of them opens
    /// a file or starts a thread any more, also after the return.
    ///
    /// # Errors
    /// [`KeeperError::Wait`].
    pub fn run(self, stop: BorrowedFd<'_>) -> Result<(), KeeperError> {
        tracing::info!(path = %self.path.display(), room = self.room, "the keeper listens");
        // The last call that needs a new socket.
        lifecycle::notify(&[NotifyState::Ready]);
        filter::confine();
        self.serve(stop)
    }

    /// Serves as [`run`](Self::run) does, and restricts nothing.
    ///
    /// # Errors
    /// [`KeeperError::Wait`].
    pub(crate) fn serve(self, stop: BorrowedFd<'_>) -> Result<(), KeeperError> {
        let mut driver = Driver::new(self.room);
        loop {
            let ready = driver.wait(stop, &self.listener)?;
            let now = Instant::now();
            if ready.is_stopped {
                let (sets, sockets) = (driver.sets.iter().count(), driver.kept());
                tracing::info!(sets, sockets, "the keeper ends: it closes everything");
                return Ok(());
            }
            for (id, events) in ready.connections {
                driver.serve(id, events, now);
            }
            if ready.is_called {
                driver.accept(&self.listener, now);
            }
            // Requests first: a client is not late where the keeper was.
            driver.settle(now);
        }
    }
}

/// Contents of a set.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) process: Bytes,
    pub(crate) owner: Owner,
    pub(crate) table: OwnedFd,
    /// Descriptions and sockets, by slot.
    pub(crate) kept: BTreeMap<u32, (Bytes, OwnedFd)>,
}

/// State of a keeper.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) sets: Sets<Contents>,
    pub(crate) connections: BTreeMap<ConnectionId, Connection>,
    /// Maximum number of kept sockets.
    pub(crate) room: usize,
    pub(crate) refusals: Warning,
    pub(crate) losses: Warning,
    next: ConnectionId,
    /// End of the pause after a failed accept.
    rest: Option<Instant>,
}

/// Outcome of a wait.
struct Ready {
    is_stopped: bool,
    is_called: bool,
    connections: Vec<(ConnectionId, PollFlags)>,
}

impl Driver {
    pub(crate) fn new(room: usize) -> Self {
        Self {
            sets: Sets::default(),
            connections: BTreeMap::new(),
            room,
            refusals: Warning::default(),
            losses: Warning::default(),
            next: 0,
            rest: None,
        }
    }

    /// Returns the number of kept sockets.
    pub(crate) fn kept(&self) -> usize {
        self.sets
            .iter()
            .map(|(_, set)| set.contents.kept.len())
            .sum()
    }

    /// Does everything that is due: deaths, expiries, timeouts and delayed answers.
    pub(crate) fn settle(&mut self, now: Instant) {
        self.look_for_deaths(now);
        for set in self.sets.expire(now) {
            tracing::warn!(
                role = set.role,
                sockets = set.contents.kept.len(),
                is_dead = set.is_dead(),
                "no process took the sockets in time: the keeper closes them"
            );
        }
        if self.rest.is_some_and(|it| it <= now) {
            self.rest = None;
        }
        let ids: Vec<_> = self.connections.keys().copied().collect();
        for id in ids {
            let phase = self.connections.get(&id).map(|it| &it.phase);
            match phase {
                Some(Phase::Waiting { .. }) => self.answer_take(id, now),
                Some(phase) if phase.until().is_some_and(|it| it <= now) => {
                    tracing::debug!(?phase, "a client says nothing: its connection ends");
                    self.close(id, now);
                }
                _ => {}
            }
        }
    }

    /// Notes which owners are dead.
    pub(crate) fn look_for_deaths(&mut self, now: Instant) {
        let is_new = |(id, set): (SetId, &crate::sets::Set<Contents>)| {
            (!set.is_dead() && set.contents.owner.is_dead()).then_some(id)
        };
        let dead: Vec<_> = self.sets.iter().filter_map(is_new).collect();
        for id in dead {
            self.sets.die(id, now);
            self.log_death(id);
        }
    }

    /// Logs that an owner has died, once both its connection and its process are at their end.
    fn log_death(&self, id: SetId) {
        let Some(set) = self.sets.get(id) else {
            return;
        };
        if set.is_lost() && set.is_dead() {
            tracing::info!(
                role = set.role, sockets = set.contents.kept.len(), patience = ?set.patience(),
                "a process has died: its sockets wait for the next one"
            );
        }
    }

    /// Waits for an event, or for the next time at which something is due.
    fn wait(&self, stop: BorrowedFd<'_>, listener: &Socket) -> Result<Ready, KeeperError> {
        let due = self.connections.values().filter_map(|it| it.phase.until());
        let due = due.chain(self.sets.next_expiry()).chain(self.rest).min();
        let timeout = due.map_or(PollTimeout::NONE, |due| {
            // Rounded up, or the last millisecond would be busy.
            let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut polled = vec![PollFd::new(stop, PollFlags::POLLIN)];
        let accepts = match self.rest {
            None => PollFlags::POLLIN,
            Some(_) => PollFlags::empty(),
        };
        polled.push(PollFd::new(listener.as_fd(), accepts));
        for connection in self.connections.values() {
            polled.push(PollFd::new(
                connection.socket.as_fd(),
                connection.phase.events(),
            ));
        }
        for (_, set) in self.sets.iter() {
            // The pidfd of a dead process is always readable.
            let pidfd = set.contents.owner.pidfd();
            if let Some(pidfd) = pidfd.filter(|_| set.is_lost() && !set.is_dead()) {
                polled.push(PollFd::new(pidfd, PollFlags::POLLIN));
            }
        }
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(KeeperError::Wait(error.into())),
        }
        let mut events = polled
            .iter()
            .map(|it| it.revents().unwrap_or(PollFlags::empty()));
        let mut is_ready = || events.next().is_some_and(|it| !it.is_empty());
        let (is_stopped, is_called) = (is_ready(), is_ready());
        let connections = self.connections.keys().copied().zip(events);
        Ok(Ready {
            is_stopped,
            is_called: is_called && self.rest.is_none(),
            connections: connections.filter(|(_, it)| !it.is_empty()).collect(),
        })
    }

    /// Accepts the connections that wait, as many as there may be.
    fn accept(&mut self, listener: &Socket, now: Instant) {
        for _ in 0..MAX_CONNECTIONS {
            match listener.accept() {
                Ok((socket, _)) => self.greet(socket, now),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(error = report(&error), "a client can't be accepted");
                    self.rest = Some(now + REST);
                    return;
                }
            }
        }
    }

    pub(crate) fn greet(&mut self, socket: Socket, now: Instant) {
        let admitted = check(&socket).and_then(|()| match self.connections.len() {
            MAX_CONNECTIONS.. => Err(KeeperError::Refused("too many connections".to_owned())),
            _ => Ok(socket.set_nonblocking(true)?),
        });
        if let Err(error) = admitted {
            self.send_refusal(&socket, &report(&error), now);
            return;
        }
        let connection = Connection {
            owner: Some(Owner::of(&socket)),
            socket,
            phase: Phase::asking(now),
            given: Vec::new(),
        };
        self.connections.insert(self.next, connection);
        self.next += 1;
    }

    /// Ends a connection. Its set waits for the death of the process; a set that it was given is for the next one.
    pub(crate) fn close(&mut self, id: ConnectionId, now: Instant) {
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        let mut given = connection.given;
        match connection.phase {
            Phase::Owning(set) => {
                self.sets.lose(set, now);
                self.log_death(set);
            }
            Phase::Giving { set, .. } => given.push(set),
            Phase::Asking { .. } | Phase::Waiting { .. } | Phase::Discarded => {}
        }
        if !given.is_empty() {
            tracing::warn!("a process has not taken all sockets: they wait for the next one");
        }
        for set in given {
            self.sets.give_back(set);
        }
    }
}

/// A warning that a client could cause without end.
#[derive(Debug, Default)]
pub(crate) struct Warning {
    last: Option<Instant>,
    skipped: u64,
}

impl Warning {
    /// Returns whether to warn now: with the number of times since the last warning.
    pub(crate) fn due(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now < last + QUIET) {
            self.skipped += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.skipped) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_counted_and_rare() {
        let now = Instant::now();
        let mut warning = Warning::default();
        assert_eq!(warning.due(now), Some(1));
        assert_eq!(warning.due(now), None);
        assert_eq!(warning.due(now + QUIET / 2), None);
        assert_eq!(warning.due(now + QUIET), Some(3));
        assert_eq!(warning.due(now + QUIET * 2), Some(1));
    }
}
