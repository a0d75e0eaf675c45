//! The client side: a connection, and calls on it.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use http::uri::Scheme;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::sender::Side;
use super::{
    CONTENT_TYPE, HANDSHAKE, MAX_HEADERS, PacketReceiver, PacketSender, SEND_BUFFER, Settings,
    Status, StreamEnd, until_silent,
};

use cpc_host::report::report;

/// Minimum interval of pings: a server on the agent port ends connections that ping more often.
const FEWEST_BETWEEN_PINGS: Duration = Duration::from_secs(30);

/// Reason why there is no call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The handshake of TLS or HTTP/2 timed out.
    #[error("the server did not finish the handshake within {} s", HANDSHAKE.as_secs())]
    Handshake,
    /// TLS failed.
    #[error("TLS: {0}")]
    Tls(io::Error),
    /// The request can't be written.
    #[error("bad request: {0}")]
    Request(http::Error),
    /// No answer arrived in time.
    #[error("the server did not answer the call within {} s", .0.as_secs())]
    Unanswered(Duration),
    /// The answer is not gRPC's.
    #[error("the server answered with HTTP status {0}; is it a gRPC server?")]
    Http(StatusCode),
    /// The call ended.
    #[error(transparent)]
    End(#[from] StreamEnd),
}

impl From<http::Error> for CallError {
    fn from(why: http::Error) -> Self {
        Self::Request(why)
    }
}

impl From<h2::Error> for CallError {
    fn from(error: h2::Error) -> Self {
        Self::End(error.into())
    }
}

/// Makes a TLS session by `config`. Its ALPN should name [`ALPN`](super::ALPN) first.
///
/// # Errors
/// [`CallError::Tls`], or [`CallError::Handshake`] when it takes too long.
pub(crate) async fn secure(
    tcp: TcpStream,
    config: Arc<rustls::ClientConfig>,
    server: ServerName<'static>,
) -> Result<TlsStream<TcpStream>, CallError> {
    let session = timeout(HANDSHAKE, TlsConnector::from(config).connect(server, tcp)).await;
    session
        .map_err(|_| CallError::Handshake)?
        .map_err(CallError::Tls)
}

/// A connection that calls can be made on.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    pub(super) requests: SendRequest<Bytes>,
    authority: String,
}

/// A call that the server has accepted.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Metadata of the server.
    pub headers: HeaderMap,
    /// Sender towards the server.
    pub sender: PacketSender,
    /// Receiver from the server.
    pub receiver: PacketReceiver,
}

/// Starts HTTP/2 with the server `authority` ("host:port"). The returned future drives the connection
/// and ends with it.
///
/// # Errors
/// [`CallError`].
pub(crate) async fn handshake<I>(
    io: I,
    settings: &Settings,
    authority: &str,
) -> Result<(Channel, impl Future<Output = ()> + use<I>), CallError>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let mut builder = Builder::new();
    builder
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window())
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(settings.frame_overhead)
        .enable_push(false);
    let (requests, mut connection) = timeout(HANDSHAKE, builder.handshake::<_, Bytes>(io))
        .await
        .map_err(|_| CallError::Handshake)??;
    let pings = connection.ping_pong();
    let keepalive = settings.keepalive.map(|k| k.max(FEWEST_BETWEEN_PINGS));
    let channel = Channel {
        requests,
        authority: authority.to_owned(),
    };
    let driver = async move {
        let silent = until_silent(pings, keepalive);
        tokio::select! {
            ended = connection => if let Err(error) = ended {
                tracing::debug!(error = report(&error), "HTTP/2 connection ended");
            },
            () = silent => tracing::debug!("HTTP/2 peer does not answer pings"),
        }
    };
    Ok((channel, driver))
}

impl Channel {
    /// Opens a call of `path` with `metadata`, and waits at most `patience` until the server has
    /// accepted it.
    ///
    /// # Errors
    /// [`CallError`].
    pub(crate) async fn open(
        &mut self,
        path: &str,
        metadata: &[(&'static str, &str)],
        patience: Duration,
    ) -> Result<Opened, CallError> {
        let request = self.request(path, metadata)?;
        let opened = timeout(patience, async {
            poll_fn(|cx| self.requests.poll_ready(cx)).await?;
            let (response, stream) = self.requests.send_request(request, false)?;
            let (head, body) = response.await?.into_parts();
            if head.status != StatusCode::OK {
                return Err(CallError::Http(head.status));
            }
            // A call that is refused at once has its status here, and no trailers.
            if let Some(status) = Status::read(&head.headers) {
                return Err(StreamEnd::Status(status).into());
            }
            Ok(Opened {
                headers: head.headers,
                sender: PacketSender::new(stream, Side::Client),
                receiver: PacketReceiver::new(body),
            })
        });
        let opened = opened.await;
        opened.map_err(|_| CallError::Unanswered(patience))?
    }

    fn request(
        &self,
        path: &str,
        metadata: &[(&'static str, &str)],
    ) -> Result<Request<()>, http::Error> {
        let uri = Uri::builder()
            .scheme(Scheme::HTTPS)
            .authority(self.authority.as_str())
            .path_and_query(path)
            .build()?;
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(uri)
            .header(header::CONTENT_TYPE, CONTENT_TYPE)
            .header(header::TE, "trailers")
            .header(
                header::USER_AGENT,
                concat!("cpc/", env!("CARGO_PKG_VERSION")),
            );
        for &(name, value) in metadata {
            let mut value = HeaderValue::from_str(value)?;
            value.set_sensitive(name == header::AUTHORIZATION.as_str());
            request = request.header(name, value);
        }
        request.body(())
    }
}
