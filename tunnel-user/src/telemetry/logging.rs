//! Tracing to standard error, with a filter that can be changed while the process runs.
//!
//! Invariant: an event is one line of visible characters. Texts of peers stand in it, and none of
//! them can begin another line or drive a terminal.

use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::Arc;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::config::{LogConfig, LogFormat};

/// Target of the access log, for filters: `cpc::access=off`.
pub const ACCESS: &str = "cpc::access";

/// Changes the filter of the running process. Lines that are still to be written are, when the last
/// handle is dropped.
#[derive(Clone, Debug)]
pub struct LogHandle {
    filter: reload::Handle<EnvFilter, Registry>,
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

/// Starts logging. Once a process.
///
/// # Errors
/// [`FilterError`] when the filter can't be read or something logs already.
pub fn init(config: &LogConfig) -> Result<LogHandle, FilterError> {
    let (filter, handle) = reload::Layer::new(parse(&config.filter)?);
    let registry = tracing_subscriber::registry().with(filter);
    // A thread of its own writes: a reader of the log that is stuck must not stop the tunnels. What
    // it has no room for is dropped.
    let (writer, guard) = NonBlockingBuilder::default().lossy(true).finish(OneLine);
    let lines = fmt::layer().with_writer(writer);
    let done = match config.format {
        // Colours are control characters too.
        LogFormat::Text => registry.with(lines.with_ansi(false)).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
    done.map_err(|e| FilterError {
        filter: config.filter.clone(),
        why: e.to_string(),
    })?;
    Ok(LogHandle {
        filter: handle,
        _writer: Arc::new(guard),
    })
}

/// Standard error, where each write is an event and the control characters in it are escaped:
/// tracing-subscriber does that for messages, not for the values of fields. JSON does by itself.
struct OneLine;

impl Write for OneLine {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        io::stderr().write_all(one_line(&String::from_utf8_lossy(event)).as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn one_line(event: &str) -> Cow<'_, str> {
    let text = event.strip_suffix('\n').unwrap_or(event);
    if !text.contains(char::is_control) {
        return Cow::Borrowed(event);
    }
    let mut line = String::with_capacity(event.len() + 16);
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line.push_str(&event[text.len()..]);
    Cow::Owned(line)
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

    #[test]
    fn an_event_is_one_line() {
        for (event, line) in [
            ("a \u{e4}\n", "a \u{e4}\n"),
            ("a\r\nb\n", "a\\r\\nb\n"),
            ("a\nb", "a\\nb"),
            ("\u{1b}[2J\u{9b}\n", "\\u{1b}[2J\\u{9b}\n"),
            ("", ""),
        ] {
            assert_eq!(one_line(event), line);
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
