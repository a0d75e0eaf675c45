//! Driver of a sans-IO session over its control stream: bytes in and out, and its timer.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::Notify;
use tunnel_proto::close::CloseReason;
use tunnel_proto::session::{AgentSession, ServerSession, SessionError};

use super::tunnel::{Recv, Send, TunnelError, TunnelRecv, TunnelSend};
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};

/// Common interface of the two sessions.
pub trait Machine {
    /// Event of the session.
    type Event;
    /// See [`ServerSession::handle_bytes`].
    fn handle_bytes(&mut self, bytes: &[u8], now: Instant) -> Result<(), SessionError>;
    /// See [`ServerSession::handle_timeout`].
    fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError>;
    /// See [`ServerSession::poll_timeout`].
    fn poll_timeout(&self) -> Option<Instant>;
    /// See [`ServerSession::poll_transmit`].
    fn poll_transmit(&mut self) -> Option<Bytes>;
    /// See [`ServerSession::poll_event`].
    fn poll_event(&mut self) -> Option<Self::Event>;
    /// See [`ServerSession::note_traffic`].
    fn note_traffic(&mut self, now: Instant);
}

macro_rules! machine {
    ($session:ty, $event:ty) => {
        impl Machine for $session {
            type Event = $event;

            fn handle_bytes(&mut self, bytes: &[u8], now: Instant) -> Result<(), SessionError> {
                self.handle_bytes(bytes, now)
            }

            fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
                self.handle_timeout(now)
            }

            fn poll_timeout(&self) -> Option<Instant> {
                self.poll_timeout()
            }

            fn poll_transmit(&mut self) -> Option<Bytes> {
                self.poll_transmit()
            }

            fn poll_event(&mut self) -> Option<$event> {
                self.poll_event()
            }

            fn note_traffic(&mut self, now: Instant) {
                self.note_traffic(now);
            }
        }
    };
}

machine!(ServerSession, tunnel_proto::session::ServerEvent);
machine!(AgentSession, tunnel_proto::session::AgentEvent);

/// Reason why a control stream ended.
#[derive(Debug, thiserror::Error)]
pub enum ControlEnd {
    /// The session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The tunnel is gone.
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    /// The peer ended the stream and kept the tunnel, which violates the protocol.
    #[error("the peer closed the control stream")]
    Closed,
}

impl ControlEnd {
    /// Returns the reason with which the tunnel ends.
    pub fn reason(&self) -> CloseReason {
        match self {
            Self::Session(error) => error.reason(),
            Self::Tunnel(error) => error.reason(),
            Self::Closed => CloseReason::ProtocolError,
        }
    }
}

/// A session that other tasks may use while it is being driven.
#[derive(Debug)]
pub struct Shared<M> {
    machine: RefCell<M>,
    changed: Notify,
}

impl<M: Machine> Shared<M> {
    /// Shares `machine` within its shard.
    pub fn new(machine: M) -> Rc<Self> {
        Rc::new(Self {
            machine: RefCell::new(machine),
            changed: Notify::new(),
        })
    }

    /// Changes the session and sends the messages that follow.
    pub fn with<T>(&self, change: impl FnOnce(&mut M) -> T) -> T {
        let done = change(&mut self.machine.borrow_mut());
        self.changed.notify_one();
        done
    }

    /// Reads from the session.
    pub fn get<T>(&self, read: impl FnOnce(&M) -> T) -> T {
        read(&self.machine.borrow())
    }

    /// Notes that a stream was opened. Wakes the driver only if that makes its timer earlier.
    pub fn note_traffic(&self, now: Instant) {
        let mut machine = self.machine.borrow_mut();
        let before = machine.poll_timeout();
        machine.note_traffic(now);
        if machine.poll_timeout() < before {
            self.changed.notify_one();
        }
    }
}

/// A session and its stream.
#[derive(Debug)]
pub struct ControlStream<M> {
    session: Rc<Shared<M>>,
    send: Send,
    recv: Recv,
    pending: Bytes,
    /// Received data that was not handled yet.
    arrived: Vec<Bytes>,
}

impl<M: Machine> ControlStream<M> {
    /// Creates a driver over a fresh stream.
    pub fn new(session: Rc<Shared<M>>, (send, recv): (Send, Recv)) -> Self {
        Self {
            session,
            send,
            recv,
            pending: Bytes::new(),
            arrived: Vec::new(),
        }
    }

    /// Drives the session until its next event. Cancelling loses nothing.
    ///
    /// # Errors
    /// [`ControlEnd`]; the session is over.
    pub async fn next(&mut self) -> Result<M::Event, ControlEnd> {
        loop {
            let timeout = {
                let mut machine = self.session.machine.borrow_mut();
                if self.pending.is_empty() {
                    self.pending = machine.poll_transmit().unwrap_or_default();
                }
                if let Some(event) = machine.poll_event() {
                    return Ok(event);
                }
                machine.poll_timeout()
            };
            tokio::select! {
                read = self.recv.recv(&mut self.arrived) => {
                    read.map_err(|end| read_end(end, &self.recv))?;
                    let mut machine = self.session.machine.borrow_mut();
                    for bytes in self.arrived.drain(..) {
                        machine.handle_bytes(&bytes, Instant::now())?;
                    }
                }
                // What was not taken is still in `pending`.
                sent = self.send.send(&mut self.pending), if !self.pending.is_empty() => {
                    sent.map_err(|end| write_end(end, &self.send))?;
                }
                () = sleep_until(timeout) => {
                    self.session.machine.borrow_mut().handle_timeout(Instant::now())?;
                }
                () = self.session.changed.notified() => {}
            }
        }
    }

    /// Sends the remaining messages of the session, for as long as the stream takes them.
    pub async fn flush(&mut self) {
        loop {
            if self.pending.is_empty() {
                match self.session.machine.borrow_mut().poll_transmit() {
                    Some(bytes) => self.pending = bytes,
                    None => break,
                }
            }
            if self.send.send(&mut self.pending).await.is_err() {
                break;
            }
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

fn read_end(end: RecvEnd, recv: &Recv) -> ControlEnd {
    match (end, recv.tunnel_error()) {
        (RecvEnd::Link(_), Some(error)) => error.into(),
        _ => ControlEnd::Closed,
    }
}

fn write_end(end: SendEnd, send: &Send) -> ControlEnd {
    match (end, send.tunnel_error()) {
        (SendEnd::Link(_), Some(error)) => error.into(),
        _ => ControlEnd::Closed,
    }
}
