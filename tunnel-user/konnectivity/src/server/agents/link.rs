//! A stream to an agent, as dials see it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::Notify;
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::server_end::{DialId, Event, InUse, ServerEnd};
use tunnel_proto::preface::DialRequest;

use crate::grpc::{Code, Outbox, Status};
use crate::metrics::{PacketKind, ProxyServerMetrics, Segment, Service, Tally};
use cpc_observe::metrics::GaugeGuard;
use cpc_server::routes::LinkInfo;

/// Task that waits for a connection.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Notification of a change.
    pub changed: Notify,
    /// Destination of the connection, for the log.
    destination: String,
}

/// A connected agent.
#[derive(Debug)]
pub(super) struct KonnectivityLink {
    /// State that other shards may read.
    pub info: Arc<LinkInfo>,
    /// Notification that the session must check the state machine again.
    pub(super) changed: Notify,
    pub(super) outbox: Rc<Outbox>,
    end: RefCell<ServerEnd<Rc<Waiting>>>,
    news: RefCell<VecDeque<AgentNews>>,
    closed: Cell<Option<CloseReason>>,
    metrics: ProxyServerMetrics,
    /// Counter of packets to the agent.
    sent: Tally,
    pub(super) received: Tally,
    /// Count of a connection that holds up the others.
    holding_up: RefCell<Option<GaugeGuard>>,
}

/// Event of the state machine that concerns the agent, not a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AgentNews {
    /// The agent answers.
    Alive,
    /// The agent does not answer.
    Silent,
    /// The agent drains.
    Draining,
}

impl KonnectivityLink {
    /// Creates the link of a fresh stream, for its session to drive. `halves` tells whether its agent
    /// supports half-close.
    pub(super) fn new(info: Arc<LinkInfo>, metrics: ProxyServerMetrics, halves: bool) -> Rc<Self> {
        let link = Rc::new(Self {
            info,
            changed: Notify::new(),
            outbox: Outbox::new(),
            end: RefCell::new(ServerEnd::new(Instant::now()).with_halves(halves)),
            news: RefCell::default(),
            closed: Cell::new(None),
            sent: metrics.streams.tally(Segment::ToAgent),
            received: metrics.streams.tally(Segment::FromAgent),
            metrics,
            holding_up: RefCell::default(),
        });
        link.step(|_, _| ());
        link
    }

    /// Sends `request`. Returns the id of the dial, and the notification of its changes.
    ///
    /// # Errors
    /// The reason why the link is gone.
    pub(super) fn dial(&self, request: &DialRequest) -> Result<(DialId, Rc<Waiting>), CloseReason> {
        if let Some(reason) = self.closed.get() {
            return Err(reason);
        }
        let destination = request.destination.to_string();
        let waiting = Rc::new(Waiting {
            changed: Notify::new(),
            destination: destination.clone(),
        });
        // The name that it has in our log.
        let [.., a, b, c, d, e, f, g, h] = request.id.0;
        let mut dial = DialId(i64::from_be_bytes([a, b, c, d, e, f, g, h]) & i64::MAX);
        while let Err(InUse(_)) =
            self.step(|end, _| end.dial(dial, destination.clone(), waiting.clone()))
        {
            dial = DialId(dial.0.wrapping_add(1) & i64::MAX);
        }
        Ok((dial, waiting))
    }

    /// Ends the link and everything on it. The first reason counts.
    pub(super) fn close(&self, reason: CloseReason) {
        if self.closed.get().is_some() {
            return;
        }
        self.closed.set(Some(reason));
        self.step(|end, _| end.close_all(reason));
        self.outbox
            .finish(Status::new(Code::UNAVAILABLE, reason.to_string()));
        self.changed.notify_one();
    }

    /// Returns the reason with which the link was closed, if it was.
    pub(super) fn closed(&self) -> Option<CloseReason> {
        self.closed.get()
    }

    /// Changes the state machine, and executes the consequences.
    pub(super) fn step<T>(
        &self,
        change: impl FnOnce(&mut ServerEnd<Rc<Waiting>>, Instant) -> T,
    ) -> T {
        let mut end = self.end.borrow_mut();
        let (timeout, wanted_packets) = (end.poll_timeout(), end.wants_packets());
        let done = change(&mut end, Instant::now());
        while let Some(packet) = end.poll_transmit() {
            self.sent.packet(&packet);
            self.outbox.push(&packet);
        }
        while let Some(event) = end.poll_event() {
            match event {
                Event::Changed(waiting) => waiting.changed.notify_waiters(),
                Event::Stalled(waiting) => tracing::warn!(
                    agent = %self.info.identity, destination = waiting.destination,
                    "connection is reset: its client reads nothing, and held up all others of the \
                     same tunnel"
                ),
                Event::Alive => self.news.borrow_mut().push_back(AgentNews::Alive),
                Event::Silent => self.news.borrow_mut().push_back(AgentNews::Silent),
                Event::Draining => self.news.borrow_mut().push_back(AgentNews::Draining),
            }
        }
        let wants_packets = end.wants_packets();
        if wants_packets != wanted_packets {
            self.info.held_up.store(!wants_packets, Ordering::Relaxed);
            let counted = || self.metrics.full_receive_channel(Service::Connect);
            self.holding_up.replace((!wants_packets).then(counted));
        }
        if end.poll_timeout() < timeout || wants_packets != wanted_packets {
            self.changed.notify_one();
        }
        done
    }

    /// Notes a packet with `bytes` of data to the target, and whether they end a session within the
    /// connection.
    pub(super) fn sent(&self, dial: DialId, bytes: usize, is_goodbye: bool) {
        self.sent.count(PacketKind::Data);
        let mut end = self.end.borrow_mut();
        end.sent(dial, bytes, Instant::now());
        if is_goodbye {
            end.note_session_end(dial);
        }
    }

    /// Reads from the state machine.
    pub(super) fn look<T>(&self, read: impl FnOnce(&ServerEnd<Rc<Waiting>>) -> T) -> T {
        read(&self.end.borrow())
    }

    /// Returns the next event for the session.
    pub(super) fn news(&self) -> Option<AgentNews> {
        self.news.borrow_mut().pop_front()
    }
}
