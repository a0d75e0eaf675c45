//! The audit: an append-only record of connections, and of decisions about peers.
//!
//! A record is a JSON object on a line of its own. Records of [`ACCESS`] are connections, served or
//! refused, at their end. Records of [`AUDIT`] name their event in `event`. No record holds a token or
//! carried bytes. The filter of the log does not affect the audit, and the log does not repeat it.
//!
//! The two kinds have separate queues, threads and files, so that a flood of connections displaces no
//! decision. Decisions that peers can cause repeatedly are throttled.
//!
//! The audit never blocks a tunnel: threads of its own write, and records that they can't write are
//! counted.

pub mod events;
mod files;
mod sink;
mod tail;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;
use tracing::Subscriber;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::Filter;
use tracing_subscriber::registry::LookupSpan;

use self::sink::Sink;
use super::line_writer::LineWriter;
use super::targets::ACCESS;
use super::throttle::{self, Throttle};
use cpc_config::AuditConfig;

/// Target of the records of decisions.
pub const AUDIT: &str = "cpc::audit";

/// Prefix of the names of the files that hold decisions.
const DECISIONS: &str = "audit";

/// Prefix of the names of the files that hold connections.
const CONNECTIONS: &str = "connections";

/// Number of series of files that share `audit.max_bytes`.
const SERIES: u64 = 2;

/// Failure to start the audit.
#[derive(Debug, thiserror::Error)]
#[error("audit: {place}: {why}")]
pub struct AuditError {
    place: String,
    why: io::Error,
}

/// The audit of a process. Dropping the last handle writes the pending records.
#[derive(Clone)]
pub struct Audit(Arc<Shared>);

struct Shared {
    counts: Arc<Counts>,
    overflow: Vec<ErrorCounter>,
    throttle: Throttle,
    _writers: Vec<WorkerGuard>,
}

/// Counters of a writer's records.
#[derive(Debug, Default)]
struct Counts {
    written: AtomicU64,
    lost: AtomicU64,
    removed: AtomicU64,
}

/// A layer that receives records.
type Records<S> = Box<dyn Layer<S> + Send + Sync>;

impl Audit {
    /// Starts the audit. The returned layers receive the records.
    ///
    /// # Errors
    /// [`AuditError`]: a process configured with an audit must not run without.
    pub fn start<S>(config: &AuditConfig) -> Result<(Self, Vec<Records<S>>), AuditError>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let counts = Arc::<Counts>::default();
        let throttle = Throttle::new(throttle::AUDIT, Instant::now());
        let (mut overflow, mut writers, mut layers) = (Vec::new(), Vec::new(), Vec::new());
        for (series, target) in [(DECISIONS, AUDIT), (CONNECTIONS, ACCESS)] {
            let sink = Sink::open(config, series, counts.clone())?;
            let (writer, guard) = NonBlockingBuilder::default()
                .lossy(true)
                .thread_name("audit")
                .finish(LineWriter::new(sink));
            overflow.push(writer.error_counter());
            writers.push(guard);
            let wanted = filter_fn(move |metadata| metadata.target() == target);
            let wanted = wanted.with_max_level_hint(LevelFilter::INFO);
            layers.push(records(writer, wanted.and(throttle.clone())));
        }
        let audit = Self(Arc::new(Shared {
            counts,
            overflow,
            throttle,
            _writers: writers,
        }));
        Ok((audit, layers))
    }

    /// Records the suppressed decisions since the last call.
    pub fn report(&self) {
        for lines in self.0.throttle.take_suppressed() {
            events::suppressed(&lines.kind, lines.lines, &lines.last);
        }
    }

    /// Returns the number of written records.
    pub fn written(&self) -> u64 {
        self.0.counts.written.load(Ordering::Relaxed)
    }

    /// Returns the number of records that could not be written.
    pub fn lost(&self) -> u64 {
        let overflow = self.0.overflow.iter();
        let overflow: usize = overflow.map(ErrorCounter::dropped_lines).sum();
        let overflow = u64::try_from(overflow).unwrap_or(u64::MAX);
        overflow.saturating_add(self.0.counts.lost.load(Ordering::Relaxed))
    }

    /// Returns the number of records that were removed before the end of their retention time.
    pub fn removed(&self) -> u64 {
        self.0.counts.removed.load(Ordering::Relaxed)
    }

    /// Returns the number of suppressed records.
    pub fn suppressed(&self) -> u64 {
        self.0.throttle.total()
    }

    /// Registers the metrics of the audit.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(self.clone()));
    }
}

fn records<S>(writer: NonBlocking, filter: impl Filter<S> + Send + Sync + 'static) -> Records<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_current_span(false)
        .with_span_list(false)
        .with_level(false)
        .with_writer(writer)
        .with_filter(filter)
        .boxed()
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
            (
                "audit_records_suppressed",
                "Audit records that were left out, because too many came of one kind",
                self.suppressed(),
            ),
        ] {
            let counter = ConstCounter::new(count);
            let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        Ok(())
    }
}
