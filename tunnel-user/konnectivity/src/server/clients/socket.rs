//! A stream of `ProxyService` as a local socket: packets in place of bytes.
//!
//! Used from one task. [`LocalSocket::try_write`] takes one packet, of which a part may have no credit
//! yet; answers to unexpected packets go out in the same order.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, ErrorKind, IoSlice};
use std::rc::Rc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::Notify;
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::{MAX_DATA, Packet, data_head, text};

use crate::grpc::{Code, PacketReceiver, PacketSender, Status, StreamEnd};
use crate::metrics::{ClientTraffic, PacketKind};
use cpc_datapath::LocalSocket;
use cpc_datapath::socket::PeerClose;

/// Maximum number of bytes that wait for credit before the client has to read: one packet of data, and
/// answers.
const MAX_WAITING: usize = MAX_DATA + (16 << 10);

/// Last assigned connection id. Ids are never used twice: clients share an HTTP/2 connection, and logs.
static LAST_CONNECTION: AtomicI64 = AtomicI64::new(0);

/// One stream, from its DIAL_REQ on.
pub(super) struct ProxySocket {
    sender: RefCell<PacketSender>,
    receiver: RefCell<PacketReceiver>,
    /// Packets that have no credit yet.
    waiting: RefCell<VecDeque<Waiting>>,
    traffic: Rc<ClientTraffic>,
    /// Number of the request.
    random: i64,
    /// Id of the connection; 0 during the dial.
    connect_id: Cell<i64>,
    /// Whether the client has requested the end.
    closed: Cell<bool>,
    /// Whether CLOSE_RSP was sent, or has to be.
    answered: Cell<bool>,
    /// Whether the target has ended, and the client knows.
    finished: Cell<bool>,
    finishing: Notify,
    broken: Cell<bool>,
    /// Status of the call because of a fault of the client.
    fault: RefCell<Option<Status>>,
}

/// A packet on its way to the client.
struct Waiting {
    /// Part of its frame without credit.
    bytes: Bytes,
    kind: PacketKind,
    since: Instant,
}

impl ProxySocket {
    /// Creates the socket of a stream whose request has the number `random`. `traffic` counts the
    /// packets.
    pub(super) fn new(
        sender: PacketSender,
        receiver: PacketReceiver,
        random: i64,
        traffic: Rc<ClientTraffic>,
    ) -> Self {
        Self {
            traffic,
            sender: sender.into(),
            receiver: receiver.into(),
            waiting: RefCell::default(),
            random,
            connect_id: Cell::new(0),
            closed: Cell::new(false),
            answered: Cell::new(false),
            finished: Cell::new(false),
            finishing: Notify::new(),
            broken: Cell::new(true),
            fault: RefCell::default(),
        }
    }

