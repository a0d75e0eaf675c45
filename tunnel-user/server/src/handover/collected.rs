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
use cpc_datapath::socket::SocketParts;
use cpc_handover::{HandoverError, Parcel};
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

/// A connection that another process has given away, checked.
pub(crate) struct Restored {
    client: Option<(Kind, OwnedFd, Parked)>,
    lost: Box<Lost>,
}

/// Checks the connections of a state.
///
/// # Errors
/// [`HandoverError::Malformed`].
pub(crate) fn restore(
    common: &Common,
    state: State,
    sockets: Vec<OwnedFd>,
) -> Result<Vec<Restored>, HandoverError> {
    let mut sockets: Vec<_> = sockets.into_iter().map(Some).collect();
    let restored = state.connections.iter().map(|saved| {
        let lost = Lost::restore(common, saved)?;
        let client = match &saved.socket {
            None => None,
            Some(socket) => {
                let at = usize::try_from(socket.descriptor).unwrap_or(usize::MAX);
                let descriptor = sockets.get_mut(at).and_then(Option::take);
                let descriptor = descriptor.ok_or(HandoverError::Malformed("descriptor"))?;
                let parked = Parked::restore(common, socket)?;
                Some((socket.kind(), descriptor, parked))
            }
        };
        Ok(Restored {
            client,
            lost: Box::new(lost),
        })
    });
    restored.collect()
}

impl Restored {
    /// Goes on with the connection on a shard.
    pub(super) fn go_on(self, shard: &Rc<Shard>) {
        let Some((kind, descriptor, parked)) = self.client else {
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
        match kind {
            Kind::Tcp => frontend::Restored {
                socket: TcpStream::from(descriptor).into(),
                parked,
                permit,
                lost,
            }
            .spawn::<Socket>(shard),
            Kind::Unix => frontend::Restored {
                socket: UnixStream::from(descriptor),
                parked,
                permit,
                lost,
            }
            .spawn::<tokio::net::UnixStream>(shard),
            // Of a later release.
            Kind::Unknown => {
                lost.abandon(shard, CloseReason::Internal);
                ended(shard, &parked.record, Closer::Server, CloseReason::Internal);
            }
        }
    }
}
