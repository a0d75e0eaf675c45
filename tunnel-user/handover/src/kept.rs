//! Connections that outlive a process that was killed, because a keeper holds their sockets.
//!
//! The bytes of such a connection are in the kernel ([`cpc_keeper::position`]). So its session is made of the
//! positions of the socket, and of what the dead process has described when the keeper got the socket.

use std::os::fd::{AsFd, OwnedFd};

use bytes::Bytes;
use prost::Message;
use tunnel_proto::close::CloseReason;
use tunnel_proto::handover::{
    self, Connection, DirectionEnd, KeptConnection, Peer, Session, socket::Kind,
};

use super::error::HandoverError;
use super::store::{nanoseconds, since_boot};
use cpc_datapath::kept::FINISHED;
use cpc_datapath::peek::{Peeking, copy};
use cpc_datapath::stream::Held;
use cpc_keeper::position::TcpState;
use cpc_keeper::{Entry, Kept, Position};

/// Maximum number of bytes that a process has read of a socket beyond those that it keeps.
const READ_AHEAD: u64 = 256 << 10;

/// Returns what the next process has to know of the connection of a socket at `position`. The socket has taken
/// `untold` bytes of the tunnel more than `session` says.
pub fn describe(
    (session, untold): (&Held, u64),
    position: &Position,
    (peer, record, tenant): (Peer, handover::Record, String),
) -> Vec<u8> {
    let kept = KeptConnection {
        session: Bytes::copy_from_slice(session.id.as_bytes()),
        peer: Some(peer),
        record: Some(record),
        tenant,
        outbound: difference(session.confirmed, position.consumed()),
        inbound: difference(session.written + untold, position.written()),
        kept_at: since_boot().map_or(0, nanoseconds),
    };
    kept.encode_to_vec()
}

/// A connection of a process that was killed.
#[derive(Debug)]
pub struct Survivor {
    /// The connection, without a tunnel. Without a socket it is to be reset.
    pub connection: Connection,
    /// The socket.
    pub descriptor: OwnedFd,
    /// Description of the connection for a keeper.
    pub description: Bytes,
    /// Number of its bytes that the session has, and that are in the kernel.
    pub peeked: u64,
    /// Way to read what follows them.
    pub way: Peeking,
    /// Number of bytes that were taken from the queue before, and whether the end of file was passed on.
    pub consumed: (u64, bool),
}

impl Survivor {
    /// Returns the name of the session.
    pub fn id(&self) -> Bytes {
        let session = self.connection.session.as_ref();
        session
            .map(|session| session.id.clone())
            .unwrap_or_default()
    }

    /// Restores a connection of a process that is dead for `waited` nanoseconds, whose local sockets are those of
    /// clients or of targets, and which has kept at most `most` bytes of it.
    ///
    /// # Errors
    /// [`HandoverError`]: the connection ends.
    pub fn restore(
        kept: Kept,
        entry: Entry,
        waited: u64,
        (is_client, most): (bool, u64),
    ) -> Result<Self, HandoverError> {
        let malformed = HandoverError::Malformed;
        let described = KeptConnection::decode(&*kept.description)?;
        let position = Position::of(kept.descriptor.as_fd())?;
        let survived = survived(&position, entry);
        let mut session = Session {
            id: described.session,
            ..Session::default()
        };
        let (mut socket, mut peeked, mut consumed) = (None, 0, (0, false));
        let mut way = Peeking::Again;
        if let Some(progress) = survived {
            // The process has read no more; what is behind that is read in its turn.
            let read = position.unread.min(most.saturating_add(READ_AHEAD));
            let queue = Bytes::from(copy(kept.descriptor.as_fd(), read)?);
            peeked = queue.len() as u64;
            way = Peeking::begin(kept.descriptor.as_fd(), peeked)?;
            let has_end = progress.has_end && peeked == position.unread;
            consumed = (progress.consumed, progress.is_finished);
            let confirmed = offset(progress.consumed, described.outbound);
            let confirmed = confirmed.ok_or(malformed("offset"))?;
            let written = offset(progress.written, described.inbound);
            let written = written.ok_or(malformed("offset"))?;
            let taken = confirmed + peeked;
            session.outbound = Some(handover::Outbound {
                taken,
                ever_sent: taken,
                confirmed,
                is_ended: has_end,
                kept: queue,
                ..handover::Outbound::default()
            });
            session.inbound = Some(handover::Inbound {
                written,
                is_finished: progress.is_finished,
                is_refused: progress.is_refused,
            });
            let inbound = match (progress.is_finished, progress.is_refused) {
                (true, _) => DirectionEnd::Finished,
                (false, true) => DirectionEnd::Refused,
                (false, false) => DirectionEnd::Open,
            };
            let mut record = described.record.ok_or(malformed("record"))?;
            (record.up, record.down) = match is_client {
                true => (taken, written),
                false => (written, taken),
            };
            let age = since_boot().map_or(0, nanoseconds);
            let age = age.saturating_sub(described.kept_at);
            record.age = record.age.saturating_add(age);
            record.connected = record.connected.saturating_add(age);
            socket = Some(handover::Socket {
                kind: Kind::Tcp.into(),
                progress: Some(handover::Progress {
                    eof: has_end,
                    inbound: inbound.into(),
                    ..handover::Progress::default()
                }),
                record: Some(record),
                tenant: described.tenant,
                ..handover::Socket::default()
            });
        } else {
            session.outbound = Some(handover::Outbound::default());
            session.inbound = Some(handover::Inbound::default());
            session.aborted = Some(CloseReason::PeerReset as u32);
        }
        Ok(Self {
            connection: Connection {
                session: Some(session),
                peer: described.peer,
                cause: CloseReason::LinkLost as u32,
                waited,
                socket,
            },
            descriptor: kept.descriptor,
            description: kept.description,
            peeked,
            way,
            consumed,
        })
    }
}

