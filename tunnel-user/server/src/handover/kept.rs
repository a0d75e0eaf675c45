//! Connections whose sockets a keeper holds: described for the next process, and restored from one that was killed.

use std::net::TcpStream;
use std::os::fd::BorrowedFd;

use bytes::Bytes;
use tunnel_proto::handover::{KeptProcess, Record};
use tunnel_proto::session::InstanceId;

use super::collected::{Restored, RestoredSocket, restore_one};
use crate::routes::LinkInfo;
use crate::shard::Common;
use cpc_datapath::kept::{Keep, Kept};
use cpc_datapath::stream::Held;
use cpc_handover::kept::describe;
use cpc_handover::{KeeperHandle, understood};
use cpc_identity::TrustDomain;
use cpc_keeper::{Position, Slot};
use cpc_observe::access;

/// A connection of a client, for the keeper.
pub(crate) struct KeptClient<'a> {
    /// The keeper.
    pub keeper: &'a KeeperHandle,
    /// Link of the connection.
    pub link: &'a LinkInfo,
    /// The connection, for metrics and logs.
    pub record: &'a access::Record,
    /// Tenant of the client.
    pub tenant: &'a TrustDomain,
}

impl Keep for KeptClient<'_> {
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
        let peer = self.link.process.get()?.save();
        let record: Record = self.record.save();
        let facts = (peer, record, self.tenant.to_string());
        let description = describe((session, untold), position, facts);
        let taken = (position.consumed(), position.is_finished());
        self.keeper.keep(description, taken, socket)
    }
}

/// Returns this process, for the keeper.
pub(crate) fn process(common: &Common) -> KeptProcess {
    KeptProcess {
        instance: Bytes::copy_from_slice(&common.instance.0),
        incarnation: common.incarnation,
        ..KeptProcess::default()
    }
}

/// Goes on, in its name, with the connections of a process that was killed, if the keeper holds any. Begins to keep
/// those of this process.
pub(crate) fn take_kept(common: &mut Common) -> Vec<Restored> {
    let keeper = common.keeper.clone();
    let found = keeper.take(true, common.limits.session_bytes);
    let instance = found
        .as_ref()
        .map(|found| <[u8; 16]>::try_from(&found.instance[..]));
    let (Some(found), Some(Ok(instance))) = (found, instance) else {
        keeper.open(&process(common));
        return Vec::new();
    };
    common.instance = InstanceId(instance);
    common.incarnation = found.incarnation;
    keeper.open(&process(common));
    let survivors = found.keep(&keeper).into_iter().map(|(survivor, slot)| {
        let kept = Kept::restore((slot, survivor.way), survivor.peeked, survivor.consumed);
        let socket = TcpStream::from(survivor.descriptor);
        let packed = cpc_datapath::engine::packed(socket, Some(Box::new(kept)));
        restore_one(common, &survivor.connection, |_| {
            Some(RestoredSocket::Tcp(packed))
        })
    });
    let restored = understood(survivors);
    tracing::info!(
        connections = restored.len(),
        "connections of a process that was killed go on"
    );
    restored
}
