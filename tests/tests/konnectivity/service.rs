//! gRPC from the server's side: every stream that a client opens is handed on as it comes.

use std::convert::Infallible;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};

use anyhow::Result;
use http::{Request, Response};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream, UnixListenerStream};
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::transport::{Server, ServerTlsConfig};
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;
use tower::Service;

use crate::place::Place;
use crate::script::{Outbox, Script};
use crate::wire::Packet;

/// The longest message that a stand-in takes: as grpc-go does.
const LONGEST: usize = 4 << 20;

/// A stream that a client has opened and that has no answer yet. Dropping it refuses it.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// Called path.
    pub(crate) path: String,
    /// Metadata of the call.
    pub(crate) metadata: MetadataMap,
    packets: Streaming<Packet>,
    answer: oneshot::Sender<Answer>,
}

type Packets = ReceiverStream<Result<Packet, Status>>;
type Answer = Result<tonic::Response<Packets>, Status>;

impl Incoming {
    /// Answers with these headers; gives the ways out and in.
    pub(crate) fn accept(self, headers: MetadataMap) -> (Outbox, Streaming<Packet>) {
        let (outbox, packets) = mpsc::channel(1);
        let mut response = tonic::Response::new(ReceiverStream::new(packets));
        *response.metadata_mut() = headers;
        // A client that is gone by now is noticed when its packets end.
        let _ = self.answer.send(Ok(response));
        (outbox, self.packets)
    }

    /// Ends the stream before it has begun.
    pub(crate) fn refuse(self, status: Status) {
        let _ = self.answer.send(Err(status));
    }

    /// Accepts it for a test, which takes `unread` packets in advance (from 1).
    pub(crate) fn script(self, place: &Place, headers: MetadataMap, unread: usize) -> Script {
        let (outbox, packets) = self.accept(headers);
        let (script, feed) = Script::new(place.handle(), outbox, unread);
        place.spawn(feed.packets(packets, None));
        script
    }
}

/// Handler of each stream.
type Take = Arc<dyn Fn(Incoming) + Send + Sync>;

/// A gRPC server for streams of packets, whatever they are called.
#[derive(Clone)]
pub(crate) struct Streams {
    take: Take,
}

impl Streams {
    pub(crate) fn new(take: impl Fn(Incoming) + Send + Sync + 'static) -> Self {
        Self {
            take: Arc::new(take),
        }
    }

    /// Serves on TCP with TLS, for as long as the future lives.
    pub(crate) async fn serve_tls(self, listener: TcpListener, tls: ServerTlsConfig) -> Result<()> {
        let incoming = TcpListenerStream::new(listener);
        let server = Server::builder().tls_config(tls)?;
        Ok(server.serve_with_incoming(self, incoming).await?)
    }

    /// Serves on a Unix socket without TLS, for as long as the future lives.
    pub(crate) async fn serve_unix(self, path: &Path) -> Result<()> {
        let incoming = UnixListenerStream::new(UnixListener::bind(path)?);
        Ok(Server::builder()
            .serve_with_incoming(self, incoming)
            .await?)
    }
}

impl Service<Request<Body>> for Streams {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let take = self.take.clone();
        let path = request.uri().path().to_owned();
        Box::pin(async move {
            let open = tower::service_fn(move |request: tonic::Request<Streaming<Packet>>| {
                let (take, path) = (take.clone(), path.clone());
                async move {
                    let (metadata, _, packets) = request.into_parts();
                    let (answer, answered) = oneshot::channel();
                    take(Incoming {
                        path,
                        metadata,
                        packets,
                        answer,
                    });
                    let refused = || Err(Status::unimplemented("refused by the test"));
                    answered.await.unwrap_or_else(|_| refused())
                }
            });
            let codec = ProstCodec::<Packet, Packet>::default();
            let mut grpc = tonic::server::Grpc::new(codec).max_decoding_message_size(LONGEST);
            Ok(grpc.streaming(open, request).await)
        })
    }
}
