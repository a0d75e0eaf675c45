//! A session between two processes.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tunnel_proto::close::CloseReason;
use tunnel_proto::handover::{Connection, Peer as SavedPeer, Socket, State, socket::Kind};
use tunnel_proto::session::InstanceId;

use crate::dialer::ParkedConnection;
use crate::sessions::{Parked, ServerProcess};
use crate::worker::Worker;
use cpc_handover::{HandoverError, Parcel};
use cpc_identity::revoked::Peer;
use cpc_observe::access::Record;
use cpc_session::SessionState;

/// Adds a session to `state`.
///
/// # Errors
/// There is no memory.
pub(super) fn save(parked: Parked, state: &mut Parcel) -> io::Result<()> {
    let connections = vec![into_message(parked, state)];
    state.merge(&State {
        connections,
        ..State::default()
    })
}

fn into_message(parked: Parked, state: &mut Parcel) -> Connection {
    let server = &parked.server;
    let saved = Connection {
        session: Some(parked.state.save()),
        peer: Some(SavedPeer {
            identity: server.identity.clone(),
            instance: Bytes::copy_from_slice(&server.instance.0),
            serial: Bytes::copy_from_slice(server.peer.serial()),
        }),
        cause: parked.cause as u32,
        waited: u64::try_from(parked.at.elapsed().as_nanos()).unwrap_or(u64::MAX),
        socket: None,
    };
    let Some((socket, descriptor)) = parked.connection.and_then(|it| it.save()) else {
        return saved;
    };
    let number = state.add(descriptor);
    Connection {
        socket: Some(Socket {
            descriptor: number,
            ..socket
        }),
        ..saved
    }
}

/// Restores a session that another process has saved, with its socket from `sockets`.
///
/// # Errors
/// [`HandoverError::Malformed`].
pub(super) fn restore(
    worker: &Worker,
    saved: &Connection,
    sockets: &mut [Option<OwnedFd>],
) -> Result<Parked, HandoverError> {
    let malformed = HandoverError::Malformed;
    let peer = saved.peer.as_ref().ok_or(malformed("peer"))?;
    let instance = <[u8; 16]>::try_from(&peer.instance[..]).map_err(|_| malformed("peer"))?;
    let server = ServerProcess {
        identity: peer.identity.clone(),
        instance: InstanceId(instance),
        peer: Peer::restore(peer.identity.clone(), &peer.serial),
    };
    let now = Instant::now();
    let at = now.checked_sub(Duration::from_nanos(saved.waited));
    let at = at.unwrap_or(now);
    let session = saved.session.as_ref().ok_or(malformed("session"))?;
    let state = SessionState::restore(session, worker.sessions.bounds.clone(), at);
    let connection = match &saved.socket {
        None => None,
        Some(socket) => {
            let number = usize::try_from(socket.descriptor).unwrap_or(usize::MAX);
            let descriptor = sockets.get_mut(number).and_then(Option::take);
            let descriptor = descriptor.ok_or(malformed("descriptor"))?;
            let record = socket.record.as_ref().and_then(Record::restore);
            let record = record.ok_or(malformed("record"))?;
            if socket.kind() != Kind::Tcp {
                return Err(malformed("kind of socket"));
            }
            ParkedConnection::restore(worker, record, descriptor, socket).map(Box::new)
        }
    };
    let state = state.map_err(|_| malformed("session"))?;
    let cause = CloseReason::from_code(saved.cause.into()).unwrap_or(CloseReason::LinkLost);
    let sessions = &worker.sessions;
    Ok(sessions.restored(state, connection, (cause, at), Arc::new(server)))
}
