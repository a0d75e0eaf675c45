//! One tunnel to a proxy-server: dial it, read its identity, serve its requests.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::HeaderMap;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::{CONNECT, metadata};

use super::client::{Client, ClientError};
use super::session::{Asked, Session};
use crate::dialer;
use crate::plan::ServerEndpoint;
use crate::stats::{OnTunnel, TunnelStats};
use crate::tunnel::{End, GOODBYE, LOOK_INTERVAL, TunnelInfo};
use crate::worker::Worker;
use cpc_config::address::split;
use cpc_host::lifecycle::Phase;
use cpc_observe::konnectivity::{Direction, Segment, StreamMetrics};
use cpc_transport::grpc::client::{CallError, Opened, handshake, secure};
use cpc_transport::grpc::{PacketReceiver, PacketSender, StreamEnd, tcp};

/// Timeout of the TCP connect, which is retried later.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of the server's headers, which is retried later. The server may have to verify our token
/// first.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(15);

/// Maximum length of a server's id, in bytes.
const MAX_SERVER_ID: usize = 253;

/// Reason why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// The TCP connect failed.
    #[error("TCP: {0}")]
    Connect(io::Error),
    /// The configuration is unusable.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// TLS, HTTP/2 or the call failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The server does not report its identity.
    #[error("the server's answer must have one {0}; is it a proxy-server's port for agents?")]
    Metadata(&'static str),
}

impl From<io::Error> for DialError {
    fn from(why: io::Error) -> Self {
        Self::Connect(why)
    }
}

/// An established tunnel.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// Description of the tunnel.
    pub info: TunnelInfo,
    session: Rc<Session>,
    closing: Cell<Option<CloseReason>>,
    close: Notify,
}

/// An established tunnel that is not served yet, with the server's report.
#[derive(Debug)]
pub(crate) struct Dialled {
    /// The tunnel.
    pub tunnel: Rc<Tunnel>,
    /// Number of servers.
    pub server_count: u32,
    sender: PacketSender,
    receiver: PacketReceiver,
}

/// Dials the server at `way`, which is configured as `server`, "host:port".
///
/// # Errors
/// [`DialError`].
pub(crate) async fn dial(
    client: &Client,
    endpoint: ServerEndpoint,
    server: &str,
    metrics: &StreamMetrics,
) -> Result<Dialled, DialError> {
    let host = split(server).map_or(server, |(host, _)| host);
    let (tls, name, metadata) = (client.tls()?, client.server_name(host)?, client.metadata()?);
    let metadata = metadata.iter().map(|(key, value)| (*key, value.as_str()));
    let metadata: Vec<_> = metadata.chain([(metadata::HALVES, "1")]).collect();

    let socket = timeout(CONNECT_TIMEOUT, TcpStream::connect(endpoint.address)).await;
    let socket = socket.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    tcp::prepare(&socket)?;
    let stream = secure(socket, tls, name).await?;
    let (mut channel, connection) = handshake(stream, &client.settings(), server).await?;
    // Ends with the last half of its only call.
    tokio::task::spawn_local(connection);
    let Opened {
        headers,
        sender,
        receiver,
    } = channel.open(CONNECT, &metadata, HEADERS_TIMEOUT).await?;
    let server_id = one(&headers, metadata::SERVER_ID)
        .filter(|id| !id.is_empty() && id.len() <= MAX_SERVER_ID)
        .ok_or(DialError::Metadata(metadata::SERVER_ID))?;
    let server_count = one(&headers, metadata::SERVER_COUNT)
        .and_then(|count| count.parse().ok())
        .ok_or(DialError::Metadata(metadata::SERVER_COUNT))?;
    let halves = one(&headers, metadata::HALVES) == Some("1");
    let info = TunnelInfo {
        server_id: server_id.into(),
        endpoint,
        stats: Arc::new(TunnelStats::new(&client.claims(), Vec::new())),
    };
    let tunnel = Rc::new(Tunnel {
        info,
        session: Session::new(metrics.tally(Segment::FromAgent), halves),
        closing: Cell::new(None),
        close: Notify::new(),
    });
    Ok(Dialled {
        tunnel,
        server_count,
        sender,
        receiver,
    })
}

