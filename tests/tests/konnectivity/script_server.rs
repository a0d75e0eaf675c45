//! A server that does what the test says: agents connect, and the test deals with each stream.

use std::net::SocketAddr;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::net::TcpListener;
use tonic::transport::ServerTlsConfig;

use crate::client::metadata;
use crate::place::Place;
use crate::script::{SOON, Script};
use crate::service::{Incoming, Streams};
use crate::wire::CONNECT;

/// A listener for agents.
pub(crate) struct ScriptServer {
    place: Place,
    streams: mpsc::Receiver<Incoming>,
}

impl ScriptServer {
    /// Listens in `place`, which ends with it.
    pub(crate) fn start(place: Place, address: SocketAddr, tls: ServerTlsConfig) -> Result<Self> {
        let listener = place.run(async move { Ok(TcpListener::bind(address).await?) })?;
        let (hand_on, streams) = mpsc::channel();
        let take = Streams::new(move |incoming| drop(hand_on.send(incoming)));
        place.spawn(async move {
            if let Err(error) = take.serve_tls(listener, tls).await {
                println!("{error:#}");
            }
        });
        Ok(Self { place, streams })
    }

    /// The next stream that an agent opens; it has no answer yet.
    pub(crate) fn incoming(&self) -> Result<Incoming> {
        self.incoming_within(SOON)?.context("no agent comes")
    }

    /// The next stream, if one comes within `limit`.
    pub(crate) fn incoming_within(&self, limit: Duration) -> Result<Option<Incoming>> {
        let Ok(incoming) = self.streams.recv_timeout(limit) else {
            return Ok(None);
        };
        ensure!(incoming.path == CONNECT, "{} was called", incoming.path);
        Ok(Some(incoming))
    }

    /// Answers `incoming` as server `id` of `count`.
    pub(crate) fn accept(&self, incoming: Incoming, id: &str, count: usize) -> Result<Script> {
        let headers = metadata(&[("serverid", id), ("servercount", &count.to_string())])?;
        Ok(incoming.script(&self.place, headers, 1))
    }

    /// Takes the next agent as the only server.
    pub(crate) fn agent(&self) -> Result<Script> {
        self.accept(self.incoming()?, "only", 1)
    }

    /// Returns its place.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }
}
