//! One dialled connection on the worker: read the request, ask the policy, connect, answer, relay.
//!
//! A name is resolved once, and the address that the policy allowed is the one that is dialled.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::Instrument;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::{Destination, DialRequest, DialResponse, Host};

use super::stats::{OnTunnel, TunnelStats};
use super::worker::Worker;
use crate::datapath::socket::prepare;
use crate::datapath::stream::{SendEnd, SendHalf};
use crate::datapath::{ClosedBy, Outbound, relay};
use crate::telemetry::access::{ConnectionMeter, Record};
use crate::telemetry::metrics::{Closer, FrontendKind};
use crate::transport::stream::{HeadError, Recv, Send};

/// A stream whose request has not arrived by then is given up.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a target was not reached: what the server is answered.
#[derive(Debug)]
struct Failure {
    reason: CloseReason,
    detail: String,
}

/// Serves one stream that a server has opened.
pub(super) async fn serve(
    worker: Rc<Worker>,
    (server_id, stats): (Arc<str>, Arc<TunnelStats>),
    (send, recv): (quinn::SendStream, quinn::RecvStream),
) {
    let (mut send, mut recv) = (Send::new(send), Recv::new(recv));
    let request = match timeout(REQUEST_TIMEOUT, recv.read_head(DialRequest::decode)).await {
        Ok(Ok(request)) => request,
        Ok(Err(HeadError::Malformed(error))) => {
            tracing::warn!(server = %server_id, %error, "dial request refused");
            let refused = DialResponse::Refused {
                reason: error.reason(),
                detail: error.to_string(),
            };
            answer(&mut send, &refused).await;
            return send.finish();
        }
        // Given up by the server, or with the tunnel: nobody is there to be answered.
        Ok(Err(HeadError::End(_))) | Err(_) => return,
    };
    let mut record = Record::new(
        request.id,
        FrontendKind::Tunnel,
        request.destination.clone(),
    );
    record.peer = Some(server_id.to_string());
    let span = record.span();
    let served = connection(&worker, &stats, &request, record, (send, recv));
    served.instrument(span).await;
}

/// Dials for a request, answers and relays.
async fn connection(
    worker: &Rc<Worker>,
    stats: &TunnelStats,
    request: &DialRequest,
    mut record: Record,
    (mut send, recv): (Send, Recv),
) {
    let dialled = {
        let connected = admit_and_connect(worker, request);
        tokio::select! {
            connected = connected => connected,
            // The client has gone, or the server gives up: so do we.
            end = send.stopped() => {
                let reason = match end {
                    SendEnd::Stopped(reason) | SendEnd::Link(reason) => reason,
                    SendEnd::Acknowledged => CloseReason::Internal,
                };
                let by = match reason {
                    CloseReason::Cancelled => Closer::Client,
                    _ => Closer::Server,
                };
                return record.end(by, reason, &reason, &worker.metrics);
            }
        }
    };
    let (socket, _admitted) = match dialled {
        Ok(dialled) => dialled,
        Err(Failure { reason, detail }) => {
            record.end(Closer::Agent, reason, &detail, &worker.metrics);
            answer(&mut send, &DialResponse::Refused { reason, detail }).await;
            return send.finish();
        }
    };
    answer(&mut send, &DialResponse::Connected).await;
    record.reached(&worker.metrics);

    let _on_tunnel = OnTunnel::new(stats);
    let meter = ConnectionMeter {
        bytes: &record.bytes,
        totals: &stats.totals,
        metrics: &worker.metrics,
        local_is_client: false,
    };
    let ending = relay(
        socket,
        send,
        recv,
        Outbound::default(),
        &worker.budget,
        &meter,
    )
    .await;
    let closer = match ending.by {
        ClosedBy::Local => Closer::Target,
        ClosedBy::Remote => Closer::Client,
        ClosedBy::Link => Closer::Tunnel,
    };
    record.end(closer, ending.reason, &ending.reason, &worker.metrics);
}

async fn answer(send: &mut Send, response: &DialResponse) {
    let mut bytes = BytesMut::new();
    response.encode(&mut bytes);
    // A server that is gone shows in what follows.
    let _ = send.send(&mut bytes.freeze()).await;
}

async fn admit_and_connect(
    worker: &Rc<Worker>,
    request: &DialRequest,
) -> Result<(TcpStream, super::worker::Admitted), Failure> {
    let admitted = worker
        .admit()
        .map_err(|(reason, detail)| Failure { reason, detail })?;
    let deadline = Instant::now() + request.deadline;
    let connected = connect(worker, &request.destination, deadline);
    let socket = timeout_at(deadline, connected).await.unwrap_or_else(|_| {
        let detail = format!("{} did not answer in time", request.destination);
        Err(Failure {
            reason: CloseReason::DialTimeout,
            detail,
        })
    })?;
    Ok((socket, admitted))
}

async fn connect(
    worker: &Worker,
    destination: &Destination,
    deadline: Instant,
) -> Result<TcpStream, Failure> {
    let addresses = match &destination.host {
        Host::Ip(addr) => vec![SocketAddr::new(*addr, destination.port)],
        Host::Name(name) => {
            let found = tokio::net::lookup_host((name.as_str(), destination.port)).await;
            let found = found.map_err(|e| Failure {
                reason: CloseReason::NameNotFound,
                detail: format!("{name}: {e}"),
            })?;
            found
                .map(|addr| SocketAddr::new(addr.ip().to_canonical(), addr.port()))
                .collect()
        }
    };
    let policy = worker.policy.load();
    let mut last = Failure {
        reason: CloseReason::PolicyDenied,
        detail: format!("{destination} is not in the agent's allow-list (allow)"),
    };
    let allowed = addresses
        .into_iter()
        .filter(|a| policy.allows(a.ip(), a.port()));
    let allowed: Vec<_> = allowed.collect();
    for (i, addr) in allowed.iter().enumerate() {
        // One that does not answer leaves time for the others.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(allowed.len() - i).unwrap_or(u32::MAX);
        let opened = timeout(share, open(*addr)).await;
        let opened = opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        match opened {
            Ok(socket) => return Ok(socket),
            Err(error) => {
                last = Failure {
                    reason: reason_of(&error),
                    detail: format!("dial {addr}: {error}"),
                }
            }
        }
    }
    Err(last)
}

async fn open(addr: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpStream::connect(addr).await?;
    prepare(&socket)?;
    Ok(socket)
}

fn reason_of(error: &io::Error) -> CloseReason {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => CloseReason::ConnectionRefused,
        io::ErrorKind::HostUnreachable => CloseReason::HostUnreachable,
        io::ErrorKind::NetworkUnreachable => CloseReason::NetworkUnreachable,
        io::ErrorKind::TimedOut => CloseReason::DialTimeout,
        _ => CloseReason::DialFailed,
    }
}
