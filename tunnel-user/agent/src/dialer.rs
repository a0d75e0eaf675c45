//! One dialled connection on the worker: read the request, ask the policy, connect, answer, relay.
//!
//! A name is resolved once, and the address that the policy allowed, as an address or by the name, is
//! the one that is dialled.

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
use tunnel_proto::preface::{
    Destination, DialRequest, DialResponse, Host, PrefaceError, StreamHead,
};

use super::happy_eyeballs::race;
use super::observer::ObservedConnection;
use super::stats::{OnTunnel, TunnelStats};
use super::tunnel_info::TunnelInfo;
use super::worker::{Admitted, ENDING, Worker};
use cpc_datapath::socket::prepare;
use cpc_datapath::stream::{RecvHalf, SendEnd, SendHalf};
use cpc_datapath::{ClosedBy, Progress, Socket, relay};
use cpc_host::report::report;
use cpc_observe::access::{ConnectionMeter, Record};
use cpc_observe::metrics::{Closer, FrontendKind};
use cpc_transport::tunnel::{HeadError, Recv, Send, TunnelRecv};

/// Timeout of the request on a stream.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Reason why a target was not reached: the answer to the server.
#[derive(Debug)]
struct Failure {
    reason: CloseReason,
    detail: String,
}

/// The half of a stream that answers a server's dial request.
pub trait Answer: SendHalf {
    /// Whether the server asks another agent when this one answers that it is ending.
    const ASKS_OTHERS: bool;

    /// Sends the dial response; a refusal ends the stream. A server that is gone shows in later
    /// operations.
    fn answer(&mut self, response: DialResponse) -> impl Future<Output = ()>;

    /// Sets the options of a target's socket that the tunnel needs.
    ///
    /// # Errors
    /// The error of the system call.
    fn fit(&self, target: &TcpStream) -> io::Result<()>;
}

impl Answer for Send {
    const ASKS_OTHERS: bool = true;

    async fn answer(&mut self, response: DialResponse) {
        let mut bytes = BytesMut::new();
        response.encode(&mut bytes);
        let _ = self.send(&mut bytes.freeze()).await;
        if response != DialResponse::Connected {
            self.finish();
        }
    }

    fn fit(&self, _target: &TcpStream) -> io::Result<()> {
        Ok(())
    }
}

/// Serves one stream of a tunnel that a server has opened.
pub(super) fn serve(
    worker: Rc<Worker>,
    (server_id, stats): (Arc<str>, Arc<TunnelStats>),
    halves: (Send, Recv),
) -> impl Future<Output = ()> {
    // What a dial takes is given back before bytes are moved, for days perhaps.
    let asked = Box::pin(ask(worker.clone(), server_id, halves));
    async move {
        let Some(mut dialled) = asked.await else {
            return;
        };
        dialled.relay(&worker, OnTunnel::new(stats)).await;
    }
}

/// Reads the request, and dials. Returns `None` if there is nothing to relay.
async fn ask(
    worker: Rc<Worker>,
    server_id: Arc<str>,
    (mut send, mut recv): (Send, Recv),
) -> Option<Box<Dialled<Send, Recv>>> {
    let request = match timeout(REQUEST_TIMEOUT, recv.read_head(decode_dial)).await {
        Ok(Ok(request)) => request,
        Ok(Err(HeadError::Malformed(error))) => {
            tracing::warn!(server = %server_id, error = report(&error), "dial request refused");
            let refused = DialResponse::Refused {
                reason: error.reason(),
                detail: error.to_string(),
            };
            send.answer(refused).await;
            return None;
        }
        // The server gave up, or the tunnel is gone: there is no peer to answer.
        Ok(Err(HeadError::End(_))) | Err(_) => return None,
    };
    dial(&worker, &server_id, &request, (send, recv)).await
}

/// Reads the head of a stream, which must be a dial.
fn decode_dial(buf: &[u8]) -> Result<Option<(DialRequest, usize)>, PrefaceError> {
    match StreamHead::decode(buf)? {
        Some((StreamHead::Dial(request), size)) => Ok(Some((request, size))),
        Some(_) => Err(PrefaceError::UnsupportedKind(0)),
        None => Ok(None),
    }
}

/// Serves a dial of a server over any tunnel: asks the policy, connects, answers, and relays to the end.
pub async fn serve_dial<S: Answer, R: RecvHalf>(
    worker: Rc<Worker>,
    tunnel: TunnelInfo,
    request: DialRequest,
    halves: (S, R),
) {
    // What a dial takes is given back before bytes are moved, for days perhaps.
    let dialled = Box::pin(dial(&worker, &tunnel.server_id, &request, halves)).await;
    if let Some(mut dialled) = dialled {
        let on_tunnel = OnTunnel::new(tunnel.stats);
        dialled.relay(&worker, on_tunnel).await;
    }
}

/// A connection whose target is connected.
struct Dialled<S, R> {
    record: Record,
    socket: Socket,
    _admitted: Admitted,
    _observed: ObservedConnection,
    send: S,
    recv: R,
    /// Bytes that the server has not taken yet.
    start: Progress,
}

/// Dials for a request and answers. Returns `None` if it was refused, or the server gave it up.
async fn dial<S: Answer, R: RecvHalf>(
    worker: &Worker,
    server_id: &Arc<str>,
    request: &DialRequest,
    halves: (S, R),
) -> Option<Box<Dialled<S, R>>> {
    let mut record = Record::new(
        request.id,
        FrontendKind::Tunnel,
        request.destination.clone(),
    );
    record.peer = Some(server_id.clone());
    let span = record.span();
    let dialled = dial_and_answer(worker, request, record, halves);
    dialled.instrument(span).await
}

