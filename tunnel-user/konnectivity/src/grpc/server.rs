//! The server side: accepts calls of one path from a connection.

use std::pin::pin;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{Builder, SendResponse};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::sender::Side;
use super::{
    CONTENT_TYPE, Code, HANDSHAKE, MAX_HEADERS, MAX_RESET, PacketReceiver, PacketSender,
    SEND_BUFFER, Settings, Status, StreamEnd, until_silent,
};

/// Reason why a connection ended, except the orderly end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// HTTP/2 failed.
    #[error(transparent)]
    Http(#[from] h2::Error),
    /// The peer's HTTP/2 preface did not arrive in time.
    #[error("no HTTP/2 preface within {} s", HANDSHAKE.as_secs())]
    Handshake,
    /// The peer has not answered a ping.
    #[error("the peer does not answer pings")]
    Silent,
}

/// Serves a connection until it ends. Calls of `path` go to `on_call`, which must not wait: the
/// connection moves only while this does. After `stopping` no new calls are accepted.
///
/// # Errors
/// [`ServeError`]; a peer that vanishes is one.
pub(crate) async fn serve(
    io: impl AsyncRead + AsyncWrite + Unpin,
    settings: &Settings,
    path: &str,
    stopping: impl Future<Output = ()>,
    mut on_call: impl FnMut(Call),
) -> Result<(), ServeError> {
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(settings.streams)
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window())
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .max_pending_accept_reset_streams(MAX_RESET)
        .data_frame_budget(settings.frame_overhead);
    let mut connection = timeout(HANDSHAKE, builder.handshake::<_, Bytes>(io))
        .await
        .map_err(|_| ServeError::Handshake)??;
    let mut silent = pin!(until_silent(connection.ping_pong(), settings.keepalive));
    let mut stopping = pin!(stopping);
    let mut leaving = false;
    loop {
        tokio::select! {
            call = connection.accept() => match call {
                Some(call) => {
                    let (request, respond) = call?;
                    if let Some(call) = route(request, respond, path) {
                        on_call(call);
                    }
                }
                None => return Ok(()),
            },
            () = &mut stopping, if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
            }
            () = &mut silent => return Err(ServeError::Silent),
        }
    }
}

/// Answers requests that are not a call of `path`.
fn route(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    path: &str,
) -> Option<Call> {
    let (head, body) = request.into_parts();
    let content_type = head.headers.get(header::CONTENT_TYPE);
    let is_grpc = content_type.is_some_and(|t| t.as_bytes().starts_with(CONTENT_TYPE.as_bytes()));
    let refused = match (&head.method, is_grpc) {
        (&Method::POST, true) => None,
        (&Method::POST, false) => Some(StatusCode::UNSUPPORTED_MEDIA_TYPE),
        _ => Some(StatusCode::METHOD_NOT_ALLOWED),
    };
    if let Some(code) = refused {
        let mut response = Response::new(());
        *response.status_mut() = code;
        // Fails only where the caller has gone.
        let _ = respond.send_response(response, true);
        return None;
    }
    let call = Call {
        headers: head.headers,
        body,
        respond,
    };
    if head.uri.path() == path {
        return Some(call);
    }
    call.refuse(&Status::new(
        Code::UNIMPLEMENTED,
        format!("only {path} is served here"),
    ));
    None
}

/// A call that is not answered yet. Dropped, it is reset.
#[derive(Debug)]
pub(crate) struct Call {
    headers: HeaderMap,
    body: RecvStream,
    respond: SendResponse<Bytes>,
}

impl Call {
    /// Iterates over the values of one field of the metadata that are text.
    pub(crate) fn metadata(&self, name: &str) -> impl Iterator<Item = &str> {
        let values = self.headers.get_all(name).into_iter();
        values.filter_map(|value| value.to_str().ok())
    }

    /// Accepts the call. The caller gets the headers at once, with `metadata`; a value that is not
    /// visible ASCII is left out.
    ///
    /// # Errors
    /// [`StreamEnd`]: the caller has gone.
    pub(crate) fn accept(
        mut self,
        metadata: &[(&'static str, &str)],
    ) -> Result<(PacketSender, PacketReceiver), StreamEnd> {
        let mut response = response();
        for &(name, value) in metadata {
            if let Ok(value) = HeaderValue::from_str(value) {
                response.headers_mut().append(name, value);
            }
        }
        let stream = self.respond.send_response(response, false)?;
        Ok((
            PacketSender::new(stream, Side::Server),
            PacketReceiver::new(self.body),
        ))
    }

    /// Refuses the call.
    pub(crate) fn refuse(mut self, status: &Status) {
        let mut response = response();
        status.write(response.headers_mut());
        // Fails only where the caller has gone.
        let _ = self.respond.send_response(response, true);
    }
}

fn response() -> Response<()> {
    let mut response = Response::new(());
    let content_type = HeaderValue::from_static(CONTENT_TYPE);
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, content_type);
    response
}
