//! One dialled connection on the worker: ask the policy, connect, answer, relay.
//!
//! A name is resolved once, and the address that the policy allowed, as an address or by the name, is
//! the one that is dialled.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tracing::Instrument;
use tunnel_proto::close::CloseReason;
use tunnel_proto::handover;
use tunnel_proto::preface::{Destination, DialRequest, DialResponse, Host};

use super::handover::kept::KeptTarget;
use super::happy_eyeballs::race;
use super::observer::ObservedConnection;
use super::sessions::ServerProcess;
use super::stats::OnTunnel;
use super::tunnel_info::TunnelInfo;
use super::worker::{Admitted, ENDING, Worker};
use cpc_datapath::socket::{Portable, prepare};
use cpc_datapath::stream::{RecvHalf, SendEnd, SendHalf};
use cpc_datapath::{ClosedBy, LocalSocket as _, Progress, RelayEnd, Socket, relay};
use cpc_observe::access::{ConnectionMeter, Record};
use cpc_observe::metrics::{Closer, FrontendKind};
use cpc_session::SessionSend;

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

impl Answer for SessionSend {
    const ASKS_OTHERS: bool = true;

    async fn answer(&mut self, response: DialResponse) {
        let mut bytes = BytesMut::new();
        response.encode(&mut bytes);
        let _ = self.stream().send(&mut bytes.freeze()).await;
        if response != DialResponse::Connected {
            self.finish();
        }
    }

    fn fit(&self, _target: &TcpStream) -> io::Result<()> {
        Ok(())
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
        let ending = dialled.relay(&worker, on_tunnel, None).await;
        dialled.connection.end(&worker, ending);
    }
}

/// A connection whose target is connected.
pub(super) struct Dialled<S, R> {
    pub(super) connection: Connection,
    pub(super) send: S,
    pub(super) recv: R,
}

/// A connection to a target, without a tunnel.
pub(super) struct Connection {
    record: Record,
    socket: Socket,
    admitted: Admitted,
    observed: ObservedConnection,
    progress: Progress,
}

/// A connection to a target that waits for a tunnel. It may move between threads.
pub(super) struct ParkedConnection {
    record: Record,
    socket: <Socket as Portable>::Packed,
    admitted: Admitted,
    observed: ObservedConnection,
    progress: Progress,
}

/// Dials for a request and answers. Returns `None` if it was refused, or the server gave it up.
pub(super) async fn dial<S: Answer, R: RecvHalf>(
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
        connection: Connection {
            record,
            socket,
            admitted,
            observed: ObservedConnection::new(worker.observer.clone()),
            progress: Progress::default(),
        },
        send,
        recv,
    }))
}

impl<S: SendHalf, R: RecvHalf> Dialled<S, R> {
    /// Relays until the connection has ended, or its tunnel.
    #[expect(
        clippy::manual_async_fn,
        reason = "an async fn keeps its arguments twice"
    )]
    pub(super) fn relay(
        &mut self,
        worker: &Worker,
        on_tunnel: OnTunnel,
        server: Option<&ServerProcess>,
    ) -> impl Future<Output = RelayEnd> {
        async move {
            let Connection {
                record,
                socket,
                progress,
                ..
            } = &mut self.connection;
            let meter = ConnectionMeter::<false> {
                bytes: &record.bytes,
                totals: &on_tunnel.totals,
                metrics: &worker.metrics,
            };
            let keeper = KeptTarget {
                keeper: &worker.keeper,
                server,
                record,
            };
            let (send, recv) = (&mut self.send, &mut self.recv);
            relay(
                socket,
                send,
                recv,
                progress,
                &worker.budget,
                (&meter, &keeper),
            )
            .await
        }
    }
}

impl Connection {
    /// Writes the record of a connection that has ended.
    pub(super) fn end(&self, worker: &Worker, ending: RelayEnd) {
        let closer = match ending.by {
            ClosedBy::Local => Closer::Target,
            ClosedBy::Remote => Closer::Client,
            ClosedBy::Link | ClosedBy::Limit => Closer::Tunnel,
        };
        let reason = ending.reason;
        self.record.end(closer, reason, &reason, &worker.metrics);
    }

    /// Closes a connection whose directions have both ended in order, although its tunnel was lost.
    pub(super) fn end_in_order(&self, worker: &Worker) {
        self.socket.reset_on_close(false);
        self.end(
            worker,
            RelayEnd {
                by: ClosedBy::Remote,
                reason: CloseReason::Finished,
            },
        );
    }

    /// Prepares the connection for another tunnel.
    ///
    /// # Errors
    /// The error of the system call.
    pub(super) fn park(self) -> io::Result<ParkedConnection> {
        tracing::debug!(id = %self.record.id, "the connection waits for another tunnel");
        Ok(ParkedConnection {
            record: self.record,
            socket: self.socket.pack()?,
            admitted: self.admitted,
            observed: self.observed,
            progress: self.progress,
        })
    }
}

impl ParkedConnection {
    /// Goes on over another tunnel, after `stall` without one.
    ///
    /// # Errors
    /// The error of the system call.
    pub(super) fn resume(mut self, stall: Duration) -> io::Result<Connection> {
        self.record.resumed(stall);
        tracing::debug!(id = %self.record.id, "the connection goes on over another tunnel");
        Ok(Connection {
            record: self.record,
            socket: Socket::unpack(self.socket)?,
            admitted: self.admitted,
            observed: self.observed,
            progress: self.progress,
        })
    }

    /// Returns the connection for another process, with its socket. Returns `None`, and writes the record, if the
    /// target has reset the connection.
    pub(super) fn save(mut self, worker: &Worker) -> Option<(handover::Socket, OwnedFd)> {
        let Some(parts) = Socket::into_parts(self.socket) else {
            let reason = CloseReason::PeerReset;
            self.record
                .end(Closer::Target, reason, &reason, &worker.metrics);
            return None;
        };
        self.progress.append(&parts.ahead);
        let saved = handover::Socket {
            kind: parts.kind.into(),
            progress: Some(self.progress.save()),
            record: Some(self.record.save()),
            ..handover::Socket::default()
        };
        Some((saved, parts.descriptor))
    }

    /// Restores a connection that another process has [saved](Self::save). Returns `None`, and writes the record,
    /// if a limit refuses it.
    pub(super) fn restore(
        worker: &Worker,
        record: Record,
        socket: <Socket as Portable>::Packed,
        saved: &handover::Socket,
    ) -> Option<Self> {
        let progress = saved.progress.as_ref();
        let admitted = match worker.count() {
            Ok(admitted) => admitted,
            Err((reason, detail)) => {
                record.end(Closer::Agent, reason, &detail, &worker.metrics);
                return None;
            }
        };
        Some(Self {
            record,
            socket,
            admitted,
            observed: ObservedConnection::new(worker.observer.clone()),
            progress: progress.map(Progress::restore).unwrap_or_default(),
        })
    }

    /// Writes the record of a connection that waited in vain.
    pub(super) fn end(&self, worker: &Worker, reason: CloseReason) {
        let metrics = &worker.metrics;
        self.record.end(Closer::Tunnel, reason, &reason, metrics);
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
