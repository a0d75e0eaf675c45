//! One gRPC stream in a test's hands: it sends what the test says and keeps what arrives.

use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status, Streaming};

use crate::wire::{self, DialResponse, Packet, Payload};

/// Timeout of an action that takes no time on an idle machine.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// Time without an event after which no further one is expected.
pub(crate) const QUIET: Duration = Duration::from_millis(400);

/// The way out of a stream. One packet waits here; the next one waits for HTTP/2's credit.
pub(crate) type Outbox = mpsc::Sender<Result<Packet, Status>>;

/// Event of a stream, in order.
enum Event {
    Headers(MetadataMap),
    Packet(Packet),
    Ended(Status),
}

/// The way into a [`Script`].
pub(crate) struct Feed(mpsc::Sender<Event>);

/// A stream in a test's hands. Dropping it cancels the stream, if it was opened by this side.
pub(crate) struct Script {
    runtime: Handle,
    outbox: Option<Outbox>,
    inbox: mpsc::Receiver<Event>,
    headers: Option<MetadataMap>,
    /// Keeps the stream alive.
    _keep: Option<Arc<dyn Send + Sync>>,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script").finish_non_exhaustive()
    }
}

impl Script {
    /// A script that sends through `outbox`, and what it is fed by. It takes `unread` packets off
    /// the stream before the test has asked for them.
    pub(crate) fn new(runtime: &Handle, outbox: Outbox, unread: usize) -> (Self, Feed) {
        let (feed, inbox) = mpsc::channel(unread);
        let script = Self {
            runtime: runtime.clone(),
            outbox: Some(outbox),
            inbox,
            headers: None,
            _keep: None,
        };
        (script, Feed(feed))
    }

    /// Lets `what` live as long as this.
    pub(crate) fn keep(mut self, what: impl Send + Sync + 'static) -> Self {
        self._keep = Some(Arc::new(what));
        self
    }

    /// The way out, for what sends beside the test.
    pub(crate) fn outbox(&self) -> Result<Outbox> {
        self.outbox
            .clone()
            .context("the stream was ended by the test")
    }

    /// Sends a packet; fails if there is no credit for it in time.
    pub(crate) fn send(&self, packet: Packet) -> Result<()> {
        let outbox = self.outbox()?;
        let sent = self
            .runtime
            .block_on(async { timeout(SOON, outbox.send(Ok(packet))).await });
        let sent = sent.context("the connector does not read")?;
        sent.ok().context("the stream is over")
    }

    /// Sends packets until there has been no credit for `limit`; gives how many went.
    pub(crate) fn send_until_blocked(
        &self,
        packet: &Packet,
        limit: Duration,
        most: usize,
    ) -> Result<usize> {
        let outbox = self.outbox()?;
        for sent in 0..most {
            let send = async { timeout(limit, outbox.send(Ok(packet.clone()))).await };
            match self.runtime.block_on(send) {
                Ok(Ok(())) => (),
                Ok(Err(_)) => bail!("the stream is over after {sent} packets"),
                Err(_) => return Ok(sent),
            }
        }
        Ok(most)
    }

    /// Ends this side's half.
    pub(crate) fn finish(&mut self) {
        self.outbox = None;
    }

    /// Returns the bytes that the server sent before the first packet.
    pub(crate) fn headers(&mut self) -> Result<MetadataMap> {
        if self.headers.is_none() {
            match self.event(SOON)? {
                Some(Event::Headers(headers)) => self.headers = Some(headers),
                Some(Event::Ended(status)) => bail!("refused: {status:?}"),
                Some(Event::Packet(packet)) => bail!("a packet before headers: {packet:?}"),
                None => bail!("no headers came"),
            }
        }
        self.headers.clone().context("no headers")
    }

    /// One of the headers, which is there once.
    pub(crate) fn header(&mut self, key: &str) -> Result<String> {
        let headers = self.headers()?;
        let mut values = headers.get_all(key).iter();
        let value = values
            .next()
            .with_context(|| format!("no {key} in {headers:?}"))?;
        ensure!(values.next().is_none(), "{key} twice in {headers:?}");
        Ok(value.to_str()?.to_owned())
    }

    /// The next packet.
    pub(crate) fn next(&mut self) -> Result<Packet> {
        self.next_within(SOON)
    }

    /// The next packet, which may take `limit`.
    pub(crate) fn next_within(&mut self, limit: Duration) -> Result<Packet> {
        match self.packet_or_end(limit)? {
            Some(Ok(packet)) => Ok(packet),
            Some(Err(status)) => bail!("the stream ended: {status:?}"),
            None => bail!("no packet came within {limit:?}"),
        }
    }

    /// The payload of the next packet.
    pub(crate) fn payload(&mut self) -> Result<Payload> {
        let packet = self.next()?;
        let payload = packet.content().cloned();
        payload.with_context(|| format!("the payload does not fit: {packet:?}"))
    }

    /// Fails unless the next packet is `expected`.
    pub(crate) fn expect(&mut self, expected: Packet) -> Result<()> {
        let packet = self.next()?;
        ensure!(packet == expected, "{packet:?} came, not {expected:?}");
        Ok(())
    }

    /// Dials and waits for the answer.
    pub(crate) fn dial(&mut self, address: impl ToString, random: i64) -> Result<DialResponse> {
        self.send(wire::dial(address, random))?;
        self.dial_response()
    }

    /// Takes the answer to a dial.
    pub(crate) fn dial_response(&mut self) -> Result<DialResponse> {
        match self.payload()? {
            Payload::DialResponse(response) => Ok(response),
            other => bail!("{other:?} came, not a DIAL_RSP"),
        }
    }