    /// Assigns a connection id and reports it, before any other packet.
    ///
    /// # Errors
    /// The client has gone.
    pub(super) async fn connected(&self) -> io::Result<()> {
        self.connect_id
            .set(LAST_CONNECTION.fetch_add(1, Ordering::Relaxed) + 1);
        self.put(&self.dial_response(""));
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Reports the failed dial, and waits until the client ends the stream.
    pub(super) async fn refused(&self, error: &str) {
        // A client that has left gets no answer, and none is counted.
        if poll_fn(|cx| Poll::Ready(self.sender.borrow_mut().poll_reset(cx).is_ready())).await {
            return;
        }
        self.put(&self.dial_response(error));
        if poll_fn(|cx| self.poll_flush(cx)).await.is_ok() {
            self.left().await;
        }
    }

    /// Waits until the client ends the stream; discards its packets.
    pub(super) async fn left(&self) {
        while let Ok(Some(_)) = self.next().await {}
    }

    /// Returns the status of the call, after the relay. `reason` is that of the connection.
    pub(super) fn close(&self, reason: CloseReason) -> Status {
        if !self.broken.get() || self.closed.get() {
            return Status::ok();
        }
        let lost = || Status::new(Code::UNAVAILABLE, reason.to_string());
        let status = self.fault().unwrap_or_else(lost);
        self.answer_close(&status.message);
        status
    }

    /// Returns the status of the call, where the client has violated the protocol.
    pub(super) fn fault(&self) -> Option<Status> {
        self.fault.borrow().clone()
    }

    /// Notes that the client has violated the protocol, or left.
    fn fail(&self, end: StreamEnd) -> io::Error {
        self.fault.replace(Some(end.status()));
        reset(end)
    }

    /// Ends the call behind all written packets.
    pub(super) fn end(&self, status: &Status) {
        let mut sender = self.sender.borrow_mut();
        for packet in self.waiting.borrow_mut().drain(..) {
            sender.send_last(packet.bytes);
        }
        sender.finish(status);
    }

    fn dial_response(&self, error: &str) -> Packet {
        Packet::DialResponse {
            error: error.to_owned(),
            connect_id: self.connect_id.get(),
            random: self.random,
        }
    }

    /// Reports once that the connection has ended.
    fn answer_close(&self, error: &str) {
        if !self.answered.replace(true) {
            self.put_close(self.connect_id.get(), error);
        }
    }

    fn put_close(&self, connect_id: i64, error: &str) {
        let error = error.to_owned();
        self.put(&Packet::CloseResponse { error, connect_id });
    }

    fn put(&self, packet: &Packet) {
        if let Some(kind) = PacketKind::of(packet) {
            self.queue(packet.frame(), kind);
        }
        // An end shows where the client is read.
        let _ = self.try_flush();
    }

    fn queue(&self, bytes: Bytes, kind: PacketKind) {
        self.traffic.sent(kind);
        let since = Instant::now();
        let packet = Waiting { bytes, kind, since };
        self.waiting.borrow_mut().push_back(packet);
    }

    fn try_flush(&self) -> io::Result<()> {
        let mut waiting = self.waiting.borrow_mut();
        while let Some(packet) = waiting.front_mut() {
            let sent = self.sender.borrow_mut().try_send(&mut packet.bytes);
            sent.map_err(|end| self.not_sent(end, packet.kind))?;
            if !packet.bytes.is_empty() {
                break;
            }
            self.traffic.wrote(packet.since.elapsed());
            waiting.pop_front();
        }
        Ok(())
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut waiting = self.waiting.borrow_mut();
        while let Some(packet) = waiting.front_mut() {
            let mut sender = self.sender.borrow_mut();
            let sent = ready!(sender.poll_send(cx, &mut packet.bytes));
            sent.map_err(|end| self.not_sent(end, packet.kind))?;
            self.traffic.wrote(packet.since.elapsed());
            waiting.pop_front();
        }
        Poll::Ready(Ok(()))
    }

    fn not_sent(&self, end: StreamEnd, kind: PacketKind) -> io::Error {
        self.traffic.not_sent(end.code().name(), kind);
        reset(end)
    }

    async fn next(&self) -> Result<Option<Packet>, StreamEnd> {
        let next = poll_fn(|cx| self.receiver.borrow_mut().poll_next(cx)).await;
        match &next {
            Ok(Some(packet)) => self.traffic.received(packet),
            Ok(None) => {}
            // After its end a client leaves as it likes.
            Err(_) if self.closed.get() || self.finished.get() => {}
            Err(end) => self.traffic.not_received(end.code().name()),
        }
        next
    }

    /// Waits for the next packet; `None` if there is none for now, after the target's end.
    async fn next_unless_finished(&self) -> Option<Result<Option<Packet>, StreamEnd>> {
        let finished = async {
            if !self.finished.get() {
                self.finishing.notified().await;
            }
        };
        tokio::select! {
            biased;
            packet = self.next() => Some(packet),
            () = finished => None,
        }
    }

    /// Handles a packet during the dial. Returns `true` if the client gives up.
    fn take_while_dialling(&self, packet: &Packet) -> bool {
        match packet {
            Packet::CloseDial { random } => *random == self.random,
            // It can only mean the connection that is being made.
            Packet::CloseRequest { .. } => true,
            // The connection has no name yet, so this is for none.
            _ => false,
        }
    }

    /// Handles a packet of an established connection; `None` if it has no data.
    fn take(&self, packet: Packet) -> io::Result<Option<Bytes>> {
        let own = self.connect_id.get();
        match packet {
            Packet::Data { connect_id: 0, .. } => {}
            Packet::Data { connect_id, data } if connect_id == own => {
                // Empty would be the end of file.
                return Ok(Some(data).filter(|data| !data.is_empty()));
            }
            Packet::Data { connect_id, .. } => {
                self.put_close(connect_id, text::MISMATCHED);
                self.answer_close(text::MISMATCHED);
                // That was all there is to say.
                self.fault.replace(Some(Status::ok()));
                return Err(io::Error::new(ErrorKind::ConnectionReset, text::MISMATCHED));
            }
            Packet::CloseRequest { connect_id } if connect_id == own => {
                self.closed.set(true);
                self.answer_close("");
                return Ok(Some(Bytes::new()));
            }
            Packet::CloseRequest { connect_id } => {
                self.put_close(connect_id, text::UNKNOWN_CONNECTION);
            }
            Packet::DialRequest { random, .. } => self.put(&Packet::DialResponse {
                error: "the stream has its connection; open another stream".to_owned(),
                connect_id: 0,
                random,
            }),
            _ => {}
        }
        Ok(None)
    }

    /// Waits until the client has reset the stream.
    async fn reset(&self) {
        poll_fn(|cx| self.sender.borrow_mut().poll_reset(cx)).await;
    }

    fn waiting(&self) -> usize {
        self.waiting
            .borrow()
            .iter()
            .map(|packet| packet.bytes.len())
            .sum()
    }
}

fn reset(end: StreamEnd) -> io::Error {
    io::Error::new(ErrorKind::ConnectionReset, end)
}

/// Implemented for a reference, so that the stream can be ended after the relay.
impl LocalSocket for &ProxySocket {
    async fn read(&self) -> io::Result<Bytes> {
        loop {
            if self.closed.get() {
                return Ok(Bytes::new());
            }
            if self.waiting() > MAX_WAITING {
                return Err(self.fail(StreamEnd::Unread));
            }
            let packet = match self.next_unless_finished().await {
                Some(Ok(Some(packet))) => packet,
                // Its half has ended, or the target's has and with it the connection.
                Some(Ok(None)) | None => {
                    self.closed.set(true);
                    continue;
                }
                Some(Err(_)) if self.finished.get() => {
                    self.closed.set(true);
                    continue;
                }
                Some(Err(end)) => return Err(self.fail(end)),
            };
            if self.connect_id.get() == 0 {
                if self.take_while_dialling(&packet) {
                    return Ok(Bytes::new());
                }
            } else if let Some(bytes) = self.take(packet)? {
                return Ok(bytes);
            }
        }
    }

