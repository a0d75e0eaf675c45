//! Tracing to standard error, with a filter that can change while the process runs.
//!
//! Invariant: an event is one line of visible characters. Lines hold texts of peers, and none of these
//! can begin another line or control a terminal.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fmt as text, io, iter};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry as Metrics;
use tracing::Subscriber;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use super::audit::{AUDIT, Audit, AuditError};
use super::journal::{self, Prioritised};
use super::line_writer::LineWriter;
use super::targets::ACCESS;
use super::throttle::{self, Throttle};
use cpc_config::{AuditConfig, LogConfig, LogFormat};
use cpc_host::report::report;

/// Interval of the reports about suppressed lines.
const REPORT: Duration = Duration::from_secs(10);

/// Module in which the Kubernetes client logs a failed request, without its name and error. The caller
/// logs these.
const KUBERNETES: &str = "kube_client::client::builder";

/// A handle to the filter of the running process. Dropping the last one writes the pending lines.
#[derive(Clone, Debug)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
    audit: Option<Audit>,
    throttle: Throttle,
    lost: LostLines,
    _writer: Arc<WorkerGuard>,
}

/// Text that is not a filter, or a logger that has ended.
#[derive(Debug, thiserror::Error)]
#[error("{filter:?} is no log filter: {why}; `info` and `info,cpc=debug` are")]
pub struct FilterError {
    filter: String,
    why: String,
}

impl LogHandle {
    /// Reports the suppressed lines every `REPORT`, in the log and in the audit.
    pub async fn keep_reporting(self) {
        loop {
            tokio::time::sleep(REPORT).await;
            self.report();
        }
    }

    /// Reports the suppressed lines since the last call.
    pub fn report(&self) {
        for lines in self.throttle.take_suppressed() {
            tracing::warn!(
                suppressed = lines.lines,
                line = lines.kind,
                last = lines.last,
                "too many lines of one kind, further ones are counted only"
            );
        }
        if let Some(audit) = &self.audit {
            audit.report();
        }
    }

    /// Registers the metrics of the log and of the audit.
    pub fn register(&self, registry: &mut Metrics) {
        let metrics = LogMetrics(self.throttle.clone(), self.lost.clone());
        registry.register_collector(Box::new(metrics));
        if let Some(audit) = &self.audit {
            audit.register(registry);
        }
    }

    /// Replaces the filter.
    ///
    /// # Errors
    /// [`FilterError`]; the old filter stays.
    pub fn set(&self, filter: &str) -> Result<(), FilterError> {
        let parsed = parse(filter)?;
        self.filter.reload(parsed).map_err(|e| FilterError {
            filter: filter.into(),
            why: e.to_string(),
        })
    }

    /// Replaces the filter by that of a reloaded configuration. Returns whether it is in force; a
    /// failure is logged, and the old filter stays.
    pub fn reload(&self, filter: &str) -> bool {
        let set = self.set(filter);
        if let Err(error) = &set {
            tracing::warn!(
                error = report(error),
                "log filter not reloaded, the old one stays"
            );
        }
        set.is_ok()
    }
}

/// Counter of lines that were not written.
#[derive(Clone, Debug)]
struct LostLines {
    lost: Arc<AtomicU64>,
    overflow: ErrorCounter,
}

impl LostLines {
    fn count(&self) -> u64 {
        let overflow = u64::try_from(self.overflow.dropped_lines()).unwrap_or(u64::MAX);
        overflow.saturating_add(self.lost.load(Ordering::Relaxed))
    }
}

#[derive(Debug)]
struct LogMetrics(Throttle, LostLines);

