//! One stream that a server opens on a native tunnel: a dial, a session that goes on, or the notices of all
//! sessions.

use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::{DialRequest, DialResponse, ResumeRequest, ResumeResponse, StreamHead};
use tunnel_proto::resumption::{SessionId, SessionKey};
use tunnel_proto::session::AgentSession;

use super::dialer::{Answer, Dialled, dial};
use super::sessions::{Found, ServerProcess};
use super::stats::{OnTunnel, TunnelStats};
use super::worker::Worker;
use cpc_datapath::{ClosedBy, RelayEnd};
use cpc_host::concurrency::Permit;
use cpc_host::report::report;
use cpc_session::notices::NoticesEnd;
use cpc_session::resume::{Outcome, accept, close, refuse};
use cpc_session::{Carried, Detached, Notices, SessionRecv, SessionSend, SessionState};
use cpc_transport::control_stream::Shared;
use cpc_transport::tunnel::{Connection, HeadError, Recv, Send, Tunnel, TunnelRecv};

/// Timeout of the request on a stream.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Common state of the streams of a tunnel.
#[derive(Debug)]
pub(super) struct Carrier {
    /// Id of the server.
    pub server_id: Arc<str>,
    /// Process of the server.
    pub server: Arc<ServerProcess>,
    /// Statistics of the tunnel.
    pub stats: Arc<TunnelStats>,
    /// The control stream.
    pub session: Rc<Shared<AgentSession>>,
    /// Sessions over the tunnel.
    pub notices: Rc<Notices>,
    /// The tunnel.
    pub connection: Connection,
}

type SessionDial = Dialled<SessionSend, SessionRecv>;

/// Serves one stream.
pub(super) fn serve(
    worker: Rc<Worker>,
    carrier: Rc<Carrier>,
    halves: (Send, Recv),
) -> impl Future<Output = ()> {
    // Before the first poll: a handover waits for it.
    let counted = (worker.handover.dial(), OnTunnel::new(carrier.stats.clone()));
    // What a dial takes is given back before bytes are moved, for days perhaps.
    let begun = Box::pin(begin(worker.clone(), carrier.clone(), counted, halves));
    async move {
        let Some((mut dialled, on_tunnel)) = begun.await else {
            return;
        };
        let server = Some(&*carrier.server);
        let ending = dialled.relay(&worker, on_tunnel, server).await;
        ended(&worker, &carrier, dialled, ending);
    }
}

/// Reads the head of a stream. Returns the connection that is to be relayed, if any. The stream counts as a dial under
/// way until then.
async fn begin(
    worker: Rc<Worker>,
    carrier: Rc<Carrier>,
    (under_way, on_tunnel): (Option<Permit>, OnTunnel),
    (send, mut recv): (Send, Recv),
) -> Option<(Box<SessionDial>, OnTunnel)> {
    let head = match timeout(REQUEST_TIMEOUT, recv.read_head(StreamHead::decode)).await {
        Ok(Ok(head)) => head,
        Ok(Err(HeadError::Malformed(error))) => {
            let server = &carrier.server_id;
            tracing::warn!(%server, error = report(&error), "request refused");
            let refused = DialResponse::Refused {
                reason: error.reason(),
                detail: error.to_string(),
            };
            SessionSend::new(send, None).answer(refused).await;
            return None;
        }
        // The server gave up, or the tunnel is gone: there is no peer to answer.
        Ok(Err(HeadError::End(_))) | Err(_) => return None,
    };
    let dialled = match head {
        StreamHead::Dial(request) => begin_dial(&worker, &carrier, request, (send, recv)).await,
        StreamHead::Resume(request) => resume(&worker, &carrier, &request, (send, recv)).await,
        StreamHead::Notices => {
            drop((under_way, on_tunnel));
            exchange_notices(&carrier, (send, recv)).await;
            return None;
        }
    };
    dialled.map(|dialled| (dialled, on_tunnel))
}

async fn begin_dial(
    worker: &Worker,
    carrier: &Carrier,
    request: DialRequest,
    (send, recv): (Send, Recv),
) -> Option<Box<SessionDial>> {
    let session = match request.session {
        None => None,
        Some(key) => match begin_session(worker, carrier, key) {
            Some(session) => Some(session),
            None => {
                let server = &carrier.server_id;
                tracing::warn!(%server, "the server uses the name of a session twice");
                let refused = DialResponse::Refused {
                    reason: CloseReason::MalformedDial,
                    detail: "there is a session of that name or number".into(),
                };
                SessionSend::new(send, None).answer(refused).await;
                return None;
            }
        },
    };
    let send = SessionSend::new(send, session.clone());
    let recv = SessionRecv::new(recv, session);
    dial(worker, &carrier.server_id, &request, (send, recv)).await
}

