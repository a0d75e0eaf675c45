//! A connection of a client, whatever its frontend: admitted, relayed, and recorded at its end.

use tunnel_proto::close::CloseReason;

use super::scope::Scope;
use crate::dial::Dialled;
use crate::dial::error::DialError;
use crate::limits::Limit;
use crate::permits::{ConnectionPermit, DialPermit};
use crate::shard::Shard;
use cpc_datapath::{ClosedBy, LocalSocket, Meter, relay};
use cpc_observe::access::{ConnectionMeter, Record};
use cpc_observe::metrics::{Closer, GaugeGuard};

/// A connection of a client after its dial.
pub(crate) struct Served {
    /// The connection, for metrics and logs.
    pub record: Record,
    dialled: Dialled,
    _observed: Option<GaugeGuard>,
}

impl Served {
    /// Begins to serve a connection whose dial has succeeded.
    pub(crate) fn new(shard: &Shard, record: Record, dialled: Dialled) -> Self {
        Self {
            record,
            dialled,
            _observed: shard.observer.as_ref().map(|it| it.connection()),
        }
    }
}

/// Relays the connection, and writes its record at the end. Returns the reason.
#[expect(
    clippy::manual_async_fn,
    reason = "an async fn keeps its arguments twice"
)]
pub(crate) fn serve(
    shard: &Shard,
    local: &impl LocalSocket,
    served: &mut Served,
) -> impl Future<Output = CloseReason> {
    async move {
        let Served {
            record, dialled, ..
        } = served;
        let Dialled {
            send,
            recv,
            unsent,
            sent,
            permit,
            budget,
        } = dialled;
        let meter = ConnectionMeter::<true> {
            bytes: &record.bytes,
            totals: &permit.totals,
            metrics: &shard.metrics.dials,
        };
        meter.outbound(*sent);
        let relayed = relay(local, send, recv, unsent, budget, &meter);
        let (closer, reason) = tokio::select! {
            // Without a random number a poll.
            biased;
            ending = relayed => {
                let closer = match ending.by {
                    ClosedBy::Local => Closer::Client,
                    ClosedBy::Remote => Closer::Target,
                    ClosedBy::Link | ClosedBy::Limit => Closer::Tunnel,
                };
                (closer, ending.reason)
            }
            () = local.cut() => (Closer::Server, CloseReason::IdentityRefused),
        };
        if let Some(observer) = &shard.observer {
            let established = record.connected.unwrap_or(record.start);
            observer.connection_ended(established.elapsed());
        }
        record.end(closer, reason, &reason, &shard.metrics.dials);
        reason
    }
}

/// Writes the record of a failed dial.
pub(crate) fn failed(shard: &Shard, record: &Record, error: &DialError) {
    record.end(error.by, error.reason, error, &shard.metrics.dials);
}

/// Admits a request of a client of `scope`, or writes the record of its refusal.
///
/// # Errors
/// [`DialError`]; the client has been sent nothing.
pub(crate) fn admit(
    shard: &Shard,
    scope: &Scope,
    record: &Record,
) -> Result<(ConnectionPermit, DialPermit), DialError> {
    let overloaded = |limit: Limit| {
        let text = limit.text(&shard.limits);
        DialError::new(CloseReason::Overloaded, Closer::Server, text)
    };
    let overloaded = |limit| match shard.connections.is_closed() {
        true => DialError::new(
            CloseReason::Draining,
            Closer::Server,
            "the server is ending",
        ),
        false => overloaded(limit),
    };
    let allowed = scope.check(&record.destination);
    let admitted = allowed.and_then(|()| shard.admit(&scope.tenant).map_err(overloaded));
    admitted.inspect_err(|error| failed(shard, record, error))
}