impl Collector for LogMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), text::Error> {
        for (name, help, count) in [
            (
                "log_lines_suppressed",
                "Lines that were left out of the log, because too many came of one kind",
                self.0.total(),
            ),
            (
                "log_lines_lost",
                "Lines of the log that could not be written",
                self.1.count(),
            ),
        ] {
            let counter = ConstCounter::new(count);
            let metric = encoder.encode_descriptor(name, help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        Ok(())
    }
}

/// Failure to start logging.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is invalid.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The audit can't start.
    #[error(transparent)]
    Audit(#[from] AuditError),
}

impl LogHandle {
    /// Returns the handle of a log that no event reaches, for programs that embed a server or an agent.
    ///
    /// # Errors
    /// The filter is invalid.
    pub fn detached(config: &LogConfig) -> Result<Self, LogError> {
        subscriber(config, &AuditConfig::default()).map(|(_, handle)| handle)
    }
}

/// Starts logging and the audit. Called once per process.
///
/// # Errors
/// [`LogError`] when the filter is invalid, another logger is installed, or the audit can't start.
pub fn init(config: &LogConfig, audit: &AuditConfig) -> Result<LogHandle, LogError> {
    let (subscriber, handle) = subscriber(config, audit)?;
    subscriber.try_init().map_err(|e| FilterError {
        filter: config.filter.clone(),
        why: e.to_string(),
    })?;
    Ok(handle)
}

fn subscriber(
    config: &LogConfig,
    audit: &AuditConfig,
) -> Result<(impl Subscriber + Send + Sync + use<>, LogHandle), LogError> {
    let (filter, handle) = reload::Layer::new(parse(&config.filter)?);
    // A separate thread writes: a stuck reader of the log must not stop the tunnels. Lines above the
    // capacity of its queue are dropped.
    let lines = LineWriter::new(io::stderr());
    let lost = lines.lost();
    let (writer, guard) = NonBlockingBuilder::default().lossy(true).finish(lines);
    let overflow = writer.error_counter();
    let lines = fmt::layer().with_writer(writer);
    let access = config.access;
    let is_logged = filter_fn(move |metadata| match metadata.target() {
        AUDIT => false,
        ACCESS => access,
        KUBERNETES => false,
        _ => true,
    });
    // Without a hint this filter would hide that of the other one.
    let filter = filter.and(is_logged.with_max_level_hint(LevelFilter::TRACE));
    let throttle = Throttle::new(throttle::LOG, Instant::now());
    let filter = filter.and(throttle.clone());
    let is_journal = journal::is_stderr();
    let lines = match config.format {
        // Colours are control characters too.
        LogFormat::Text => lines
            .with_ansi(false)
            .map_event_format(|format| Prioritised::new(format, is_journal))
            .with_filter(filter)
            .boxed(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .map_event_format(|format| Prioritised::new(format, is_journal))
            .with_filter(filter)
            .boxed(),
    };
    let (audit, records) = match audit.is_on() {
        true => Some(Audit::start(audit)?).unzip(),
        false => (None, None),
    };
    // Not `.with(records)`: a layer that is `None` has no filter, so events that no other layer selects
    // would be recorded for it, a span a packet.
    let records = records.into_iter().flatten();
    let layers: Vec<_> = iter::once(lines).chain(records).collect();
    let log = LogHandle {
        filter: handle,
        audit,
        throttle,
        lost: LostLines { lost, overflow },
        _writer: Arc::new(guard),
    };
    Ok((tracing_subscriber::registry().with(layers), log))
}

/// Modules whose name in a filter differs from that of their crate.
const RENAMED: [(&str, &str); 7] = [
    ("access", "cpc::access"),
    ("admin", "cpc_observe::admin"),
    ("cli", "cpc::cli"),
    ("join", "cpc_identity::join"),
    ("process", "cpc_host"),
    ("telemetry", "cpc_observe"),
    ("tls", "cpc_identity"),
];

/// Returns a directive with the module names of tracing: `cpc::agent=debug` means the crate
/// `cpc_agent`, and `cpc=debug` every crate of this program, but not [`ACCESS`].
fn directive(text: &str) -> String {
    let Some(rest) = text.strip_prefix("cpc") else {
        return text.to_owned();
    };
    if is_every_crate(text) {
        // tracing compares the beginnings of targets.
        return format!("cpc_{rest},cpc::cli{rest}");
    }
    let Some(path) = rest.strip_prefix("::") else {
        return text.to_owned();
    };
    let end = path.find([':', '=', '[']).unwrap_or(path.len());
    let (module, rest) = path.split_at(end);
    match RENAMED.iter().find(|(name, _)| *name == module) {
        Some((_, target)) => format!("{target}{rest}"),
        None => format!("cpc_{module}{rest}"),
    }
}

/// Checks a filter.
///
/// # Errors
/// [`FilterError`] when it can't be read.
pub fn check_filter(filter: &str) -> Result<(), FilterError> {
    parse(filter).map(drop)
}

/// Whether a directive is about every crate of this program.
fn is_every_crate(directive: &str) -> bool {
    let rest = directive.strip_prefix("cpc");
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['=', '[']))
}