fn begin_session(worker: &Worker, carrier: &Carrier, key: SessionKey) -> Option<Rc<Carried>> {
    let state = worker
        .sessions
        .begin(key.id, &carrier.server, &carrier.stats)?;
    carrier.notices.add(key.number, state)
}

/// Continues a session, or tells the server why not.
async fn resume(
    worker: &Worker,
    carrier: &Carrier,
    request: &ResumeRequest,
    (send, recv): (Send, Recv),
) -> Option<Box<SessionDial>> {
    let id = request.key.id;
    let found = worker.sessions.take(id, &carrier.server, &carrier.stats);
    let parked = match found {
        Found::Parked(parked) => parked,
        Found::Carried => {
            refuse(send, ResumeResponse::Busy).await;
            return None;
        }
        Found::Unknown => {
            refuse(send, ResumeResponse::Unknown).await;
            return None;
        }
    };
    let (cause, stall) = (parked.cause, parked.at.elapsed());
    match accept((send, recv), &carrier.notices, request, parked.state).await {
        Outcome::Resumed(send, recv) => {
            let Some(connection) = parked.connection else {
                // The notices of the tunnel do the rest.
                close((send, recv));
                return None;
            };
            let connection = connection.resume(stall);
            let connection = connection
                .inspect_err(|error| {
                    let error = report(error);
                    tracing::warn!(error, "a connection can't go on over another tunnel");
                })
                .ok()?;
            worker.sessions.metrics.resumed(cause, stall);
            Some(Box::new(Dialled {
                connection,
                send,
                recv,
            }))
        }
        Outcome::Ended(reason) => {
            if let Some(connection) = parked.connection {
                let reason = reason.unwrap_or(CloseReason::Finished);
                worker.sessions.metrics.lost(reason);
                connection.end(worker, reason);
            }
            None
        }
        // Only the server asks.
        Outcome::Later(_) => None,
    }
}

/// Exchanges notices until the tunnel ends.
async fn exchange_notices(carrier: &Carrier, halves: (Send, Recv)) {
    let in_use = || carrier.session.note_traffic(Instant::now());
    let end = carrier.notices.run(halves, in_use).await;
    if !matches!(end, NoticesEnd::Tunnel(_)) {
        let text = end.to_string();
        carrier.connection.close(CloseReason::ProtocolError, &text);
    }
}

/// Parks a session whose tunnel was lost. Writes the record of a connection that has ended.
fn ended(worker: &Worker, carrier: &Carrier, dialled: Box<SessionDial>, ending: RelayEnd) {
    let Dialled {
        connection, send, ..
    } = *dialled;
    let session = send.session().filter(|_| ending.by == ClosedBy::Link);
    let detached = session.map(|session| session.detach(ending.reason, Instant::now()));
    let state = match detached {
        Some(Detached::Safe(state)) => state,
        Some(Detached::Finished) => {
            connection.end_in_order(worker);
            return;
        }
        Some(Detached::Ended(_) | Detached::Plain) | None => {
            return connection.end(worker, ending);
        }
    };
    let parked = match connection.park() {
        Ok(parked) => Box::new(parked),
        Err(error) => {
            return tracing::warn!(
                error = report(&error),
                "a connection can't wait for a tunnel"
            );
        }
    };
    let (sessions, server) = (&worker.sessions, &carrier.server);
    let kept = sessions.park(worker, server, ending.reason, state, Some(parked));
    if let Err(Some(ended)) = kept {
        ended.end(worker, ending.reason);
    }
}

impl Carrier {
    /// Parks the sessions whose connections have ended, when the tunnel was lost for `reason`.
    pub(super) fn park_orphans(&self, worker: &Worker, reason: CloseReason) {
        self.notices.lose(reason);
        let reason = self.notices.lost().unwrap_or(reason);
        self.park(worker, reason, self.notices.detach_orphans(reason));
    }

    /// Gives sessions up that the server wants to continue over another tunnel.
    pub(super) fn move_away(&self, worker: &Worker, ids: &HashSet<SessionId>) {
        self.park(worker, CloseReason::Replaced, self.notices.evict_some(ids));
    }

    fn park(&self, worker: &Worker, reason: CloseReason, states: Vec<SessionState>) {
        for state in states {
            // Without a connection nothing is left to end.
            let _ = { &worker.sessions }.park(worker, &self.server, reason, Box::new(state), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_output<A, F>(_: impl FnOnce(A) -> F) -> usize {
        size_of::<F>()
    }

    /// Most of what an idle connection costs an agent besides its socket and stream.
    #[test]
    fn a_connection_that_waits_is_small() {
        let size = size_of_output(|(worker, carrier, halves)| serve(worker, carrier, halves));
        assert!(size <= 480, "{size}");
    }
}
