//! Requests of clients, and the answers.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use socket2::Socket;
use tunnel_proto::keeper::answer::Kind as AnswerKind;
use tunnel_proto::keeper::request::Kind;
use tunnel_proto::keeper::{Answer, Done, Hello, Keep, Kept, Left, Nothing, Refused, Request};

use crate::connection::{ConnectionId, DYING, Phase, STALL};
use crate::error::KeeperError;
use crate::message::{Attached, MAX_DESCRIPTION, is_later, receive, send};
use crate::service::{Contents, Driver};
use crate::sets::Taken;
use crate::table::SLOTS;
use cpc_host::report::report;

/// Maximum number of messages from or to one connection before it is the turn of another.
const MESSAGES: usize = 64;

/// Maximum size of a role in bytes.
const MAX_ROLE: usize = 64;

/// Maximum size of an instance_id in bytes.
const MAX_PROCESS: usize = 256;

/// Pause while too many descriptors are in flight (`ETOOMANYREFS`, unix(7)).
const PAUSE: Duration = Duration::from_millis(1);

/// The reason why a client is refused.
type Reason = String;

impl Driver {
    /// Serves a connection for which there are `events`.
    pub(crate) fn serve(&mut self, id: ConnectionId, events: PollFlags, now: Instant) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        if !connection.phase.reads() {
            match events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
                true => self.close(id, now),
                false => self.give(id, now),
            }
            return;
        }
        for _ in 0..MESSAGES {
            let Some(connection) = self.connections.get(&id) else {
                return;
            };
            if !connection.phase.reads() {
                return;
            }
            let done = match receive::<Request>(&connection.socket) {
                Ok(Some(received)) => self.obey(id, received.message, received.descriptor, now),
                Ok(None) => return self.close(id, now),
                Err(KeeperError::Io(error)) if is_later(&error) => return,
                Err(KeeperError::Io(_)) => return self.close(id, now),
                Err(KeeperError::Malformed(why)) => Err(format!("a malformed message: {why}")),
                Err(error) => Err(format!("a malformed message: {}", report(&error))),
            };
            if let Err(reason) = done {
                return self.refuse(id, &reason, now);
            }
        }
    }

    fn obey(
        &mut self,
        id: ConnectionId,
        request: Request,
        descriptor: Attached,
        now: Instant,
    ) -> Result<(), Reason> {
        match request.kind {
            Some(Kind::Hello(hello)) => self.hello(id, hello, descriptor),
            Some(Kind::Keep(keep)) => self.keep(id, keep, descriptor, now),
            Some(Kind::Drop(drop)) => self.drop(id, drop.slot),
            Some(Kind::Discard(_)) => self.discard(id),
            Some(Kind::Take(take)) => self.take(id, take.role, now),
            Some(Kind::Confirm(_)) => self.confirm(id, now),
            None => Err("an unknown request".to_owned()),
        }
    }

    fn hello(
        &mut self,
        id: ConnectionId,
        hello: Hello,
        descriptor: Attached,
    ) -> Result<(), Reason> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        let (Phase::Asking { .. }, Some(owner)) = (&connection.phase, connection.owner.take())
        else {
            return Err("a second Hello".to_owned());
        };
        let owner = owner.map_err(|error| report(&error))?;
        if hello.role.is_empty() || hello.role.len() > MAX_ROLE || hello.process.len() > MAX_PROCESS
        {
            return Err("a role or a process of an invalid length".to_owned());
        }
        let table = match descriptor {
            Attached::One(table) => table,
            Attached::None => return Err("a Hello without a table".to_owned()),
            Attached::Lost => return Err("no descriptor is left: raise LimitNOFILE=".to_owned()),
        };
        let contents = Contents {
            process: hello.process,
            owner,
            table,
            kept: BTreeMap::new(),
        };
        let patience = Duration::from_millis(hello.patience_ms);
        let Some(set) = self.sets.add(hello.role, patience, contents) else {
            return Err("too many sets: wait until dead ones have expired".to_owned());
        };
        connection.phase = Phase::Owning(set);
        self.answer(id, AnswerKind::Done(Done {}));
        Ok(())
    }

    fn keep(
        &mut self,
        id: ConnectionId,
        keep: Keep,
        descriptor: Attached,
        now: Instant,
    ) -> Result<(), Reason> {
        if keep.slot >= SLOTS || keep.description.len() > MAX_DESCRIPTION {
            return Err("a Keep with too high a number or too long a description".to_owned());
        }
        let is_full = self.kept() >= self.room;
        let contents = match self.phase(id) {
            Some(Phase::Owning(set)) => self.sets.get_mut(*set).map(|it| &mut it.contents),
            Some(Phase::Discarded) => return Ok(()),
            _ => return Err("a Keep before a Hello".to_owned()),
        };
        let Some(contents) = contents else {
            return Ok(());
        };
        // Also without a new one: the number stands for another socket now.
        contents.kept.remove(&keep.slot);
        match descriptor {
            Attached::One(descriptor) if !is_full => {
                contents
                    .kept
                    .insert(keep.slot, (keep.description, descriptor));
            }
            Attached::One(_) | Attached::Lost => {
                if let Some(count) = self.losses.due(now) {
                    tracing::warn!(
                        count,
                        room = self.room,
                        "sockets are not kept: the keeper has no descriptor left (LimitNOFILE=), \
                         or they came with others"
                    );
                }
            }
            Attached::None => return Err("a Keep without a descriptor".to_owned()),
        }
        Ok(())
    }

    fn drop(&mut self, id: ConnectionId, slot: u32) -> Result<(), Reason> {
        match self.phase(id) {
            Some(Phase::Owning(set)) => {
                if let Some(set) = self.sets.get_mut(*set) {
                    set.contents.kept.remove(&slot);
                }
                Ok(())
            }
            Some(Phase::Discarded) => Ok(()),
            _ => Err("a Drop before a Hello".to_owned()),
        }
    }

    fn discard(&mut self, id: ConnectionId) -> Result<(), Reason> {
        match self.phase(id) {
            Some(Phase::Owning(set)) => {
                if let Some(set) = self.sets.remove(*set) {
                    tracing::info!(
                        role = set.role,
                        sockets = set.contents.kept.len(),
                        "a process needs its sockets kept no longer"
                    );
                }
            }
            Some(Phase::Discarded) => {}
            _ => return Err("a Discard before a Hello".to_owned()),
        }
        self.enter(id, Phase::Discarded);
        self.answer(id, AnswerKind::Done(Done {}));
        Ok(())
    }

    fn take(&mut self, id: ConnectionId, role: String, now: Instant) -> Result<(), Reason> {
        let Some(Phase::Asking { .. }) = self.phase(id) else {
            return Err("a Take after a Hello".to_owned());
        };
        if role.len() > MAX_ROLE {
            return Err("a role of an invalid length".to_owned());
        }
        let until = now + DYING;
        self.enter(id, Phase::Waiting { role, until });
        self.look_for_deaths(now);
        self.answer_take(id, now);
        Ok(())
    }

    /// Removes the sets that a client was given, which it has given back in a set of its own.
    fn confirm(&mut self, id: ConnectionId, now: Instant) -> Result<(), Reason> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(());
        };
        for set in std::mem::take(&mut connection.given) {
            if let Some(set) = self.sets.remove(set) {
                tracing::info!(
                    role = set.role,
                    sockets = set.contents.kept.len(),
                    after = ?set.left_for(now),
                    "the next process has taken the sockets"
                );
            }
        }
        self.answer(id, AnswerKind::Done(Done {}));
        Ok(())
    }

    /// Answers a client that waits for a set, unless it has to wait on.
    pub(crate) fn answer_take(&mut self, id: ConnectionId, now: Instant) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        let Phase::Waiting { role, until } = &connection.phase else {
            return;
        };
        match self.sets.take(role, &connection.given) {
            Taken::Set(set) => {
                let until = now + STALL;
                let next = None;
                self.enter(id, Phase::Giving { set, next, until });
                self.give(id, now);
            }
            Taken::Later if now < *until => {}
            Taken::Later | Taken::Nothing => {
                self.enter(id, Phase::asking(now));
                self.answer(id, AnswerKind::Nothing(Nothing {}));
            }
        }
    }

    /// Sends some of the set that a client is being given.
    fn give(&mut self, id: ConnectionId, now: Instant) {
        for _ in 0..MESSAGES {
            let Some(connection) = self.connections.get_mut(&id) else {
                return;
            };
            let Phase::Giving { set, next, until } = &mut connection.phase else {
                return;
            };
            let Some(given) = self.sets.get(*set) else {
                return self.close(id, now);
            };
            let contents = &given.contents;
            let (message, descriptor, after) = match *next {
                None => {
                    let dead = given.left_for(now).as_millis();
                    let left = Left {
                        process: contents.process.clone(),
                        // At most SLOTS.
                        count: u32::try_from(contents.kept.len()).unwrap_or(u32::MAX),
                        dead_ms: u64::try_from(dead).unwrap_or(u64::MAX),
                    };
                    (AnswerKind::Left(left), contents.table.as_fd(), 0)
                }
                Some(from) => {
                    let Some((slot, kept)) = contents.kept.range(from..).next() else {
                        connection.given.push(*set);
                        connection.phase = Phase::asking(now);
                        return;
                    };
                    let message = Kept {
                        slot: *slot,
                        description: kept.0.clone(),
                    };
                    (AnswerKind::Kept(message), kept.1.as_fd(), slot + 1)
                }
            };
            let answer = Answer {
                kind: Some(message),
            };
            match send(&connection.socket, &answer, Some(descriptor)) {
                Ok(()) => (*next, *until) = (Some(after), now + STALL),
                Err(error) if is_later(&error) => return,
                Err(error) if error.raw_os_error() == Some(Errno::ETOOMANYREFS as i32) => {
                    // No event tells when there are fewer.
                    return std::thread::sleep(PAUSE);
                }
                Err(_) => return self.close(id, now),
            }
        }
    }

    /// Refuses a client, and ends its connection.
    fn refuse(&mut self, id: ConnectionId, reason: &str, now: Instant) {
        if let Some(connection) = self.connections.get(&id)
            && let Ok(socket) = connection.socket.try_clone()
        {
            self.send_refusal(&socket, reason, now);
        }
        self.close(id, now);
    }

    pub(crate) fn send_refusal(&mut self, socket: &Socket, reason: &str, now: Instant) {
        if let Some(count) = self.refusals.due(now) {
            tracing::warn!(count, reason, "a client is refused");
        }
        let refused = Refused {
            reason: reason.to_owned(),
        };
        let kind = Some(AnswerKind::Refused(refused));
        // The client may have gone.
        let _ = send(socket, &Answer { kind }, None);
    }

    /// Sends an answer. A client that can't be answered may have died, and left requests that are still to be read:
    /// so this is not the end of its connection.
    fn answer(&self, id: ConnectionId, kind: AnswerKind) {
        if let Some(connection) = self.connections.get(&id) {
            let kind = Some(kind);
            if let Err(error) = send(&connection.socket, &Answer { kind }, None) {
                tracing::debug!(error = report(&error), "a client gets no answer");
            }
        }
    }

    fn phase(&self, id: ConnectionId) -> Option<&Phase> {
        self.connections.get(&id).map(|it| &it.phase)
    }

    fn enter(&mut self, id: ConnectionId, phase: Phase) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.phase = phase;
        }
    }
}
