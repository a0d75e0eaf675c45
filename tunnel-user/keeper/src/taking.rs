//! The next process's side: it takes the sockets of dead ones.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use prost::bytes::Bytes;
use socket2::Socket;
use tunnel_proto::keeper::answer::Kind as AnswerKind;
use tunnel_proto::keeper::request::Kind;
use tunnel_proto::keeper::{self as message, Confirm, Take};

use crate::connect::{answer, connect, request};
use crate::error::KeeperError;
use crate::message::Attached;
use crate::table::{SLOTS, TableView};

/// Maximum number of sets to take: more than a keeper has.
const MAX_LEFT: usize = 64;

/// Sockets for which memory is allocated before any has come.
const MOST_AT_ONCE: usize = 1 << 12;

/// The sockets of a dead process.
#[derive(Debug)]
pub struct Left {
    /// The instance_id of the process.
    pub process: Bytes,
    /// Time since its death.
    pub dead_for: Duration,
    /// Progress of the sockets.
    pub table: TableView,
    /// The sockets.
    pub kept: Vec<Kept>,
}

/// A socket of a dead process.
#[derive(Debug)]
pub struct Kept {
    /// Number of its entry in the table.
    pub slot: u32,
    /// The owner's description.
    pub description: Bytes,
    /// The socket.
    pub descriptor: OwnedFd,
}

/// The sockets of dead processes, which the keeper holds too.
#[derive(Debug)]
pub struct Taken {
    /// Sets of the processes, oldest first.
    pub sets: Vec<Left>,
    keeper: Socket,
}

impl Taken {
    /// Ends the keeping of these sockets, once [`Keeper`](crate::Keeper) keeps them for this process. Until then they
    /// outlive this process too.
    ///
    /// # Errors
    /// [`KeeperError`]: the keeper is gone, or a later process may find the sockets again.
    pub fn confirm(self) -> Result<(), KeeperError> {
        request(&self.keeper, Kind::Confirm(Confirm {}), None)?;
        match answer(&self.keeper)? {
            (AnswerKind::Done(_), _) => Ok(()),
            _ => Err(KeeperError::Malformed("no answer to Confirm")),
        }
    }
}

/// Takes the sockets of all dead processes of `role` from the keeper at `path`. Waits for up to 2 seconds for a
/// process that is about to die, and for up to 5 seconds for each answer.
///
/// # Errors
/// [`KeeperError`]: nothing was taken.
pub fn take(path: &Path, role: &str) -> Result<Taken, KeeperError> {
    let keeper = connect(path)?;
    let mut sets = Vec::new();
    while sets.len() < MAX_LEFT
        && let Some(left) = take_one(&keeper, role)?
    {
        sets.push(left);
    }
    Ok(Taken { sets, keeper })
}

/// Takes the oldest set. Returns `None` if there is none.
pub(crate) fn take_one(keeper: &Socket, role: &str) -> Result<Option<Left>, KeeperError> {
    let role = role.to_owned();
    request(keeper, Kind::Take(Take { role }), None)?;
    match answer(keeper)? {
        (AnswerKind::Left(left), table) => receive(keeper, left, table).map(Some),
        (AnswerKind::Nothing(_), _) => Ok(None),
        _ => Err(KeeperError::Malformed("no answer to Take")),
    }
}

/// Receives the sockets of a set.
fn receive(keeper: &Socket, left: message::Left, table: Attached) -> Result<Left, KeeperError> {
    if left.count > SLOTS {
        return Err(KeeperError::Malformed("too many sockets"));
    }
    let count = left.count as usize;
    let mut kept = Vec::with_capacity(count.min(MOST_AT_ONCE));
    for _ in 0..count {
        let (AnswerKind::Kept(message), descriptor) = answer(keeper)? else {
            return Err(KeeperError::Malformed("no Kept after Left"));
        };
        if let Attached::One(descriptor) = descriptor {
            kept.push(Kept {
                slot: message.slot,
                description: message.description,
                descriptor,
            });
        }
    }
    if kept.len() < count {
        tracing::error!(
            lost = count - kept.len(),
            "no descriptor is left: connections of the last process are lost (LimitNOFILE=)"
        );
    }
    Ok(Left {
        process: left.process,
        dead_for: Duration::from_millis(left.dead_ms),
        table: TableView::of(table.one()),
        kept,
    })
}
