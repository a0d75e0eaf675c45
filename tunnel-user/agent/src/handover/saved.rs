//! A session between two processes.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tunnel_proto::close::CloseReason;
use tunnel_proto::handover::{Connection, Peer as SavedPeer, Socket, State, socket::Kind};
use tunnel_proto::session::InstanceId;

use crate::dialer::ParkedConnection;
use crate::sessions::{Parked, ServerProcess};
use crate::worker::Worker;
use cpc_datapath::engine::Packed;
use cpc_handover::{HandoverError, Parcel};
use cpc_identity::revoked::Peer;
use cpc_observe::access::Record;
use cpc_session::SessionState;

/// Adds a session to `state`.
///
/// # Errors
/// There is no memory.
pub(super) fn save(worker: &Worker, parked: Parked, state: &mut Parcel) -> io::Result<()> {
    let connections = vec![into_message(worker, parked, state)];
    state.merge(&State {
        connections,
        ..State::default()
    })
}

fn into_message(worker: &Worker, mut parked: Parked, state: &mut Parcel) -> Connection {
    let had_connection = parked.connection.is_some();
    let socket = parked.connection.take().and_then(|it| it.save(worker));
    if had_connection && socket.is_none() {
        // A session without a socket would end in order.
        parked.state.abort(CloseReason::PeerReset);
    }
    let server = &parked.server;
    let saved = Connection {
        session: Some(parked.state.save()),
        peer: Some(save_peer(server)),
        cause: parked.cause as u32,
        waited: u64::try_from(parked.at.elapsed().as_nanos()).unwrap_or(u64::MAX),
        socket: None,
    };
    let Some((socket, descriptor)) = socket else {
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

/// Returns a process of a server for another process of this agent.
pub(super) fn save_peer(server: &ServerProcess) -> SavedPeer {
    SavedPeer {
        identity: server.identity.clone(),
        instance: Bytes::copy_from_slice(&server.instance.0),
        serial: Bytes::copy_from_slice(server.peer.serial()),
    }
}

/// Restores a session of another process, whose socket `find` returns.
///
/// # Errors
/// [`HandoverError::Malformed`].
pub(super) fn restore(
    worker: &Worker,
    saved: &Connection,
    find: impl FnOnce(&Socket) -> Option<Packed>,
) -> Result<Parked, HandoverError> {
    let malformed = HandoverError::Malformed;
    let peer = saved.peer.as_ref().ok_or(malformed("peer"))?;
    let instance = <[u8; 16]>::try_from(&peer.instance[..]).map_err(|_| malformed("peer"))?;
    let server = ServerProcess {
        identity: peer.identity.clone(),
        instance: InstanceId(instance),
        // It is not known: no later one ends the session before its time.
        incarnation: u64::MAX,
        peer: Peer::restore(peer.identity.clone(), &peer.serial),
    };
    let now = Instant::now();
    let at = now.checked_sub(Duration::from_nanos(saved.waited));
    let at = at.unwrap_or(now);
    let session = saved.session.as_ref().ok_or(malformed("session"))?;
    let state = SessionState::restore(session, worker.sessions.bounds.clone(), at);
    let mut state = state.map_err(|_| malformed("session"))?;
    let connection = match &saved.socket {
        None => None,
        Some(socket) => {
            let found = find(socket).ok_or(malformed("descriptor"))?;
            let record = socket.record.as_ref().and_then(Record::restore);
            let record = record.ok_or(malformed("record"))?;
            if socket.kind() != Kind::Tcp {
                return Err(malformed("kind of socket"));
            }
            let connection = ParkedConnection::restore(worker, record, found, socket);
            if connection.is_none() {
                state.abort(CloseReason::Overloaded);
            }
            connection.map(Box::new)
        }
    };
    let cause = CloseReason::from_code(saved.cause.into()).unwrap_or(CloseReason::LinkLost);
    let sessions = &worker.sessions;
    Ok(sessions.restored(state, connection, (cause, at), Arc::new(server)))
}
