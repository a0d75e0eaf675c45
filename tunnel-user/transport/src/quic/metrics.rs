//! Metrics of the tunnels' UDP sockets: system calls, and the datagrams that they move.
//!
//! The ratio matters: with segmentation offloads a call moves many datagrams, without them one, at
//! three times the cost or more. Each call counts once, by atomics that the scraping thread reads.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use quinn_udp::RecvMeta;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    direction: &'static str,
}

/// Metrics of all sockets of this process together.
#[derive(Clone, Debug, Default)]
pub(super) struct UdpMetrics {
    /// Sent packets.
    pub(super) send: Moved,
    /// Received packets.
    pub(super) receive: Moved,
}

/// One direction.
#[derive(Clone, Debug, Default)]
pub(super) struct Moved {
    calls: Counter,
    datagrams: Counter,
    bytes: Counter,
    /// 1 while offload works.
    pub(super) offload: Gauge,
}

impl UdpMetrics {
    /// Registers the metrics.
    pub(super) fn register(registry: &mut Registry) -> Self {
        let counter = || Family::<Labels, Counter>::default();
        let (calls, datagrams, bytes) = (counter(), counter(), counter());
        let offload = Family::<Labels, Gauge>::default();
        let of = |direction| {
            let labels = Labels { direction };
            Moved {
                calls: calls.get_or_create(&labels).clone(),
                datagrams: datagrams.get_or_create(&labels).clone(),
                bytes: bytes.get_or_create(&labels).clone(),
                offload: offload.get_or_create(&labels).clone(),
            }
        };
        let metrics = Self {
            send: of("send"),
            receive: of("receive"),
        };
        registry.register(
            "udp_calls",
            "Sends and receives that moved datagrams of tunnels",
            calls,
        );
        registry.register(
            "udp_datagrams",
            "Datagrams of tunnels; by far more than calls where offloads work",
            datagrams,
        );
        registry.register("udp_bytes", "Bytes in these datagrams", bytes);
        registry.register(
            "udp_offload",
            "1 while segmentation offload (send: GSO, receive: GRO) works",
            offload,
        );
        metrics
    }
}

impl Moved {
    /// Counts the datagrams that one call has received.
    pub(super) fn count<'a>(&self, batches: impl Iterator<Item = &'a RecvMeta>) {
        let (datagrams, bytes) = batches.fold((0, 0), |(datagrams, bytes), meta| {
            (
                datagrams + meta.len.div_ceil(meta.stride.max(1)),
                bytes + meta.len,
            )
        });
        self.add(datagrams, bytes);
    }

    /// Counts the datagrams and bytes that one call has moved.
    pub(super) fn add(&self, datagrams: usize, bytes: usize) {
        self.calls.inc();
        self.datagrams.inc_by(datagrams as u64);
        self.bytes.inc_by(bytes as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_are_counted_by_their_stride() {
        let meta = |len, stride| RecvMeta {
            len,
            stride,
            ..RecvMeta::default()
        };
        let moved = Moved::default();
        moved.count([meta(2500, 1000), meta(10, 10)].iter());
        assert_eq!((moved.calls.get(), moved.datagrams.get()), (1, 4));
        assert_eq!(moved.bytes.get(), 2510);
        moved.count([meta(0, 0)].iter());
        assert_eq!(moved.datagrams.get(), 4);
    }
}
