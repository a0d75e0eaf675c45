//! Tracing to standard error, with a filter that can be changed while the process runs.
//!
//! Invariant: an event is one line of visible characters. Texts of peers stand in it, and none of
//! them can begin another line or drive a terminal.

use std::sync::Arc;
use std::{io, iter};

use tracing::Subscriber;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{FilterExt, LevelFilter, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use super::audit::{AUDIT, Audit, AuditError};
use super::lines::Lines;
use crate::config::{AuditConfig, LogConfig, LogFormat};

/// Target of the access log, for filters: `cpc::access=off`.
pub const ACCESS: &str = "cpc::access";

/// Changes the filter of the running process. Lines that are still to be written are, when the last
/// handle is dropped.
#[derive(Clone, Debug)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
    audit: Option<Audit>,
    _writer: Arc<WorkerGuard>,
}

/// Text that is no filter, or a logger that is gone.
#[derive(Debug, thiserror::Error)]
#[error("{filter:?} is no log filter: {why}; `info` and `info,cpc=debug` are")]
pub struct FilterError {
    filter: String,
    why: String,
}

impl LogHandle {
    /// The audit, if one is kept.
    pub fn audit(&self) -> Option<&Audit> {
        self.audit.as_ref()
    }

    /// Puts another filter in force.
    ///
    /// # Errors
    /// [`FilterError`]; the old one stays.
    pub fn set(&self, filter: &str) -> Result<(), FilterError> {
        let parsed = parse(filter)?;
        self.filter.reload(parsed).map_err(|e| FilterError {
            filter: filter.into(),
            why: e.to_string(),
        })
    }
}

/// Why nothing is logged.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The audit.
    #[error(transparent)]
    Audit(#[from] AuditError),
}

/// Starts logging, and the audit. Once a process.
///
/// # Errors
/// [`LogError`] when the filter can't be read, something logs already, or the audit can't be kept.
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
    // A thread of its own writes: a reader of the log that is stuck must not stop the tunnels. What
    // it has no room for is dropped.
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .finish(Lines::new(io::stderr()));
    let lines = fmt::layer().with_writer(writer);
    let access = config.access;
    let is_logged = filter_fn(move |metadata| match metadata.target() {
        AUDIT => false,
        ACCESS => access,
        _ => true,
    });
    // Without a hint of its own it would hide the other's.
    let filter = filter.and(is_logged.with_max_level_hint(LevelFilter::TRACE));
    let lines = match config.format {
        // Colours are control characters too.
        LogFormat::Text => lines.with_ansi(false).with_filter(filter).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_filter(filter).boxed(),
    };
    let (audit, records) = match audit.is_on() {
        true => Some(Audit::start(audit)?).unzip(),
        false => (None, None),
    };
    // Not `.with(records)`: a layer that is `None` has no filter, so all that nobody logs would be
    // recorded for it, a span a packet.
    let layers: Vec<_> = iter::once(lines).chain(records).collect();
    let log = LogHandle {
        filter: handle,
        audit,
        _writer: Arc::new(guard),
    };
    Ok((tracing_subscriber::registry().with(layers), log))
}

/// `cpc` stands for this program's own modules, whose crate has another name.
fn parse(filter: &str) -> Result<EnvFilter, FilterError> {
    let own = |directive: &str| match directive.strip_prefix("cpc") {
        Some(rest) if rest.starts_with("::access") => directive.to_owned(),
        Some(rest) if rest.is_empty() || rest.starts_with(['=', ':']) => {
            format!("tunnel_user{rest}")
        }
        _ => directive.to_owned(),
    };
    let translated: Vec<_> = filter.split(',').map(|d| own(d.trim())).collect();
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

    /// There is a span for each packet and each frame, which must cost nothing unless it is asked for.
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
    fn filters() {
        assert_eq!(
            parse("info,cpc::agent=debug").unwrap().to_string(),
            "tunnel_user::agent=debug,info"
        );
        assert_eq!(
            parse("cpc::access=off").unwrap().to_string(),
            "cpc::access=off"
        );
        assert!(parse("cpc=loud").is_err());
    }
}
