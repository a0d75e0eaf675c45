//! Dials proxy-servers, and reads their identity.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use http::HeaderMap;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tunnel_proto::konnectivity::{CONNECT, metadata};

use super::client::{Client, ClientError};
use super::tunnel::Established;
use crate::grpc::client::{CallError, Opened, handshake, secure};
use crate::grpc::tcp;
use crate::metrics::ProxyAgentMetrics;
use cpc_agent::extension::{
    BoxError, DialTarget, EstablishedTunnel, TunnelDialer, TunnelInfo, TunnelStats, Worker,
};
use cpc_config::TunnelKind;
use cpc_config::address::split;

/// Timeout of the TCP connect, which is retried later.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of the server's headers, which is retried later. The server may have to verify our token
/// first.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(15);

/// Maximum length of a server's id, in bytes.
const MAX_SERVER_ID: usize = 253;

/// Reason why there is no tunnel.
#[derive(Debug, thiserror::Error)]
enum DialError {
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

/// Dials proxy-servers.
pub(super) struct ProxyServerDialer {
    client: Arc<Client>,
    metrics: ProxyAgentMetrics,
}

impl ProxyServerDialer {
    /// Creates a dialer with these parameters.
    pub(super) fn new(client: Arc<Client>, metrics: ProxyAgentMetrics) -> Self {
        Self { client, metrics }
    }

    async fn dial(
        &self,
        worker: &Rc<Worker>,
        target: &DialTarget,
    ) -> Result<Established, DialError> {
        let (client, server) = (&self.client, target.server());
        let host = split(server).map_or(server, |(host, _)| host);
        let (tls, name, metadata) = (client.tls()?, client.server_name(host)?, client.metadata()?);
        let metadata = metadata.iter().map(|(key, value)| (*key, value.as_str()));
        let metadata: Vec<_> = metadata.chain([(metadata::HALVES, "1")]).collect();

        let address = target.endpoint().address;
        let socket = timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
        let socket = socket.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        tcp::prepare(&socket)?;
        let stream = secure(socket, tls, name).await?;
        let (mut channel, connection) = handshake(stream, &client.settings(), server).await?;
        // Ends with the last half of its only call.
        tokio::task::spawn_local(connection);
        let opened = channel.open(CONNECT, &metadata, HEADERS_TIMEOUT).await?;
        let headers = &opened.headers;
        let server_id = one(headers, metadata::SERVER_ID)
            .filter(|id| !id.is_empty() && id.len() <= MAX_SERVER_ID)
            .ok_or(DialError::Metadata(metadata::SERVER_ID))?;
        let server_count = one(headers, metadata::SERVER_COUNT)
            .and_then(|count| count.parse().ok())
            .ok_or(DialError::Metadata(metadata::SERVER_COUNT))?;
        let halves = one(headers, metadata::HALVES) == Some("1");
        let info = TunnelInfo {
            server_id: server_id.into(),
            endpoint: target.endpoint(),
            stats: Arc::new(TunnelStats::new(&client.claims(), Vec::new())),
        };
        let (worker, metrics) = (worker.clone(), self.metrics.clone());
        let Opened {
            sender, receiver, ..
        } = opened;
        let stream = (sender, receiver);
        Ok(Established::new(
            (worker, metrics),
            info,
            server_count,
            halves,
            stream,
        ))
    }
}

impl TunnelDialer for ProxyServerDialer {
    fn kind(&self) -> TunnelKind {
        TunnelKind::Konnectivity
    }

    fn dial<'a>(
        &'a self,
        worker: &'a Rc<Worker>,
        target: &'a mut DialTarget,
    ) -> LocalBoxFuture<'a, Result<Option<Box<dyn EstablishedTunnel>>, BoxError>> {
        Box::pin(async move {
            let established = self.dial(worker, target).await?;
            Ok(Some(Box::new(established) as Box<dyn EstablishedTunnel>))
        })
    }
}

/// Returns the value of a field that must occur once.
fn one<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut values = headers.get_all(name).into_iter();
    let value = values.next()?.to_str().ok()?;
    values.next().is_none().then_some(value)
}
