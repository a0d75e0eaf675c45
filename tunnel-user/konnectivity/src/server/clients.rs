//! Konnectivity's `ProxyService`, on a Unix socket and on TCP with mutual TLS: what kube-apiserver's
//! egress selector speaks in its mode GRPC, and any program that uses Konnectivity's client library.
//!
//! One stream is one connection, and an HTTP/2 connection may carry many. The first packet is
//! DIAL_REQ; its answer, DIAL_RSP, comes before the target's first byte. Then DATA either way, each
//! with HTTP/2's credit for back-pressure: a client that stops reading stalls its stream alone.
//!
//! The protocol has no half-close. Either side's end is the end of both directions, yet what was
//! sent before it still arrives: a client's CLOSE_REQ is answered at once, and the target gets its
//! end of file behind all data; a target's end becomes CLOSE_RSP behind all data. A connection that
//! broke is told from one that ended: its CLOSE_RSP carries an error, and the call the status
//! UNAVAILABLE, or that of the client's own fault.

mod socket;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;
use tracing::Instrument;
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::{PROXY, Packet, text};
use tunnel_proto::preface::Destination;

use self::socket::ProxySocket;
use super::answer::words;
use crate::grpc::server::{Call, serve as serve_http2};
use crate::grpc::{
    ALPN, AnyAuthority, Code, PacketReceiver, PacketSender, Settings, Status, StreamEnd, tcp,
};
use crate::metrics::{ClientTraffic, PacketKind, ProxyServerMetrics, Service};
use cpc_config::server::LimitsConfig;
use cpc_config::tls_floor::{TlsFloor, TlsVersion};
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::lifecycle;
use cpc_host::report::report;
use cpc_observe::metrics::{Closer, FrontendKind};
use cpc_server::extension::{ClientProtocol, ClientRequest, DialError, Scope, ShardHandle};

/// Timeout for DIAL_REQ on a stream, and for the client to close a stream after its dial has failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for a client to notice the end of a call.
const GOODBYE: Duration = Duration::from_millis(500);

/// `ProxyService`, on all shards.
#[derive(Debug)]
pub(super) struct ProxyService {
    metrics: ProxyServerMetrics,
    /// HTTP/2 connections, each of which may carry many dials.
    connections: ConcurrencyLimit,
}

impl ProxyService {
    /// Creates the service.
    pub(super) fn new(metrics: ProxyServerMetrics, limits: &LimitsConfig) -> Self {
        Self {
            metrics,
            connections: ConcurrencyLimit::new(limits.connections),
        }
    }

    /// Serves one HTTP/2 connection.
    async fn serve(
        self: Arc<Self>,
        shard: ShardHandle,
        scope: Arc<Scope>,
        client: Option<SocketAddr>,
        io: impl AsyncRead + AsyncWrite + Unpin,
    ) {
        let Some(_counted) = self.connections.acquire() else {
            let client = client.map(tracing::field::display);
            return tracing::warn!(client, "too many gRPC connections (limits.connections)");
        };
        // Until then new calls are served as well.
        let stopping = lifecycle::ended(shard.phase());
        let traffic = Rc::new(self.metrics.clients());
        let on_call = |call| {
            let open = self.metrics.rpc(Service::Proxy);
            let (shard, scope, traffic) = (shard.clone(), scope.clone(), traffic.clone());
            tokio::task::spawn_local(async move {
                let _open = open;
                stream(&shard, &scope, client, (call, traffic)).await
            });
        };
        if let Err(error) = serve_http2(io, &Settings::FRONTEND, PROXY, stopping, on_call).await {
            tracing::debug!(
                client = client.map(tracing::field::display),
                error = report(&error),
                "gRPC client has left"
            );
        }
    }
}

impl ClientProtocol for ProxyService {
    fn alpn(&self) -> Vec<Vec<u8>> {
        vec![ALPN.to_vec()]
    }

    fn floor(&self) -> TlsFloor {
        TlsFloor {
            // As its clients know it from Konnectivity.
            min_version: TlsVersion::Tls12,
            ..TlsFloor::default()
        }
    }