/// Progress of a socket that has outlived its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Survived {
    consumed: u64,
    written: u64,
    /// Whether the peer has sent its end of file.
    has_end: bool,
    /// Whether this end has sent its end of file.
    is_finished: bool,
    /// Whether the peer takes no more.
    is_refused: bool,
}

/// Decides how far a socket has come. `None`: its peer has reset it.
fn survived(position: &Position, entry: Entry) -> Option<Survived> {
    let open = |has_end, is_finished| Survived {
        consumed: position.consumed(),
        written: position.written(),
        has_end,
        is_finished,
        is_refused: false,
    };
    match position.state {
        TcpState::Established => Some(open(false, false)),
        TcpState::FinWait => Some(open(false, true)),
        TcpState::CloseWait => Some(open(true, false)),
        TcpState::Closing => Some(open(true, true)),
        TcpState::Other => None,
        // The kernel does not tell an orderly end from a reset. The table does: an end of file counts as a byte.
        TcpState::Closed => {
            let (before, after) = (entry.consumed & !FINISHED, entry.intended & !FINISHED);
            let taken = position.consumed();
            let ended = |consumed: u64| taken == consumed + 1;
            let is_reset = taken == before || taken == after;
            let consumed = match (ended(before), ended(after)) {
                (true, _) if !is_reset => before,
                (false, true) if !is_reset => after,
                // Also where the process was killed in the middle of taking one byte, which could be either.
                _ => return None,
            };
            let is_finished = entry.consumed & FINISHED != 0;
            Some(Survived {
                consumed,
                written: position.written().checked_sub(u64::from(is_finished))?,
                has_end: true,
                is_finished,
                is_refused: !is_finished,
            })
        }
    }
}

/// Returns the offset of a session less the position of its socket.
fn difference(offset: u64, position: u64) -> i64 {
    // No connection carries 2^63 bytes.
    i64::try_from(i128::from(offset) - i128::from(position)).unwrap_or(i64::MIN)
}

fn offset(position: u64, difference: i64) -> Option<u64> {
    position.checked_add_signed(difference)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(consumed: u64, intended: u64, is_finished: bool) -> Entry {
        let bit = if is_finished { FINISHED } else { 0 };
        Entry {
            consumed: consumed | bit,
            intended: intended | bit,
        }
    }

    /// The end of file of the peer is the byte that was received and never taken.
    fn closed(received: u64, unread: u64) -> Position {
        Position::new(TcpState::Closed, (received, unread), (50, 0))
    }

    #[test]
    fn an_open_socket_needs_no_table() {
        let at = |state| Position::new(state, (101, 40), (50, 10));
        let survived = |state| survived(&at(state), Entry::default()).unwrap();
        let open = survived(TcpState::Established);
        assert_eq!((open.consumed, open.written), (61, 60));
        let ended = survived(TcpState::CloseWait);
        assert_eq!((ended.consumed, ended.has_end), (60, true));
        let finished = survived(TcpState::FinWait);
        assert_eq!((finished.written, finished.is_finished), (59, true));
    }

    #[test]
    fn a_closed_socket_was_reset_or_has_ended_in_order() {
        let ended = survived(&closed(101, 40), entry(60, 60, true)).unwrap();
        assert_eq!((ended.consumed, ended.written), (60, 49));
        assert!(ended.has_end && ended.is_finished && !ended.is_refused);
        // The process had passed no end on: the peer has reset after its own.
        let refused = survived(&closed(101, 40), entry(60, 60, false)).unwrap();
        assert!(refused.has_end && refused.is_refused);
        assert_eq!(
            survived(&closed(100, 40), entry(60, 60, true)),
            None,
            "reset"
        );
    }

    /// The process was killed between its note of an end and the call, on a socket that was reset.
    #[test]
    fn an_end_that_was_never_sent_is_no_byte() {
        let nothing_written = Position::new(TcpState::Closed, (101, 40), (0, 0));
        assert_eq!(survived(&nothing_written, entry(60, 60, true)), None);
    }

    #[test]
    fn a_process_may_be_killed_while_it_takes_bytes() {
        let before = survived(&closed(101, 40), entry(60, 70, true)).unwrap();
        assert_eq!(before.consumed, 60);
        let after = survived(&closed(101, 30), entry(60, 70, true)).unwrap();
        assert_eq!(after.consumed, 70);
        assert_eq!(
            survived(&closed(100, 30), entry(60, 70, true)),
            None,
            "reset"
        );
        // One byte that was taken, or an end of file: a reset is never taken for an end.
        assert_eq!(survived(&closed(101, 40), entry(60, 61, true)), None);
    }

    #[test]
    fn what_was_described_is_no_offset_of_another_socket() {
        assert_eq!(offset(10, difference(100, 10)), Some(100));
        assert_eq!(offset(12, difference(0, 10)), Some(2));
        assert_eq!(offset(5, difference(0, 10)), None, "less than before");
    }
}
