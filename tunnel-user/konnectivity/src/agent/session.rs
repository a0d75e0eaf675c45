//! The connections of one stream: executes the decisions of the state machine, on queues and sockets.
//!
//! One task reads the stream ([`Session::handle`]). Each connection has a task of its own, which
//! reports through its halves. All of them put packets into one outbox, in the order of events.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::Notify;
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::Packet;
use tunnel_proto::konnectivity::agent_end::{AgentEnd, Command, DIAL_TIMEOUT};
use tunnel_proto::preface::{ConnectionId, DialRequest};

use crate::grpc::{Outbox, Status};
use crate::metrics::Tally;
use cpc_datapath::stream::{RecvEnd, SendEnd};

/// One stream to a proxy-server.
#[derive(Debug)]
pub(super) struct Session {
    machine: RefCell<AgentEnd>,
    outbox: Rc<Outbox>,
    streams: RefCell<HashMap<i64, Rc<Stream>>>,
    released: Notify,
}

/// A dial request to serve.
pub(super) struct Asked {
    pub request: DialRequest,
    pub stream: Rc<Stream>,
}

/// One connection, between the stream's reader and its own task.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) id: i64,
    pub(super) destination: String,
    pub(super) queue: RefCell<VecDeque<Bytes>>,
    recv_end: Cell<Option<RecvEnd>>,
    send_end: Cell<Option<SendEnd>>,
    arrived: Notify,
    ended: Notify,
}

impl Stream {
    /// Ends the server's direction; delivered data can still be read.
    fn finish_half(&self) {
        self.recv_end
            .set(self.recv_end.get().or(Some(RecvEnd::Finished)));
        self.arrived.notify_one();
    }

    /// Ends both directions, unless they have ended.
    pub(super) fn end(&self, recv: RecvEnd, send: SendEnd) {
        let ended = match recv {
            // Also behind the end of a half.
            RecvEnd::Reset(_) => recv,
            recv => self.recv_end.get().unwrap_or(recv),
        };
        self.recv_end.set(Some(ended));
        self.send_end.set(self.send_end.get().or(Some(send)));
        self.arrived.notify_one();
        self.ended.notify_waiters();
    }

    /// Returns the end behind the queued data, if there is one.
    pub(super) fn recv_end(&self) -> Option<RecvEnd> {
        self.recv_end.get()
    }

    /// Returns the end of the sending direction, if it has ended.
    pub(super) fn send_end(&self) -> Option<SendEnd> {
        self.send_end.get()
    }

    /// Waits until data is queued, or no more will be.
    pub(super) async fn arrival(&self) {
        self.arrived.notified().await;
    }

    /// Waits for the end of both directions.
    pub(super) async fn ended(&self) -> (RecvEnd, SendEnd) {
        loop {
            let ended = self.ended.notified();
            if let (Some(recv), Some(send)) = (self.recv_end.get(), self.send_end.get()) {
                return (recv, send);
            }
            ended.await;
        }
    }
}

impl Session {
    /// Creates the session of a fresh stream. `tally` counts sent packets; `halves` tells whether the
    /// server supports half-close.
    pub(super) fn new(tally: Tally, halves: bool) -> Rc<Self> {
        Rc::new(Self {
            machine: RefCell::new(AgentEnd::default().with_halves(halves)),
            outbox: Outbox::counting(tally),
            streams: RefCell::default(),
            released: Notify::new(),
        })
    }

    /// Returns the send queue.
    pub(super) fn outbox(&self) -> &Rc<Outbox> {
        &self.outbox
    }

    /// Handles a packet. Returns a dial request for the caller to serve.
    pub(super) fn handle(self: &Rc<Self>, packet: Packet) -> Option<Asked> {
        let command = self.with(|machine| machine.handle(packet, Instant::now()));
        match command? {
            Command::Dial {
                id,
                random,
                destination,
            } => {
                let stream = Rc::new(Stream {
                    id,
                    destination: destination.to_string(),
                    queue: RefCell::default(),
                    recv_end: Cell::new(None),
                    send_end: Cell::new(None),
                    arrived: Notify::new(),
                    ended: Notify::new(),
                });
                self.streams.borrow_mut().insert(id, stream.clone());
                let request = DialRequest {
                    session: None,
                    // The number that the server's log has.
                    id: ConnectionId(i128::from(random).to_be_bytes()),
                    destination,
                    deadline: DIAL_TIMEOUT,
                    attempt: 0,
                };
                return Some(Asked { request, stream });
            }
            Command::Deliver { id, data } => {
                if let Some(stream) = self.streams.borrow().get(&id) {
                    stream.queue.borrow_mut().push_back(data);
                    stream.arrived.notify_one();
                }
            }
            Command::FinishHalf { id } => {
                if let Some(stream) = self.streams.borrow().get(&id) {
                    stream.finish_half();
                }
            }
            Command::Finish { id } => {
                let send = SendEnd::Stopped(CloseReason::PeerGone);
                self.forget(id, RecvEnd::Finished, send);
            }
            Command::Abort { id, reason } => self.abort(id, reason),
        }
        None
    }