    fn prepare(&self, listener: &TcpListener) -> io::Result<()> {
        tcp::prepare(listener)
    }

    fn serve_unix(
        self: Arc<Self>,
        shard: ShardHandle,
        scope: Arc<Scope>,
        socket: UnixStream,
    ) -> LocalBoxFuture<'static, ()> {
        Box::pin(self.serve(shard, scope, None, AnyAuthority::new(socket)))
    }

    fn serve_tls(
        self: Arc<Self>,
        shard: ShardHandle,
        scope: Arc<Scope>,
        client: SocketAddr,
        session: TlsStream<TcpStream>,
    ) -> LocalBoxFuture<'static, ()> {
        Box::pin(self.serve(shard, scope, Some(client), session))
    }
}

/// Request of a client.
struct Wanted {
    protocol: String,
    address: String,
    random: i64,
}

async fn stream(
    shard: &ShardHandle,
    scope: &Arc<Scope>,
    client: Option<SocketAddr>,
    (call, traffic): (Call, Rc<ClientTraffic>),
) {
    let Ok((mut sender, mut receiver)) = call.accept(&[]) else {
        return;
    };
    receiver.charge_to(shard.budget(&scope.tenant));
    let request = read_dial(&mut sender, &mut receiver, &traffic);
    match timeout(REQUEST_TIMEOUT, request).await {
        Ok(Ok(Some(request))) => {
            let socket = ProxySocket::new(sender, receiver, request.random, traffic);
            serve_dial(shard, scope, client, &request, &socket).await;
        }
        Ok(Ok(None)) => {
            drain(&mut receiver).await;
            sender.finish(&Status::ok());
        }
        Ok(Err(end)) => {
            tracing::debug!(
                client = client.map(tracing::field::display),
                error = report(&end),
                "no DIAL_REQ"
            );
            traffic.not_received(end.code().name());
            sender.finish(&end.status());
        }
        Err(_) => sender.finish(&Status::new(
            Code::DEADLINE_EXCEEDED,
            "DIAL_REQ did not arrive in time",
        )),
    }
}

/// Waits for the request to dial. Returns `None` if there will be none.
async fn read_dial(
    sender: &mut PacketSender,
    receiver: &mut PacketReceiver,
    traffic: &ClientTraffic,
) -> Result<Option<Wanted>, StreamEnd> {
    let mut close = async |connect_id, error: &str| {
        let error = error.to_owned();
        traffic.sent(PacketKind::CloseResponse);
        let mut answer = Packet::CloseResponse { error, connect_id }.frame();
        sender.send(&mut answer).await
    };
    loop {
        let packet = receiver.next().await?;
        packet.iter().for_each(|packet| traffic.received(packet));
        match packet {
            Some(Packet::DialRequest {
                protocol,
                address,
                random,
            }) => {
                return Ok(Some(Wanted {
                    protocol,
                    address,
                    random,
                }));
            }
            Some(Packet::CloseRequest { connect_id }) => {
                close(connect_id, text::CLOSE_BEFORE_DIAL).await?;
            }
            Some(Packet::Data { connect_id, .. }) => {
                close(connect_id, text::DATA_BEFORE_DIAL).await?;
                return Ok(None);
            }
            Some(_) => {}
            None => return Ok(None),
        }
    }
}

/// Dials, answers, relays, and ends the call.
async fn serve_dial(
    shard: &ShardHandle,
    scope: &Arc<Scope>,
    client: Option<SocketAddr>,
    request: &Wanted,
    socket: &ProxySocket,
) {
    let destination = match destination(request) {
        Ok(destination) => destination,
        Err(error) => return refuse(socket, &error).await,
    };
    let admitted = shard.admit_client(scope, FrontendKind::Grpc, destination, client);
    match admitted {
        Ok(admitted) => {
            let span = admitted.span();
            serve_admitted(admitted, socket).instrument(span).await;
        }
        Err(error) => refuse(socket, &error.to_string()).await,
    }
}

