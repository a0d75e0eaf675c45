//! One record for each connection: what was asked, what became of it, who ended it and why.
//!
//! Destinations stand here and nowhere else; nothing of what was carried does.

use std::cell::Cell;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::{ConnectionId, Destination};

use super::logging::ACCESS;
use super::metrics::{Closer, DialMetrics, FrontendKind};
use super::{millis, seconds};

/// Bytes of one connection.
#[derive(Debug, Default)]
pub struct Bytes {
    /// From the client to the target.
    pub up: Cell<u64>,
    /// From the target to the client.
    pub down: Cell<u64>,
}

/// Bytes of all connections over one tunnel. Written by one shard, read anywhere.
#[derive(Debug, Default)]
pub struct Totals {
    /// From clients to targets.
    pub up: AtomicU64,
    /// From targets to clients.
    pub down: AtomicU64,
}

/// A connection that is being served.
#[derive(Debug)]
pub struct Record {
    /// Its id, the same in the agent's log.
    pub id: ConnectionId,
    /// Where it came in.
    pub frontend: FrontendKind,
    /// The client, if it has an address.
    pub client: Option<SocketAddr>,
    /// What it asked for.
    pub destination: Destination,
    /// Who served it: an agent's name, or on an agent the server's.
    pub peer: Option<Arc<str>>,
    /// Bytes so far.
    pub bytes: Bytes,
    /// Since when.
    pub start: Instant,
    /// When the dial succeeded.
    pub connected: Option<Instant>,
}

impl Record {
    /// A record that starts now.
    pub fn new(id: ConnectionId, frontend: FrontendKind, destination: Destination) -> Self {
        Self {
            id,
            frontend,
            client: None,
            destination,
            peer: None,
            bytes: Bytes::default(),
            start: Instant::now(),
            connected: None,
        }
    }

    /// The span that what is logged of it stands in, at level DEBUG.
    pub fn span(&self) -> tracing::Span {
        tracing::debug_span!("connection", id = %self.id, destination = %self.destination)
    }

    /// Notes that the target has been reached, and counts it.
    pub fn reached(&mut self, metrics: &DialMetrics) {
        self.connected = Some(Instant::now());
        metrics.connected(self.frontend, self.start.elapsed());
    }

    /// Writes the record and counts it.
    pub fn end(
        &self,
        closer: Closer,
        reason: CloseReason,
        detail: &dyn fmt::Display,
        to: &DialMetrics,
    ) {
        to.ended(self.frontend, closer, reason);
        tracing::info!(
            target: ACCESS,
            id = %self.id,
            frontend = self.frontend.label(),
            client = self.client.map(tracing::field::display),
            destination = %self.destination,
            peer = self.peer.as_deref(),
            up = self.bytes.up.get(),
            down = self.bytes.down.get(),
            dial_ms = self.connected.map(|at| millis(at - self.start)),
            seconds = seconds(self.start.elapsed()),
            closed_by = closer.label(),
            reason = reason.label(),
            %detail,
        );
    }
}

/// Counts the bytes of a connection, of its tunnel and of the process. The local socket is the client's
/// (on a server) or the target's (on an agent).
#[derive(Debug)]
pub struct ConnectionMeter<'a, const LOCAL_IS_CLIENT: bool> {
    /// The connection's.
    pub bytes: &'a Bytes,
    /// The tunnel's.
    pub totals: &'a Totals,
    /// The process's.
    pub metrics: &'a DialMetrics,
}

impl<const LOCAL_IS_CLIENT: bool> ConnectionMeter<'_, LOCAL_IS_CLIENT> {
    /// Counts `n` bytes from the client to the target.
    pub fn up(&self, n: usize) {
        self.bytes.up.set(self.bytes.up.get() + n as u64);
        self.totals.up.fetch_add(n as u64, Ordering::Relaxed);
        self.metrics.up.inc_by(n as u64);
    }

    /// Counts `n` bytes from the target to the client.
    pub fn down(&self, n: usize) {
        self.bytes.down.set(self.bytes.down.get() + n as u64);
        self.totals.down.fetch_add(n as u64, Ordering::Relaxed);
        self.metrics.down.inc_by(n as u64);
    }
}