    /// Whether no packet may be handled for now.
    pub(super) fn is_blocked(&self) -> bool {
        self.machine.borrow().is_blocked()
    }

    /// Waits until packets may be handled again. The connection that the others wait for loses its
    /// place when it makes no progress.
    pub(super) async fn released(&self) {
        loop {
            let until = self.machine.borrow().poll_timeout();
            let Some(until) = until else { return };
            tokio::select! {
                () = self.released.notified() => {}
                () = tokio::time::sleep_until(until.into()) => {
                    let command = self.with(|machine| machine.handle_timeout(Instant::now()));
                    if let Some(Command::Abort { id, reason }) = command {
                        self.warn_of_stall(id);
                        self.abort(id, reason);
                    }
                }
            }
        }
    }

    fn warn_of_stall(&self, id: i64) {
        if let Some(stream) = self.streams.borrow().get(&id) {
            tracing::warn!(
                destination = stream.destination,
                "the target takes nothing; its connection is reset, so that others go on"
            );
        }
    }

    /// Notes that the target was reached.
    pub(super) fn dialled(&self, id: i64) {
        self.with(|machine| machine.dialled(id));
    }

    /// Notes that the target was not reached.
    pub(super) fn dial_failed(&self, id: i64, error: String) {
        self.with(|machine| machine.dial_failed(id, error));
        self.streams.borrow_mut().remove(&id);
    }

    /// Notes that the target has taken `bytes` and the rest of so many packets.
    pub(super) fn taken(&self, id: i64, bytes: usize, packets: usize) {
        self.with(|machine| machine.taken(id, bytes, packets, Instant::now()));
    }

    /// Notes that the target takes no more.
    pub(super) fn stop(&self, id: i64) {
        self.with(|machine| machine.stop(id));
    }

    /// Notes that the target has ended, and all its data is in the outbox.
    pub(super) fn finish(&self, id: i64) {
        self.with(|machine| machine.finish(id));
        self.forget(id, RecvEnd::Finished, SendEnd::Acknowledged);
    }

    /// Notes that the target or its connection is broken.
    pub(super) fn reset(&self, id: i64, reason: CloseReason) {
        self.with(|machine| machine.reset(id, &reason.to_string()));
        self.abort(id, reason);
    }

    /// Tells the server to prefer other agents.
    pub(super) fn drain(&self) {
        self.with(AgentEnd::drain);
    }

    /// Whether there are neither dials nor connections.
    pub(super) fn is_empty(&self) -> bool {
        self.machine.borrow().is_empty()
    }

    /// Ends the connections of a stream that is gone or ends. Their packets in the outbox still leave,
    /// where possible.
    pub(super) fn end(&self, reason: CloseReason) {
        for (_, stream) in self.streams.borrow_mut().drain() {
            stream.end(RecvEnd::Link(reason), SendEnd::Link(reason));
        }
        self.outbox.finish(Status::ok());
    }

    /// Calls the state machine, sends its packets, and unblocks the stream's reader where that may go
    /// on.
    fn with<T>(&self, call: impl FnOnce(&mut AgentEnd) -> T) -> T {
        let mut machine = self.machine.borrow_mut();
        let blocked = machine.is_blocked();
        let done = call(&mut machine);
        while let Some(packet) = machine.poll_transmit() {
            self.outbox.push(&packet);
        }
        if blocked && !machine.is_blocked() {
            self.released.notify_one();
        }
        done
    }

    fn abort(&self, id: i64, reason: CloseReason) {
        self.forget(id, RecvEnd::Reset(reason), SendEnd::Stopped(reason));
    }

    fn forget(&self, id: i64, recv: RecvEnd, send: SendEnd) {
        if let Some(stream) = self.streams.borrow_mut().remove(&id) {
            stream.end(recv, send);
        }
    }
}
