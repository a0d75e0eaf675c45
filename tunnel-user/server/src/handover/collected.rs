//! A connection between two processes.

use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use tunnel_proto::close::CloseReason;
use tunnel_proto::handover::{Connection, Socket as SavedSocket, State, socket::Kind};

use crate::frontend;
use crate::frontend::connection::{Parked, ended};
use crate::permits::ConnectionPermit;
use crate::resumption::{Lost, until_settled};
use crate::shard::{Common, Shard};
use cpc_datapath::Socket;
use cpc_datapath::engine::{Packed, packed};
use cpc_datapath::socket::SocketParts;
use cpc_handover::{HandoverError, Parcel, understood};
use cpc_observe::metrics::Closer;

/// A connection that this process gives away.
pub(crate) struct Collected {
    /// Client; `None` if that is gone and the agent is yet to learn how.
    pub client: Option<CollectedClient>,
    /// Session.
    pub lost: Box<Lost>,
}

/// A client whose socket this process gives away.
pub(crate) struct CollectedClient {
    /// The socket.
    pub socket: SocketParts,
    /// The connection.
    pub parked: Parked,
    /// Counts the connection until it is given away.
    pub _permit: ConnectionPermit,
}

impl Collected {
    /// Adds the connection to `state`.
    ///
    /// # Errors
    /// There is no memory.
    pub(super) fn save(self, state: &mut Parcel) -> io::Result<()> {
        let connections = vec![self.into_message(state)];
        state.merge(&State {
            connections,
            ..State::default()
        })
    }

    fn into_message(self, state: &mut Parcel) -> Connection {
        let saved = self.lost.save();
        let Some(client) = self.client else {
            return saved;
        };
        let CollectedClient {
            socket,
            mut parked,
            _permit: permit,
        } = client;
        drop(permit);
        parked.append(&socket.ahead);
        let descriptor = state.add(socket.descriptor);
        Connection {
            socket: Some(SavedSocket {
                kind: socket.kind.into(),
                descriptor,
                ..parked.save()
            }),
            ..saved
        }
    }
}

/// A connection of another process, checked.
pub(crate) struct Restored {
    client: Option<(RestoredSocket, Parked)>,
    lost: Box<Lost>,
}

/// A socket of another process.
pub(crate) enum RestoredSocket {
    /// TCP, with its bytes in the kernel if those are kept.
    Tcp(Packed),
    /// Unix.
    Unix(UnixStream),
    /// A kind of a later release.
    Unknown,
}

impl RestoredSocket {
    fn new(kind: Kind, descriptor: OwnedFd) -> Self {
        match kind {
            Kind::Tcp => Self::Tcp(packed(TcpStream::from(descriptor), None)),
            Kind::Unix => Self::Unix(descriptor.into()),
            Kind::Unknown => Self::Unknown,
        }
    }
}

/// Checks the connections of a state. Those that this release does not understand end.
pub(crate) fn restore(common: &Common, state: State, sockets: Vec<OwnedFd>) -> Vec<Restored> {
    let mut sockets: Vec<_> = sockets.into_iter().map(Some).collect();
    understood(state.connections.iter().map(|saved| {
        restore_one(common, saved, |socket| {
            let at = usize::try_from(socket.descriptor).unwrap_or(usize::MAX);
            let descriptor = sockets.get_mut(at).and_then(Option::take)?;
            Some(RestoredSocket::new(socket.kind(), descriptor))
        })
    }))
}

/// Checks a connection, whose socket `find` returns.
///
/// # Errors
/// [`HandoverError::Malformed`].
pub(super) fn restore_one(
    common: &Common,
    saved: &Connection,
    find: impl FnOnce(&SavedSocket) -> Option<RestoredSocket>,
) -> Result<Restored, HandoverError> {
    let lost = Lost::restore(common, saved)?;
    let client = match &saved.socket {
        None => None,
        Some(socket) => {
            let found = find(socket).ok_or(HandoverError::Malformed("descriptor"))?;
            Some((found, Parked::restore(common, socket)?))
        }
    };
    Ok(Restored {
        client,
        lost: Box::new(lost),
    })
}

impl Restored {
    /// Goes on with the connection on a shard.
    pub(super) fn go_on(self, shard: &Rc<Shard>) {
        let Some((socket, parked)) = self.client else {
            tokio::task::spawn_local(until_settled(shard.clone(), self.lost));
            return;
        };
        let Some(permit) = shard.admit_restored(parked.tenant()) else {
            self.lost.abandon(shard, CloseReason::Overloaded);
            return ended(
                shard,
                &parked.record,
                Closer::Server,
                CloseReason::Overloaded,
            );
        };
        let lost = self.lost;
        match socket {
            RestoredSocket::Tcp(socket) => frontend::Restored {
                socket,
                parked,
                permit,
                lost,
            }
            .spawn::<Socket>(shard),
            RestoredSocket::Unix(socket) => frontend::Restored {
                socket,
                parked,
                permit,
                lost,
            }
            .spawn::<tokio::net::UnixStream>(shard),
            RestoredSocket::Unknown => {
                lost.abandon(shard, CloseReason::Internal);
                ended(shard, &parked.record, Closer::Server, CloseReason::Internal);
            }
        }
    }
}
