//! A connection of a client, whatever its frontend: admitted, relayed, and recorded at its end.

use std::rc::Rc;

use tunnel_proto::close::CloseReason;
use tunnel_proto::handover;

use super::scope::Scope;
use crate::dial::Dialled;
use crate::dial::error::DialError;
use crate::handover::kept::KeptClient;
use crate::limits::Limit;
use crate::permits::{ConnectionPermit, DialPermit};
use crate::resumption::{Lost, Resumed};
use crate::shard::{Common, Shard};
use cpc_datapath::{Budget, ClosedBy, LocalSocket, Meter, Progress, relay};
use cpc_handover::HandoverError;
use cpc_identity::TrustDomain;
use cpc_observe::access::{ConnectionMeter, Record};
use cpc_observe::metrics::{Closer, GaugeGuard};

/// A connection of a client after its dial.
pub(crate) struct Served {
    /// The connection, for metrics and logs.
    pub record: Record,
    dialled: Dialled,
    tenant: TrustDomain,
    _observed: Option<GaugeGuard>,
}

impl Served {
    /// Begins to serve a connection whose dial has succeeded.
    pub(crate) fn new(
        shard: &Shard,
        record: Record,
        tenant: TrustDomain,
        dialled: Dialled,
    ) -> Self {
        Self {
            record,
            dialled,
            tenant,
            _observed: shard.observer.as_ref().map(|it| it.connection()),
        }
    }

    /// Keeps the connection on its tunnel for as long as that is there.
    pub(crate) fn fix(&self) {
        self.dialled.send.fix();
    }

    /// Gives up the halves of a lost tunnel.
    pub(crate) fn park(self) -> Parked {
        tracing::debug!(id = %self.record.id, "the connection waits for another tunnel");
        Parked {
            record: self.record,
            unsent: self.dialled.unsent,
            budget: self.dialled.budget,
            tenant: self.tenant,
            observed: self._observed,
        }
    }
}

/// A connection without a tunnel. It may move between threads.
pub(crate) struct Parked {
    /// The connection, for metrics and logs.
    pub record: Record,
    unsent: Progress,
    budget: Budget,
    tenant: TrustDomain,
    observed: Option<GaugeGuard>,
}

impl Parked {
    /// Returns the tenant of the client.
    pub(crate) fn tenant(&self) -> &TrustDomain {
        &self.tenant
    }

    /// Adds bytes that were read ahead from the client.
    pub(crate) fn append(&mut self, ahead: &[u8]) {
        self.unsent.append(ahead);
    }

    /// Returns the connection for another process; its socket is to be added.
    pub(crate) fn save(&self) -> handover::Socket {
        handover::Socket {
            progress: Some(self.unsent.save()),
            record: Some(self.record.save()),
            tenant: self.tenant.to_string(),
            ..handover::Socket::default()
        }
    }

    /// Restores a connection that another process has [saved](Self::save).
    ///
    /// # Errors
    /// [`HandoverError::Malformed`].
    pub(crate) fn restore(
        common: &Common,
        saved: &handover::Socket,
    ) -> Result<Self, HandoverError> {
        let malformed = HandoverError::Malformed;
        let progress = saved.progress.as_ref().ok_or(malformed("progress"))?;
        let record = saved.record.as_ref().and_then(Record::restore);
        let tenant: TrustDomain = saved.tenant.parse().map_err(|_| malformed("tenant"))?;
        Ok(Self {
            record: record.ok_or(malformed("record"))?,
            unsent: Progress::restore(progress),
            budget: common.tenants.of(&tenant).budget.clone(),
            tenant,
            observed: common.observer.as_ref().map(|it| it.connection()),
        })
    }

    /// Goes on over another tunnel.
    pub(crate) fn resume(mut self, resumed: Resumed) -> Served {
        self.record.resumed(resumed.stall);
        tracing::debug!(id = %self.record.id, "the connection goes on over another tunnel");
        Served {
            record: self.record,
            dialled: resumed.into_dialled(self.unsent, self.budget),
            tenant: self.tenant,
            _observed: self.observed,
        }
    }
}

/// End of serving a connection.
pub(crate) enum ServeEnd {
    /// The connection has ended, and its record is written.
    Ended(CloseReason),
    /// The tunnel was lost, and another one may carry the connection on.
    Lost(Box<Lost>),
}

/// Relays the connection, and writes its record at the end.
#[expect(
    clippy::manual_async_fn,
    reason = "an async fn keeps its arguments twice"
)]
pub(crate) fn serve(
    shard: &Rc<Shard>,
    local: &impl LocalSocket,
    served: &mut Served,
) -> impl Future<Output = ServeEnd> {
    async move {
        let Dialled {
            send,
            recv,
            unsent,
            sent,
            permit,
            budget,
            ..
        } = &mut served.dialled;
        let meter = ConnectionMeter::<true> {
            bytes: &served.record.bytes,
            totals: &permit.totals,
            metrics: &shard.metrics.dials,
        };
        meter.outbound(std::mem::take(sent));
        let keeper = KeptClient {
            keeper: &shard.keeper,
            link: permit,
            record: &served.record,
            tenant: &served.tenant,
        };
        let relayed = relay(local, send, recv, unsent, budget, (&meter, &keeper));
        let (closer, reason) = tokio::select! {
            // Without a random number a poll.
            biased;
            ending = relayed => {
                let mut reason = ending.reason;
                if ending.by == ClosedBy::Link {
                    reason = match Lost::from(shard, &served.tenant, &served.dialled, reason) {
                        Ok(lost) => return ServeEnd::Lost(lost),
                        Err(reason) => reason,
                    };
                    if reason == CloseReason::Finished {
                        local.reset_on_close(false);
                    }
                }
                let closer = match ending.by {
                    ClosedBy::Local => Closer::Client,
                    ClosedBy::Remote => Closer::Target,
                    ClosedBy::Link | ClosedBy::Limit => Closer::Tunnel,
                };
                (closer, reason)
            }
            () = local.cut() => (Closer::Server, CloseReason::IdentityRefused),
        };
        ended(shard, &served.record, closer, reason);
        ServeEnd::Ended(reason)
    }
}

/// Writes the record of a connection that was served.
pub(crate) fn ended(shard: &Shard, record: &Record, closer: Closer, reason: CloseReason) {
    if let Some(observer) = &shard.observer {
        let established = record.connected.unwrap_or(record.start);
        observer.connection_ended(established.elapsed());
    }
    record.end(closer, reason, &reason, &shard.metrics.dials);
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