/// Parses a filter, in which the modules of this program are below `cpc`.
fn parse(filter: &str) -> Result<EnvFilter, FilterError> {
    let mut directives: Vec<_> = filter.split(',').map(str::trim).collect();
    // Of equal targets the last one counts: the directives of `cpc` must not replace those of a module.
    directives.sort_by_key(|directive| !is_every_crate(directive));
    let translated: Vec<_> = directives.into_iter().map(directive).collect();
    EnvFilter::builder()
        .parse(translated.join(","))
        .map_err(|e| FilterError {
            filter: filter.into(),
            why: e.to_string(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each packet and each frame has a span, which must cost nothing unless a filter selects it.
    #[test]
    fn what_is_not_logged_is_not_recorded() {
        let directory = tempfile::tempdir().unwrap();
        let kept = AuditConfig {
            directory: Some(directory.path().into()),
            ..AuditConfig::default()
        };
        for audit in [AuditConfig::default(), kept] {
            let (subscriber, log) = subscriber(&LogConfig::default(), &audit).unwrap();
            let span = || tracing::trace_span!("recv");
            tracing::subscriber::with_default(subscriber, || {
                assert_eq!(LevelFilter::current(), LevelFilter::INFO);
                assert!(span().is_disabled());
                log.set("trace").unwrap();
                assert!(!span().is_disabled());
            });
        }
    }

    #[test]
    fn a_failed_request_is_told_by_who_asked_alone() {
        let (subscriber, _log) =
            subscriber(&LogConfig::default(), &AuditConfig::default()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            assert!(!tracing::enabled!(target: KUBERNETES, tracing::Level::ERROR));
            assert!(tracing::enabled!(target: "kube_client", tracing::Level::ERROR));
        });
    }

    #[test]
    fn what_is_left_out_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        let config = AuditConfig {
            directory: Some(directory.path().into()),
            ..AuditConfig::default()
        };
        let (subscriber, log) = subscriber(&LogConfig::default(), &config).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            for n in 0..1000 {
                tracing::info!(target: AUDIT, event = "claims_refused", agent = "w1", n);
                tracing::warn!(agent = "w1", n, "claims refused");
            }
            log.report();
            log.report();
        });
        assert_eq!(log.throttle.take_suppressed(), []);
        assert!(log.throttle.total() > 800);
        // Waits for the writers.
        drop(log);
        let mut text = String::new();
        for entry in std::fs::read_dir(directory.path()).unwrap() {
            text += &std::fs::read_to_string(entry.unwrap().path()).unwrap();
        }
        let refused = r#""event":"claims_refused""#;
        let (records, told) = (
            text.matches(refused).count(),
            text.matches("suppressed").count(),
        );
        assert!((100..110).contains(&records), "{records} records");
        let counted = format!(
            r#""suppressed":{},"of":"claims_refused","last":"w1""#,
            1000 - records
        );
        assert!(text.contains(&counted) && told == 2, "{text}");
    }

    #[test]
    fn filters() {
        assert_eq!(
            parse("info,cpc::agent=debug").unwrap().to_string(),
            "cpc_agent=debug,info"
        );
        for (filter, directives) in [
            ("cpc::access=off", "cpc::access=off"),
            ("cpc", "cpc_,cpc::cli"),
            ("cpc=debug", "cpc_=debug,cpc::cli=debug"),
            ("cpc::server::dial=debug", "cpc_server::dial=debug"),
            ("cpc::tls=debug", "cpc_identity=debug"),
            ("cpc::join::desk", "cpc_identity::join::desk"),
            ("cpc_server=warn", "cpc_server=warn"),
            ("quinn=warn", "quinn=warn"),
        ] {
            assert_eq!(directive(filter), directives);
        }
        assert!(parse("cpc=loud").is_err());
        for filter in ["cpc::cli=warn,cpc=debug", "cpc=debug,cpc::cli=warn"] {
            let parsed = parse(filter).unwrap().to_string();
            let mut parsed: Vec<_> = parsed.split(',').collect();
            parsed.sort_unstable();
            assert_eq!(parsed, ["cpc::cli=warn", "cpc_=debug"]);
        }
    }
}
