//! One record per connection: the request, its outcome, the side that ended it, and the reason.
//!
//! Destinations appear in this record and nowhere else. Carried bytes appear nowhere.

use std::cell::Cell;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tunnel_proto::close::CloseReason;
use tunnel_proto::handover;
use tunnel_proto::preface::{ConnectionId, Destination};
use tunnel_proto::varint::VarInt;

use super::metrics::{Closer, DialMetrics, FrontendKind};
use super::targets::ACCESS;
use super::{millis, seconds};

/// Bytes of one connection.
#[derive(Debug, Default)]
pub struct Bytes {
    /// From the client to the target.
    pub up: Cell<u64>,
    /// From the target to the client.
    pub down: Cell<u64>,
}

/// Bytes of all connections over one tunnel. One shard writes them, any thread reads.
#[derive(Debug, Default)]
pub struct Totals {
    /// From clients to targets.
    pub up: AtomicU64,
    /// From targets to clients.
    pub down: AtomicU64,
}

/// A connection in service.
#[derive(Debug)]
pub struct Record {
    /// The id of the connection, the same in the agent's log.
    pub id: ConnectionId,
    /// Frontend that accepted the connection.
    pub frontend: FrontendKind,
    /// Address of the client, if there is one.
    pub client: Option<SocketAddr>,
    /// Requested destination.
    pub destination: Destination,
    /// Name of the agent that served the connection; on an agent the name of the server.
    pub peer: Option<Arc<str>>,
    /// Bytes so far.
    pub bytes: Bytes,
    /// Start of the connection.
    pub start: Instant,
    /// Time at which the dial succeeded.
    pub connected: Option<Instant>,
    /// Number of times that the connection went on over another tunnel.
    pub resumptions: u32,
    /// Time that it spent without a tunnel.
    pub stalled: Duration,
}

impl Record {
    /// Creates a record that starts now.
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
            resumptions: 0,
            stalled: Duration::ZERO,
        }
    }

    /// Returns the span of this connection's log lines, at level DEBUG.
    pub fn span(&self) -> tracing::Span {
        tracing::debug_span!("connection", id = %self.id, destination = %self.destination)
    }

    /// Notes that the connection went on over another tunnel, after `stall` without one.
    pub fn resumed(&mut self, stall: Duration) {
        self.resumptions = self.resumptions.saturating_add(1);
        self.stalled += stall;
    }

    /// Returns the record for another process.
    pub fn save(&self) -> handover::Record {
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let connected = self.connected.unwrap_or(self.start);
        handover::Record {
            id: self.id.0.to_vec().into(),
            frontend: self.frontend.label().into(),
            client: self.client.map(|it| it.to_string()).unwrap_or_default(),
            destination: self.destination.to_string(),
            peer: self.peer.as_deref().unwrap_or_default().into(),
            up: self.bytes.up.get(),
            down: self.bytes.down.get(),
            age: nanoseconds(self.start.elapsed()),
            connected: nanoseconds(connected.elapsed()),
            resumptions: self.resumptions,
            stalled: nanoseconds(self.stalled),
        }
    }

    /// Restores the record of a connection that another process has [saved](Self::save). `None`: it is
    /// malformed.
    pub fn restore(saved: &handover::Record) -> Option<Self> {
        let now = Instant::now();
        let before = |age: u64| now.checked_sub(Duration::from_nanos(age)).unwrap_or(now);
        // Further bytes are added: no connection carries 2^62.
        let carried = |bytes: u64| VarInt::try_from(bytes).ok().map(VarInt::into_inner);
        let client = match &*saved.client {
            "" => None,
            client => Some(client.parse().ok()?),
        };
        Some(Self {
            id: ConnectionId(<[u8; 16]>::try_from(&saved.id[..]).ok()?),
            frontend: FrontendKind::from_label(&saved.frontend)?,
            client,
            destination: saved.destination.parse().ok()?,
            peer: (!saved.peer.is_empty()).then(|| saved.peer.as_str().into()),
            bytes: Bytes {
                up: carried(saved.up)?.into(),
                down: carried(saved.down)?.into(),
            },
            start: before(saved.age),
            connected: Some(before(saved.connected)),
            resumptions: saved.resumptions,
            stalled: Duration::from_nanos(saved.stalled),
        })
    }

    /// Notes that the dial reached the target, and counts it.
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
            resumed = (self.resumptions > 0).then_some(self.resumptions),
            stalled_ms = (self.resumptions > 0).then(|| millis(self.stalled)),
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
    /// Counters of the connection.
    pub bytes: &'a Bytes,
    /// Counters of the tunnel.
    pub totals: &'a Totals,
    /// Counters of the process.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_with_more_bytes_than_any_connection_carries_is_malformed() {
        let most = VarInt::MAX.into_inner();
        let saved = |up, down| handover::Record {
            id: vec![1; 16].into(),
            frontend: "redirect".to_owned(),
            destination: "10.99.1.2:80".to_owned(),
            up,
            down,
            ..handover::Record::default()
        };
        let record = Record::restore(&saved(most, most)).unwrap();
        assert_eq!((record.save().up, record.save().down), (most, most));
        for saved in [saved(most + 1, 0), saved(0, u64::MAX)] {
            assert!(Record::restore(&saved).is_none());
        }
    }
}
