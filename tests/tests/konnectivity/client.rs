//! gRPC from the client's side: how a frontend reaches a server, and an agent its server.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower::ServiceExt;

use crate::place::Place;
use crate::script::{Outbox, Reflex, Script};
use crate::script_agent::ScriptAgent;
use crate::wire::{CONNECT, Packet};

/// The longest message that a stand-in takes: as grpc-go does.
const LONGEST: usize = 4 << 20;
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Answer of a server to a new stream.
pub(crate) type Answer = Result<Response<Streaming<Packet>>, Status>;

/// A connection to a server that streams are opened on. It is made with the first one.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    channel: Channel,
}

impl Client {
    /// A Unix socket, without TLS.
    pub(crate) async fn unix(path: PathBuf) -> Result<Self> {
        let connect = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost").connect_timeout(CONNECT_LIMIT);
        Ok(Self {
            channel: endpoint.connect_with_connector(connect).await?,
        })
    }

    /// TCP with TLS.
    pub(crate) async fn tls(address: String, tls: ClientTlsConfig) -> Result<Self> {
        let endpoint = Endpoint::from_shared(format!("https://{address}"))?
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true)
            .tls_config(tls)?;
        Ok(Self {
            channel: endpoint.connect().await?,
        })
    }

    /// Opens a stream: the way out, and the answer, which is there when the server has sent its
    /// headers.
    pub(crate) fn open(
        &self,
        path: &'static str,
        metadata: MetadataMap,
    ) -> (Outbox, impl Future<Output = Answer> + Send + use<>) {
        let (outbox, packets) = mpsc::channel(1);
        let channel = self.channel.clone();
        let answer = async move {
            let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(LONGEST);
            let ready = grpc.ready().await;
            ready.map_err(|error| Status::unavailable(error.to_string()))?;
            // Only a server ends a stream with a status.
            let packets = ReceiverStream::new(packets).map_while(Result::ok);
            let mut request = Request::new(packets);
            *request.metadata_mut() = metadata;
            let path = PathAndQuery::from_static(path);
            let codec = ProstCodec::<Packet, Packet>::default();
            grpc.streaming(request, path, codec).await
        };
        (outbox, answer)
    }

    /// Sends any request.
    pub(crate) async fn raw(&self, request: http::Request<Body>) -> Result<http::Response<Body>> {
        Ok(self.channel.clone().oneshot(request).await?)
    }

    /// Opens a stream for a test, which takes `unread` packets in advance (from 1).
    pub(crate) fn script(
        &self,
        place: &Place,
        path: &'static str,
        metadata: MetadataMap,
        unread: usize,
    ) -> Script {
        let (outbox, answer) = self.open(path, metadata);
        self.scripted(place, outbox, answer, unread, None)
    }

    /// Opens an agent's stream for a test.
    pub(crate) fn agent(&self, place: &Place, metadata: MetadataMap) -> ScriptAgent {
        let (outbox, answer) = self.open(CONNECT, metadata);
        let reflex = Reflex::new(outbox.clone());
        let script = self.scripted(place, outbox, answer, 1, Some(reflex.clone()));
        ScriptAgent { script, reflex }
    }

    fn scripted(
        &self,
        place: &Place,
        outbox: Outbox,
        answer: impl Future<Output = Answer> + Send + 'static,
        unread: usize,
        reflex: Option<Reflex>,
    ) -> Script {
        let (script, feed) = Script::new(place.handle(), outbox, unread);
        place.spawn(async move {
            let answer = tokio::select! {
                answer = answer => answer,
                () = feed.unwanted() => return,
            };
            match answer {
                Ok(response) => {
                    let (headers, packets, _) = response.into_parts();
                    feed.headers(headers).await;
                    feed.packets(packets, reflex).await;
                }
                Err(status) => feed.refused(status).await,
            }
        });
        script.keep(self.clone())
    }
}

/// Metadata with these entries, a key as often as it is named.
pub(crate) fn metadata(entries: &[(&'static str, &str)]) -> Result<MetadataMap> {
    let mut map = MetadataMap::new();
    for (key, value) in entries {
        map.append(
            *key,
            value.parse().with_context(|| format!("{key}: {value}"))?,
        );
    }
    Ok(map)
}