/// Returns the value of a field that must occur once.
fn one<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).into_iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}

impl Tunnel {
    /// Ends the tunnel when its last connection has ended: the server is told to prefer others, and its
    /// requests until then are served.
    pub(crate) async fn retire(self: Rc<Self>) {
        self.info.stats.draining.store(true, Ordering::Relaxed);
        self.session.drain();
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            if self.session.is_empty() {
                break;
            }
        }
        self.close(CloseReason::Replaced);
    }

    /// Ends the tunnel and everything on it. Data that targets have sent by now still leaves.
    pub(crate) fn close(&self, reason: CloseReason) {
        self.closing.set(Some(reason));
        self.close.notify_one();
    }

    async fn closing(&self) -> CloseReason {
        loop {
            if let Some(reason) = self.closing.get() {
                return reason;
            }
            self.close.notified().await;
        }
    }
}

impl Dialled {
    /// Ends an unwanted tunnel. Its server may have chosen it already: its requests until then are
    /// served.
    pub(crate) async fn decline(self, worker: Rc<Worker>) {
        tokio::task::spawn_local(self.tunnel.clone().retire());
        self.serve(worker).await;
    }

    /// Serves the tunnel until it ends, and returns the reason.
    pub(crate) async fn serve(self, worker: Rc<Worker>) -> End {
        let Self {
            tunnel,
            sender,
            mut receiver,
            ..
        } = self;
        let session = &tunnel.session;
        let mut phase = worker.phase.clone();
        let metrics = &worker.proxy_metrics;
        let received = metrics.streams.tally(Segment::ToAgent);
        let outbox = session.outbox().clone();
        let driven = tokio::task::spawn_local(async move { outbox.drive(sender).await });
        let end = loop {
            let blocked = session.is_blocked();
            tokio::select! {
                end = session.outbox().ended() => {
                    metrics.server_failed(Direction::ToServer);
                    metrics.streams.error(Segment::FromAgent, end.code().name(), None);
                    break End::new(end.reason(), end);
                }
                packet = receiver.next(), if !blocked => match packet {
                    Ok(Some(packet)) => {
                        received.packet(&packet);
                        if let Some(asked) = session.handle(packet) {
                            let served = serve(worker.clone(), tunnel.clone(), asked);
                            tokio::task::spawn_local(served);
                        }
                    }
                    Ok(None) => {
                        let why = "the server ended the call";
                        break End::new(CloseReason::LinkLost, why);
                    }
                    Err(end) => {
                        metrics.server_failed(Direction::FromServer);
                        metrics.streams.error(Segment::ToAgent, end.code().name(), None);
                        break End::new(end.reason(), end);
                    }
                },
                () = session.released(), if blocked => {}
                reason = tunnel.closing() => break End::new(reason, StreamEnd::Closed),
                Ok(()) = phase.changed() => {
                    if let Phase::Draining(_) = *phase.borrow_and_update() {
                        session.drain();
                    }
                }
            }
        };
        session.end(end.reason);
        // Nothing to wait for where the stream has ended.
        let goodbye = async {
            let _ = driven.await;
            while let Ok(Some(_)) = receiver.next().await {}
        };
        let _ = timeout(GOODBYE, goodbye).await;
        // A server that gives no credit would hold on to what is left.
        session.outbox().close(StreamEnd::Closed);
        end
    }
}

/// Serves one dial.
async fn serve(worker: Rc<Worker>, tunnel: Rc<Tunnel>, asked: Asked) {
    let Asked {
        request,
        send,
        recv,
    } = asked;
    let TunnelInfo {
        server_id, stats, ..
    } = &tunnel.info;
    let dialled = Box::pin(dialer::dial(&worker, server_id, &request, (send, recv))).await;
    if let Some(mut dialled) = dialled {
        let on_tunnel = OnTunnel::new(stats.clone());
        dialled.relay(&worker, on_tunnel).await;
    }
}