    fn try_write(&self, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        if self.closed.get() {
            return Err(ErrorKind::BrokenPipe.into());
        }
        if !self.is_flushed() {
            return Ok(None);
        }
        let all: usize = slices.iter().map(|slice| slice.len()).sum();
        let length = all.min(MAX_DATA);
        if length == 0 {
            return Ok(Some(0));
        }
        let head = data_head(self.connect_id.get(), length);
        let mut packet = BytesMut::with_capacity(head.len() + length);
        packet.put(head);
        let mut left = length;
        for slice in slices {
            let part = slice.len().min(left);
            packet.put_slice(&slice[..part]);
            left -= part;
        }
        self.queue(packet.freeze(), PacketKind::Data);
        self.try_flush()?;
        Ok(Some(length))
    }

    fn is_flushed(&self) -> bool {
        self.waiting.borrow().is_empty()
    }

    async fn writable(&self) -> io::Result<()> {
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    async fn finish(&self) -> io::Result<()> {
        if self.closed.get() {
            return Ok(());
        }
        self.answer_close("");
        self.writable().await?;
        self.sender.borrow_mut().finish(&Status::ok());
        self.finished.set(true);
        self.finishing.notify_one();
        Ok(())
    }

    /// Reads on, because the end comes as a packet, and no other task reads any more. A client that has
    /// requested the end wants nothing more, which equals a reset.
    async fn broken(&self) {
        while self.read().await.is_ok_and(|data| !data.is_empty()) {}
    }

    /// Waits for a reset, except one behind the end of the client or the target, which is the usual end
    /// of a call.
    async fn broken_before_eof(&self) {
        self.reset().await;
        if self.closed.get() || self.finished.get() {
            std::future::pending().await
        }
    }

    /// Returns the end of both directions: the protocol has no half-close.
    fn peer_close(&self) -> PeerClose {
        PeerClose::Full
    }

    fn reset_on_close(&self, reset: bool) {
        self.broken.set(reset);
    }

    fn unsent(&self) -> usize {
        if self.closed.get() { 0 } else { self.waiting() }
    }
}

#[cfg(test)]
mod tests;
