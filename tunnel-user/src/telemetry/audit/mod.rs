//! The audit: an append-only record of who reached what, and of what was decided about whom.
//!
//! A record is a JSON object on a line of its own. Those of [`ACCESS`] are connections, served or
//! refused, at their end; those of [`AUDIT`] name what happened in `event`. None holds a token or
//! anything that was carried. The log's filter does not touch it, and the log does not repeat it.
//!
//! It never holds a tunnel up: a thread of its own writes, and what that can't write is counted.

pub mod events;
mod files;
mod sink;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;
use tracing::{Metadata, Subscriber};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::registry::LookupSpan;

use self::sink::Sink;
use super::lines::Lines;
use super::logging::ACCESS;
use crate::config::AuditConfig;

/// Target of the records that are no connections.
pub const AUDIT: &str = "cpc::audit";

/// An audit that can't be kept.
#[derive(Debug, thiserror::Error)]
#[error("audit: {place}: {why}")]
pub struct AuditError {
    place: String,
    why: io::Error,
}

/// The audit of a process. What is still to be written is when its last handle is dropped.
#[derive(Clone)]
pub struct Audit(Arc<Kept>);

struct Kept {
    counts: Arc<Counts>,
    overflow: ErrorCounter,
    _writer: WorkerGuard,
}

/// What became of the records that a writer got.
#[derive(Debug, Default)]
struct Counts {
    written: AtomicU64,
    lost: AtomicU64,
    removed: AtomicU64,
}

impl Audit {
    /// Begins to keep it: the layer takes the records.
    ///
    /// # Errors
    /// [`AuditError`]: whoever wants an audit does not want to run without.
    pub fn start<S>(
        config: &AuditConfig,
    ) -> Result<(Self, Box<dyn Layer<S> + Send + Sync>), AuditError>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let counts = Arc::<Counts>::default();
        let sink = Sink::open(config, counts.clone())?;
        let (writer, guard) = NonBlockingBuilder::default()
            .lossy(true)
            .thread_name("audit")
            .finish(Lines::new(sink));
        let audit = Self(Arc::new(Kept {
            counts,
            overflow: writer.error_counter(),
            _writer: guard,
        }));
        let records = tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_level(false)
            .with_writer(writer);
        let records_only = filter_fn(is_record).with_max_level_hint(LevelFilter::INFO);
        Ok((audit, records.with_filter(records_only).boxed()))
    }

    /// Records that were written.
    pub fn written(&self) -> u64 {
        self.0.counts.written.load(Ordering::Relaxed)
    }

    /// Records that were not.
    pub fn lost(&self) -> u64 {
        let overflow = u64::try_from(self.0.overflow.dropped_lines()).unwrap_or(u64::MAX);
        overflow.saturating_add(self.0.counts.lost.load(Ordering::Relaxed))
    }

    /// Records that were removed before their time.
    pub fn removed(&self) -> u64 {
        self.0.counts.removed.load(Ordering::Relaxed)
    }

    /// Registers its metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(self.clone()));
    }
}

impl fmt::Debug for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Audit")
            .field("written", &self.written())
            .field("lost", &self.lost())
            .finish()
    }
}

impl Collector for Audit {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, count) in [
            (
                "audit_records",
                "Audit records that were written",
                self.written(),
            ),
            (
                "audit_records_lost",
                "Audit records that could not be written",
                self.lost(),
            ),
            (
                "audit_records_removed",
                "Audit records that were removed before their time, for others to fit",
                self.removed(),
            ),
        ] {
            let counter = ConstCounter::new(count);
            let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        Ok(())
    }
}

/// Whether an event belongs to the audit.
fn is_record(metadata: &Metadata<'_>) -> bool {
    matches!(metadata.target(), ACCESS | AUDIT)
}
