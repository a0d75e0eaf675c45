//! Connections whose sockets a keeper holds: described for the next process, and restored from one that was killed.

use std::net::TcpStream;
use std::os::fd::BorrowedFd;

use bytes::Bytes;
use tunnel_proto::handover::KeptProcess;
use tunnel_proto::session::InstanceId;

use super::saved::{restore, save_peer};
use crate::sessions::ServerProcess;
use crate::worker::Worker;
use cpc_datapath::engine::packed;
use cpc_datapath::kept::{Keep, Kept};
use cpc_datapath::stream::Held;
use cpc_handover::kept::describe;
use cpc_handover::{KeeperHandle, understood};
use cpc_keeper::{Position, Slot};
use cpc_observe::access::Record;

/// A connection to a target, for the keeper.
pub(crate) struct KeptTarget<'a> {
    /// The keeper.
    pub keeper: &'a KeeperHandle,
    /// Process of the server; `None` where it does not hold sessions.
    pub server: Option<&'a ServerProcess>,
    /// The connection, for metrics and logs.
    pub record: &'a Record,
}

impl Keep for KeptTarget<'_> {
    fn is_there(&self) -> bool {
        self.keeper.is_there()
    }

    fn keep(
        &self,
        socket: BorrowedFd<'_>,
        position: &Position,
        session: &Held,
        untold: u64,
    ) -> Option<Slot> {
        let facts = (save_peer(self.server?), self.record.save(), String::new());
        let description = describe((session, untold), position, facts);
        let taken = (position.consumed(), position.is_finished());
        self.keeper.keep(description, taken, socket)
    }
}

/// Returns this process, for the keeper.
pub(crate) fn process(worker: &Worker) -> KeptProcess {
    KeptProcess {
        instance: Bytes::copy_from_slice(&worker.instance.0),
        incarnation: worker.incarnation,
        ..KeptProcess::default()
    }
}

/// Goes on, in its name, with the connections of a process that was killed, if the keeper holds any. Begins to keep
/// those of this process.
pub(crate) fn take_kept(worker: &mut Worker) {
    let keeper = worker.keeper.clone();
    let found = keeper.take(false, worker.sessions.bounds.bytes);
    let instance = found
        .as_ref()
        .map(|found| <[u8; 16]>::try_from(&found.instance[..]));
    let (Some(found), Some(Ok(instance))) = (found, instance) else {
        return keeper.open(&process(worker));
    };
    worker.instance = InstanceId(instance);
    worker.incarnation = found.incarnation;
    keeper.open(&process(worker));
    let survivors = found.keep(&keeper).into_iter().map(|(survivor, slot)| {
        let kept = Kept::restore((slot, survivor.way), survivor.peeked, survivor.consumed);
        let socket = TcpStream::from(survivor.descriptor);
        let packed = packed(socket, Some(Box::new(kept)));
        restore(worker, &survivor.connection, |_| Some(packed))
    });
    let restored = understood(survivors);
    tracing::info!(
        connections = restored.len(),
        "connections of a process that was killed go on"
    );
    worker.sessions.insert(restored);
}
