//! A stand-in for Konnectivity's client library, which is what an API server dials through in gRPC
//! mode: one connection a stream, ended by a CLOSE_REQ, without a half-close.

use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{Buf, Bytes};
use tonic::metadata::MetadataMap;

use crate::client::Client;
use crate::place::Place;
use crate::script::Script;
use crate::wire::{self, PROXY, Payload};

/// Packets that are taken for a user who does not read.
const UNREAD: usize = 10;
/// Timeout of a dial, and of a read.
const DIAL_LIMIT: Duration = Duration::from_secs(30);
/// Timeout of the answer to CLOSE_REQ.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// A connection beyond the tunnel. Dropping it cancels the stream, as a client does that dies.
#[derive(Debug)]
pub(crate) struct LegacyConnection {
    script: Script,
    id: i64,
    rest: Bytes,
    /// The error text of a CLOSE_RSP, once there was one.
    closed: Option<String>,
}

/// Dials on a gRPC connection made for this alone.
pub(crate) fn dial(place: &Place, frontend: &Path, address: &str) -> Result<LegacyConnection> {
    dial_on(place, &connect(place, frontend)?, address)
}

/// Makes a gRPC connection.
pub(crate) fn connect(place: &Place, frontend: &Path) -> Result<Client> {
    place.run(Client::unix(frontend.to_owned()))
}

/// Dials on a gRPC connection that others use as well.
pub(crate) fn dial_on(place: &Place, client: &Client, address: &str) -> Result<LegacyConnection> {
    dial_within(place, client, address, DIAL_LIMIT)
}

/// The same for a caller with less patience than the library has.
pub(crate) fn dial_within(
    place: &Place,
    client: &Client,
    address: &str,
    limit: Duration,
) -> Result<LegacyConnection> {
    let mut script = client.script(place, PROXY, MetadataMap::new(), UNREAD);
    let random = random();
    script.send(wire::dial(address, random))?;
    let packet = script.next_within(limit)?;
    match packet.content() {
        Some(Payload::DialResponse(response)) if response.random == random => {
            if !response.error.is_empty() {
                bail!("the proxy answered: {}", response.error);
            }
            Ok(LegacyConnection {
                script,
                id: response.connect_id,
                rest: Bytes::new(),
                closed: None,
            })
        }
        other => bail!("{other:?} came, not the answer to {random}"),
    }
}

impl LegacyConnection {
    /// Says that it is over and waits for the answer, past what was not read. Gives the text of
    /// the answer.
    pub(crate) fn close(mut self) -> Result<String> {
        self.script.send(wire::close(self.id))?;
        while self.closed.is_none() {
            self.receive(CLOSE_LIMIT)?;
        }
        self.closed.context("closed without an answer")
    }

    /// Takes the next packet.
    fn receive(&mut self, limit: Duration) -> Result<()> {
        let packet = self.script.next_within(limit)?;
        match packet.content() {
            Some(Payload::Data(data)) if data.connect_id == self.id => {
                self.rest = data.data.clone();
            }
            Some(Payload::CloseResponse(response)) if response.connect_id == self.id => {
                self.closed = Some(response.error.clone());
            }
            other => bail!("{other:?} came for connection {}", self.id),
        }
        Ok(())
    }
}

impl Read for LegacyConnection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() && self.closed.is_none() {
            self.receive(DIAL_LIMIT).map_err(io::Error::other)?;
        }
        let count = buffer.len().min(self.rest.len());
        self.rest.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

impl Write for LegacyConnection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let packet = wire::data(self.id, Bytes::copy_from_slice(buffer));
        self.script.send(packet).map_err(io::Error::other)?;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the number of a dial: 63 bits, never negative.
fn random() -> i64 {
    use std::hash::{BuildHasher, RandomState};
    (RandomState::new().hash_one(0) >> 1).cast_signed()
}