    /// Dials and gives the connection's id; fails if the dial does.
    pub(crate) fn connect(&mut self, address: impl ToString, random: i64) -> Result<i64> {
        let response = self.dial(address, random)?;
        ensure!(response.error.is_empty(), "{response:?}");
        ensure!(
            response.random == random && response.connect_id > 0,
            "{response:?}"
        );
        Ok(response.connect_id)
    }

    /// Takes DATA of the connection until there are `length` bytes.
    pub(crate) fn data(&mut self, connect_id: i64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            match self.payload()? {
                Payload::Data(data) if data.connect_id == connect_id => bytes.extend(data.data),
                other => bail!("{other:?} came after {} of {length} bytes", bytes.len()),
            }
        }
        ensure!(bytes.len() == length, "{} bytes, not {length}", bytes.len());
        Ok(bytes)
    }

    /// Sends `text` and takes the same back.
    pub(crate) fn echo(&mut self, connect_id: i64, text: &str) -> Result<()> {
        self.send(wire::data(connect_id, text.to_owned()))?;
        let answer = self.data(connect_id, text.len())?;
        ensure!(answer == text.as_bytes(), "{answer:?} for {text:?}");
        Ok(())
    }

    /// Fails if anything comes.
    pub(crate) fn quiet(&mut self) -> Result<()> {
        match self.packet_or_end(QUIET)? {
            None => Ok(()),
            Some(what) => bail!("{what:?} came, where nothing should"),
        }
    }

    /// Waits for the stream's end and gives its status. No more packets may come.
    pub(crate) fn ended(&mut self) -> Result<Status> {
        match self.packet_or_end(SOON)? {
            Some(Err(status)) => Ok(status),
            Some(Ok(packet)) => bail!("{packet:?} came, not the stream's end"),
            None => bail!("the stream goes on"),
        }
    }

    /// Waits for an end without an error.
    pub(crate) fn ended_well(&mut self) -> Result<()> {
        let status = self.ended()?;
        ensure!(status.code() == Code::Ok, "{status:?}");
        Ok(())
    }

    /// A packet, the end, or nothing within `limit`.
    pub(crate) fn packet_or_end(
        &mut self,
        limit: Duration,
    ) -> Result<Option<Result<Packet, Status>>> {
        Ok(match self.event(limit)? {
            Some(Event::Headers(headers)) => {
                self.headers = Some(headers);
                return self.packet_or_end(limit);
            }
            Some(Event::Packet(packet)) => Some(Ok(packet)),
            Some(Event::Ended(status)) => Some(Err(status)),
            None => None,
        })
    }

    fn event(&mut self, limit: Duration) -> Result<Option<Event>> {
        let event = self
            .runtime
            .block_on(async { timeout(limit, self.inbox.recv()).await });
        match event {
            Ok(Some(event)) => Ok(Some(event)),
            Ok(None) => bail!("the stream has ended before"),
            Err(_) => Ok(None),
        }
    }
}

impl Feed {
    /// Waits until the script is dropped.
    pub(crate) async fn unwanted(&self) {
        self.0.closed().await;
    }

    /// Passes on what was there before the first packet.
    pub(crate) async fn headers(&self, headers: MetadataMap) {
        // A script that is gone wants nothing.
        let _ = self.0.send(Event::Headers(headers)).await;
    }

    /// Passes on what comes, until the end or until the script is dropped, but for what `reflex`
    /// deals with.
    pub(crate) async fn packets(self, mut packets: Streaming<Packet>, reflex: Option<Reflex>) {
        loop {
            let event = tokio::select! {
                packet = packets.message() => match packet {
                    Ok(Some(packet)) => match answer(&packet, reflex.as_ref()) {
                        Some(answered) => {
                            answered.await;
                            continue;
                        }
                        None => Event::Packet(packet),
                    },
                    Ok(None) => Event::Ended(Status::ok("")),
                    Err(status) => Event::Ended(status),
                },
                () = self.unwanted() => return,
            };
            let over = matches!(event, Event::Ended(_));
            if self.0.send(event).await.is_err() || over {
                return;
            }
        }
    }

    /// The stream was refused.
    pub(crate) async fn refused(self, status: Status) {
        let _ = self.0.send(Event::Ended(status)).await;
    }
}

/// Answers of an agent that the test does not script: to CLOSE_REQ for unknown connections, by
/// which the connector learns whether the agent is alive and how far it has got.
#[derive(Clone, Debug)]
pub(crate) struct Reflex {
    outbox: Outbox,
    known: Arc<Mutex<HashSet<i64>>>,
    muted: Arc<AtomicBool>,
}

impl Reflex {
    pub(crate) fn new(outbox: Outbox) -> Self {
        let (known, muted) = Default::default();
        Self {
            outbox,
            known,
            muted,
        }
    }

    /// Leaves a connection to the test.
    pub(crate) fn know(&self, connect_id: i64) {
        self.known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(connect_id);
    }

    /// Leaves everything unanswered, as an agent does that hangs.
    pub(crate) fn mute(&self, muted: bool) {
        self.muted.store(muted, Ordering::Relaxed);
    }
}

/// Returns the answer to `packet`, if `reflex` has one.
fn answer(packet: &Packet, reflex: Option<&Reflex>) -> Option<impl Future<Output = ()> + use<>> {
    let (Some(Payload::CloseRequest(request)), Some(reflex)) = (packet.content(), reflex) else {
        return None;
    };
    let id = request.connect_id;
    if reflex
        .known
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .contains(&id)
    {
        return None;
    }
    let reflex = reflex.clone();
    Some(async move {
        if reflex.muted.load(Ordering::Relaxed) {
            return;
        }
        // A stream that is over needs no answer.
        let _ = reflex
            .outbox
            .send(Ok(wire::closed(id, "Unknown connectID")))
            .await;
    })
}
