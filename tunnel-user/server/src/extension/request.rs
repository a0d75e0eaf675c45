//! A connection of a client that can't leave its shard, because it shares an HTTP/2 connection with others.

use std::net::SocketAddr;
use std::rc::Rc;

use bytes::Bytes;
use tracing::Span;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::Destination;

use crate::dial::error::DialError;
use crate::dial::{Dial, connection_id};
use crate::early::{Early, EarlyBytes};
use crate::frontend::connection::{ServeEnd, Served, admit, ended, failed, serve};
use crate::frontend::scope::Scope;
use crate::permits::ConnectionPermit;
use crate::resumption::{Advance, never};
use crate::shard::Shard;
use cpc_datapath::LocalSocket;
use cpc_observe::access::Record;
use cpc_observe::metrics::{Closer, FrontendKind};

/// An admitted request of a client.
pub struct ClientRequest {
    shard: Rc<Shard>,
    dial: Dial,
    permit: ConnectionPermit,
}

/// A client whose target is connected.
pub struct ClientConnection {
    shard: Rc<Shard>,
    served: Served,
    permit: ConnectionPermit,
}

impl ClientRequest {
    pub(super) fn new(
        shard: &Rc<Shard>,
        scope: &Scope,
        frontend: FrontendKind,
        destination: Destination,
        client: Option<SocketAddr>,
    ) -> Result<Self, DialError> {
        let mut record = Record::new(connection_id(), frontend, destination);
        record.client = client;
        let (permit, dialling) = admit(shard, scope, &record)?;
        let early = EarlyBytes::new(Early::HoldWhole, Bytes::new());
        Ok(Self {
            shard: shard.clone(),
            dial: Dial::new(shard, record, &scope.tenant, (early, dialling)),
            permit,
        })
    }

    /// Returns the span of the connection, for the log.
    pub fn span(&self) -> Span {
        self.dial.record.span()
    }

    /// Dials. The client's bytes wait for the answer, and an end of file cancels the dial: the protocol has
    /// no half-close.
    ///
    /// # Errors
    /// [`DialError`], which is in the log; the client has been sent nothing.
    pub async fn dial(mut self, local: &impl LocalSocket) -> Result<ClientConnection, DialError> {
        let shard = &self.shard;
        match self.dial.finish(shard, local).await {
            Ok(dialled) => {
                let (record, tenant) = self.dial.into_record();
                let mut served = Served::new(shard, *record, tenant, dialled);
                served.fix();
                served.record.reached(&shard.metrics.dials);
                Ok(ClientConnection {
                    shard: self.shard,
                    served,
                    permit: self.permit,
                })
            }
            Err(error) => {
                failed(shard, &self.dial.record, &error);
                Err(error)
            }
        }
    }
}

impl ClientConnection {
    /// Relays the connection to its end. Returns the reason, and the permit: the connection counts for as
    /// long as its client gets its last words.
    pub async fn relay(self, local: &impl LocalSocket) -> (CloseReason, ConnectionPermit) {
        let Self {
            shard,
            mut served,
            permit,
        } = self;
        let reason = loop {
            let lost = match serve(&shard, local, &mut served).await {
                ServeEnd::Ended(reason) => break reason,
                ServeEnd::Lost(lost) => lost,
            };
            let parked = served.park();
            let reason = match Box::pin(lost.advance(&shard, never)).await {
                Advance::Here(resumed) => {
                    served = parked.resume(*resumed);
                    served.fix();
                    continue;
                }
                // The client can't go to the shard of another tunnel.
                Advance::Elsewhere(_, lost) => {
                    lost.abandon(&shard, CloseReason::LinkLost);
                    CloseReason::LinkLost
                }
                // Nor can it leave the process.
                Advance::HandedOver(lost) => {
                    lost.abandon(&shard, CloseReason::HandedOver);
                    CloseReason::HandedOver
                }
                Advance::Ended(reason) => reason,
            };
            ended(&shard, &parked.record, Closer::Tunnel, reason);
            break reason;
        };
        (reason, permit)
    }
}
