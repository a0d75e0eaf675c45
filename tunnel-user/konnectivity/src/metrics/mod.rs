//! Metrics under Konnectivity's names, for existing dashboards and alerts: of its server
//! ([`ProxyServerMetrics`]) and its agent ([`ProxyAgentMetrics`]).
//!
//! Names, types, labels and their values are those of Konnectivity, and the series of a failure begins
//! with the first failure: Konnectivity's own tests compare whole families. The same holds for the help
//! of the families that these tests read. The counted events are ours: dials and connections count for
//! every frontend and tunnel, packets only where there are any.

mod agent;
mod client;
mod lease;
mod server;
mod stream;

pub(crate) use agent::{DialTrouble, Direction, ProxyAgentMetrics};
pub(crate) use client::ClientTraffic;
pub(crate) use lease::{LeaseCalls, LeaseReads};
pub(crate) use server::{DialFailure, ProxyServerMetrics, Service};
pub(crate) use stream::{PacketKind, Segment, StreamMetrics, Tally};

use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::{MetricType, TypedMetric};

/// One label: its name and its value.
type Label = (&'static str, &'static str);

/// A counter whose name stands as it is. OpenMetrics ends the name of a counter in `_total`, so there
/// this is a metric of unknown type; in Prometheus' own text format it is a counter.
#[derive(Clone, Debug, Default)]
struct Exact(Counter);

impl EncodeMetric for Exact {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.encode_gauge(&self.0.get())
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

impl TypedMetric for Exact {
    const TYPE: MetricType = MetricType::Unknown;
}

fn set(gauge: &Gauge, count: usize) {
    gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
}

#[cfg(test)]
mod tests;