async fn dial_and_answer<S: Answer, R: RecvHalf>(
    worker: &Worker,
    request: &DialRequest,
    mut record: Record,
    (mut send, recv): (S, R),
) -> Option<Box<Dialled<S, R>>> {
    let dialled = {
        let connected = async {
            if S::ASKS_OTHERS && worker.is_ending() {
                return Err(Failure {
                    reason: CloseReason::Draining,
                    detail: ENDING.into(),
                });
            }
            let (socket, admitted) = Box::pin(admit_and_connect(worker, request)).await?;
            let fitted = send.fit(&socket).and_then(|()| Socket::new(socket));
            let socket = fitted.map_err(|error| Failure {
                reason: CloseReason::DialFailed,
                detail: error.to_string(),
            })?;
            Ok((socket, admitted))
        };
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
                record.end(by, reason, &reason, &worker.metrics);
                return None;
            }
        }
    };
    let (socket, admitted) = match dialled {
        Ok(dialled) => dialled,
        Err(Failure { reason, detail }) => {
            record.end(Closer::Agent, reason, &detail, &worker.metrics);
            send.answer(DialResponse::Refused { reason, detail }).await;
            return None;
        }
    };
    send.answer(DialResponse::Connected).await;
    record.reached(&worker.metrics);
    Some(Box::new(Dialled {
        record,
        socket,
        _admitted: admitted,
        _observed: ObservedConnection::new(worker.observer.clone()),
        send,
        recv,
        start: Progress::default(),
    }))
}

impl<S: SendHalf, R: RecvHalf> Dialled<S, R> {
    /// Relays to the end, and writes the record.
    #[expect(
        clippy::manual_async_fn,
        reason = "an async fn keeps its arguments twice"
    )]
    fn relay(&mut self, worker: &Worker, on_tunnel: OnTunnel) -> impl Future<Output = ()> {
        async move {
            let Self {
                record,
                socket,
                send,
                recv,
                start,
                ..
            } = self;
            let meter = ConnectionMeter::<false> {
                bytes: &record.bytes,
                totals: &on_tunnel.totals,
                metrics: &worker.metrics,
            };
            let ending = relay(socket, send, recv, start, &worker.budget, &meter).await;
            let closer = match ending.by {
                ClosedBy::Local => Closer::Target,
                ClosedBy::Remote => Closer::Client,
                ClosedBy::Link | ClosedBy::Limit => Closer::Tunnel,
            };
            record.end(closer, ending.reason, &ending.reason, &worker.metrics);
        }
    }
}

async fn admit_and_connect(
    worker: &Worker,
    request: &DialRequest,
) -> Result<(TcpStream, Admitted), Failure> {
    let admitted = worker
        .admit()
        .map_err(|(reason, detail)| Failure { reason, detail })?;
    let start = Instant::now();
    let deadline = start + request.deadline;
    let connected = connect(worker, &request.destination);
    let connected = timeout_at(deadline, connected).await.unwrap_or_else(|_| {
        let detail = format!("{} did not answer in time", request.destination);
        Err(Failure {
            reason: CloseReason::DialTimeout,
            detail,
        })
    });
    if let Some(observer) = &worker.observer {
        match &connected {
            Ok(_) => observer.target_connected(start.elapsed()),
            Err(failure) => observer.target_failed(failure.reason),
        }
    }
    Ok((connected?, admitted))
}

async fn connect(worker: &Worker, destination: &Destination) -> Result<TcpStream, Failure> {
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
    let (allowed, others): (Vec<_>, Vec<_>) = addresses
        .into_iter()
        .partition(|addr| policy.allows_resolved(destination, addr.ip()));
    // A name that is allowed fails for what it resolves to alone.
    let guarded = others.first().filter(|_| policy.allows(destination));
    let refused = || Failure {
        reason: CloseReason::PolicyDenied,
        detail: match guarded {
            None => format!("{destination} is not in the agent's allow-list (allow)"),
            Some(addr) => format!(
                "{destination} resolves to {}, which the agent's allow-list (allow) opens only by \
                 an address rule of its own",
                addr.ip()
            ),
        },
    };
    let failed = |(addr, error): (SocketAddr, io::Error)| Failure {
        reason: reason_of(&error),
        detail: format!("dial {addr}: {error}"),
    };
    let [_, _, ..] = &allowed[..] else {
        let addr = *allowed.first().ok_or_else(refused)?;
        return open(addr).await.map_err(|error| failed((addr, error)));
    };
    let name = destination.host.to_string();
    let ordered = worker.answered.order(&name, &allowed, Instant::now());
    let raced = race(&ordered, open).await;
    let (addr, socket) = raced.map_err(|last| last.map_or_else(refused, failed))?;
    worker
        .answered
        .note(&name, &allowed, addr.ip(), Instant::now());
    Ok(socket)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_output<A, F>(_: impl FnOnce(A) -> F) -> usize {
        size_of::<F>()
    }

    /// Most of what an idle connection costs an agent besides its socket and stream.
    #[test]
    fn a_connection_that_waits_is_small() {
        let size = size_of_output(|(worker, server, halves)| serve(worker, server, halves));
        assert!(size <= 408, "{size}");
    }
}
