//! Packets and errors of the gRPC streams of clients.

use std::time::Duration;

use prometheus_client::metrics::histogram::Histogram;
use tunnel_proto::konnectivity::Packet;

use super::{PacketKind, ProxyServerMetrics, Segment, StreamMetrics, Tally};

/// Counters of the traffic between clients and a server, on any number of streams.
#[derive(Clone, Debug)]
pub(crate) struct ClientTraffic {
    received: Tally,
    sent: Tally,
    streams: StreamMetrics,
    writes: Histogram,
}

impl ClientTraffic {
    pub(super) fn new(streams: &StreamMetrics, writes: &Histogram) -> Self {
        Self {
            received: streams.tally(Segment::FromClient),
            sent: streams.tally(Segment::ToClient),
            streams: streams.clone(),
            writes: writes.clone(),
        }
    }

    /// Counts a packet from a client.
    pub(crate) fn received(&self, packet: &Packet) {
        self.received.packet(packet);
    }

    /// Counts a packet to a client, before it is written.
    pub(crate) fn sent(&self, kind: PacketKind) {
        self.sent.count(kind);
    }

    /// Observes the time that a packet waited for its client.
    pub(crate) fn wrote(&self, elapsed: Duration) {
        self.writes.observe(elapsed.as_secs_f64());
    }

    /// Counts a stream that failed while its client was read. `code` is gRPC's name of the status.
    pub(crate) fn not_received(&self, code: &'static str) {
        self.streams.error(Segment::FromClient, code, None);
    }

    /// Counts a packet that its client did not take.
    pub(crate) fn not_sent(&self, code: &'static str, kind: PacketKind) {
        self.streams.error(Segment::ToClient, code, Some(kind));
    }
}

impl Default for ClientTraffic {
    /// Creates counters that are not registered.
    fn default() -> Self {
        ProxyServerMetrics::default().clients()
    }
}
