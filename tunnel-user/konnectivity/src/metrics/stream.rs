//! Packets and errors of gRPC streams.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tunnel_proto::konnectivity::Packet;

use super::Label;

/// Sender and receiver of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Segment {
    /// From a client to the server.
    FromClient,
    /// From the server to a client.
    ToClient,
    /// From an agent to the server.
    FromAgent,
    /// From the server to an agent.
    ToAgent,
}

impl Segment {
    const ALL: [Self; 4] = [
        Self::FromClient,
        Self::ToClient,
        Self::FromAgent,
        Self::ToAgent,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::FromClient => "from_client",
            Self::ToClient => "to_client",
            Self::FromAgent => "from_agent",
            Self::ToAgent => "to_agent",
        }
    }
}

/// The type of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PacketKind {
    DialRequest,
    DialResponse,
    CloseRequest,
    CloseResponse,
    Data,
    CloseDial,
    Drain,
}

impl PacketKind {
    /// Returns the kind of `packet`; `None` if its type is unknown.
    pub(crate) fn of(packet: &Packet) -> Option<Self> {
        Some(match packet {
            Packet::DialRequest { .. } => Self::DialRequest,
            Packet::DialResponse { .. } => Self::DialResponse,
            Packet::CloseRequest { .. } => Self::CloseRequest,
            Packet::CloseResponse { .. } => Self::CloseResponse,
            Packet::Data { .. } => Self::Data,
            Packet::CloseDial { .. } => Self::CloseDial,
            Packet::Drain => Self::Drain,
            Packet::Unknown(_) => return None,
        })
    }

    const ALL: [Self; 7] = [
        Self::DialRequest,
        Self::DialResponse,
        Self::CloseRequest,
        Self::CloseResponse,
        Self::Data,
        Self::CloseDial,
        Self::Drain,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::DialRequest => "DIAL_REQ",
            Self::DialResponse => "DIAL_RSP",
            Self::CloseRequest => "CLOSE_REQ",
            Self::CloseResponse => "CLOSE_RSP",
            Self::Data => "DATA",
            Self::CloseDial => "DIAL_CLS",
            Self::Drain => "DRAIN",
        }
    }
}

/// Counters of gRPC streams.
#[derive(Clone, Debug)]
pub(crate) struct StreamMetrics {
    packets: Family<[Label; 2], Counter>,
    /// The same counters by segment and type: every packet counts, so a lookup would be costly.
    by_kind: [[Counter; PacketKind::ALL.len()]; Segment::ALL.len()],
    errors: Family<[Label; 3], Counter>,
}

impl Default for StreamMetrics {
    fn default() -> Self {
        let packets = Family::<[Label; 2], Counter>::default();
        let by_kind = Segment::ALL.map(|segment| {
            PacketKind::ALL.map(|kind| {
                let labels = [("segment", segment.label()), ("packet_type", kind.label())];
                packets.get_or_create_owned(&labels)
            })
        });
        Self {
            packets,
            by_kind,
            errors: Family::default(),
        }
    }
}

impl StreamMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "stream_packets",
            "Packets sent and received over gRPC, by segment and type",
            self.packets.clone(),
        );
        registry.register(
            "stream_errors",
            "Errors of gRPC streams, by segment, status code and the type of the packet if any",
            self.errors.clone(),
        );
    }

    /// Returns the counter of the packets on one segment.
    pub(crate) fn tally(&self, segment: Segment) -> Tally {
        Tally(self.by_kind[segment as usize].clone())
    }

    /// Counts an error. `code` is gRPC's name of the status, such as `Unavailable`; `packet` is the
    /// kind of an unsent packet.
    pub(crate) fn error(&self, segment: Segment, code: &'static str, packet: Option<PacketKind>) {
        let labels = [
            ("segment", segment.label()),
            ("code", code),
            ("packet_type", packet.map_or("Unknown", PacketKind::label)),
        ];
        self.errors.get_or_create(&labels).inc();
    }
}

/// Counter of the packets on one segment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally([Counter; PacketKind::ALL.len()]);

impl Tally {
    /// Counts one packet, sent or received.
    pub(crate) fn count(&self, kind: PacketKind) {
        self.0[kind as usize].inc();
    }

    /// Counts a packet if its type is known.
    pub(crate) fn packet(&self, packet: &Packet) {
        PacketKind::of(packet)
            .into_iter()
            .for_each(|kind| self.count(kind));
    }
}