async fn serve_admitted(admitted: ClientRequest, socket: &ProxySocket) {
    // The stream can't leave the HTTP/2 connection that it belongs to, and the connection is not only
    // this stream's.
    match admitted.dial(&socket).await {
        Ok(connection) => {
            // A client that is gone by now shows in the relay as well; so does one that takes no
            // answer, once there is something for it.
            let _ = timeout(REQUEST_TIMEOUT, socket.connected()).await;
            // The halves have told their ends before the client is told the end.
            let (reason, _permit) = connection.relay(&socket).await;
            socket.end(&socket.close(reason));
            // It counts until its last words have left: a process that drains waits for that.
            let _ = timeout(GOODBYE, socket.left()).await;
        }
        Err(error) => match error.by {
            // A client that has left gets no answer, and none is counted.
            Closer::Client => socket.end(&socket.fault().unwrap_or_else(Status::ok)),
            _ => refuse(socket, &explain(&error)).await,
        },
    }
}

fn destination(request: &Wanted) -> Result<Destination, String> {
    if request.protocol != "tcp" {
        let protocol = request.protocol.escape_debug();
        return Err(format!("dial {protocol}: only tcp is served here"));
    }
    let destination = request.address.parse::<Destination>();
    destination.map_err(|error| format!("dial tcp: {error}"))
}

/// Returns the error of DIAL_RSP: it begins with the words that Konnectivity's programs search for, if
/// there are any, and has the reason. The answer of an agent of Konnectivity is passed on unchanged.
fn explain(error: &DialError) -> String {
    match (error.reason, words(error)) {
        (CloseReason::NoRoute | CloseReason::NoAgent | CloseReason::Draining, _) => {
            format!("{}: {error}", text::NO_AGENT)
        }
        (_, Some(answer)) => answer.into_owned(),
        _ if error.is_too_late() => format!("{}: {error}", text::DIAL_TIMEOUT),
        _ => error.to_string(),
    }
}

/// Reports that the dial has failed, and waits until the client ends the stream.
async fn refuse(socket: &ProxySocket, error: &str) {
    // One that reads nothing has left, or will not learn it.
    let _ = timeout(REQUEST_TIMEOUT, socket.refused(error)).await;
    socket.end(&socket.fault().unwrap_or_else(Status::ok));
}

/// Discards packets of a client on a stream that has ended.
async fn drain(receiver: &mut PacketReceiver) {
    let drained = async { while let Ok(Some(_)) = receiver.next().await {} };
    let _ = timeout(REQUEST_TIMEOUT, drained).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpc_config::TunnelKind;
    use cpc_identity::floor::accepted;
    use rustls::version::{TLS12, TLS13};

    #[test]
    fn tls_before_1_3_is_for_grpc() {
        let metrics = ProxyServerMetrics::default();
        let service = ProxyService::new(metrics, &LimitsConfig::default());
        assert_eq!(accepted(&service.floor()).versions, [&TLS13, &TLS12]);
    }

    #[test]
    fn a_failed_dial_is_told_in_the_words_of_konnectivity() {
        for (reason, by, expected) in [
            (
                CloseReason::NoRoute,
                Closer::Server,
                "No agent available: why",
            ),
            (
                CloseReason::NoAgent,
                Closer::Server,
                "No agent available: why",
            ),
            (
                CloseReason::Draining,
                Closer::Agent,
                "No agent available: why",
            ),
            (
                CloseReason::DialTimeout,
                Closer::Target,
                "timed out waiting for backend dial: why",
            ),
            (CloseReason::LinkLost, Closer::Tunnel, "why"),
            (CloseReason::Overloaded, Closer::Server, "why"),
        ] {
            assert_eq!(explain(&DialError::new(reason, by, "why")), expected);
        }
        // The agent's own limit.
        let said = "dial tcp 10.0.0.1:80: i/o timeout";
        let (agent, destination) = ((TunnelKind::Konnectivity, "w1"), "10.0.0.1:80");
        let destination = destination.parse().unwrap();
        let reason = CloseReason::DialTimeout;
        let error = DialError::refused(agent, &destination, reason, said.into());
        assert_eq!(explain(&error), said);
    }
}
