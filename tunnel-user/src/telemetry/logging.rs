//! Tracing to standard error, with a filter that can be changed while the process runs.
//!
//! Invariant: an event is one line of visible characters. Texts of peers stand in it, and none of
//! them can begin another line or drive a terminal.

use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::config::{LogConfig, LogFormat};

/// Target of the access log, for filters: `cpc::access=off`.
pub const ACCESS: &str = "cpc::access";

/// The writing thread rests for so long after it has written: what is logged meanwhile wakes nobody
/// and is written by one call. With a line a connection, waking it for each costs more than the line.
const REST: Duration = Duration::from_millis(5);

/// Lines that are written by one call, at most, in bytes.
const BATCH: usize = 64 << 10;

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
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .finish(Lines::new(io::stderr()));
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

/// A log, where each write is an event and the control characters in it are escaped:
/// tracing-subscriber does that for messages, not for the values of fields. JSON does by itself.
///
/// What has been written goes out when the writing thread has found nothing more, which is when it
/// flushes.
struct Lines<W> {
    batch: Vec<u8>,
    to: W,
}

impl<W: Write> Lines<W> {
    fn new(to: W) -> Self {
        Self {
            batch: Vec::new(),
            to,
        }
    }

    fn write_out(&mut self) -> io::Result<()> {
        let written = self.to.write_all(&self.batch);
        self.batch.clear();
        written
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = String::from_utf8_lossy(event);
        self.batch.extend_from_slice(one_line(&line).as_bytes());
        if self.batch.len() >= BATCH {
            self.write_out()?;
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write_out()?;
        self.to.flush()?;
        thread::sleep(REST);
        Ok(())
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
    fn lines_go_out_together() {
        let mut lines = Lines::new(Vec::new());
        lines.write_all(b"a\n").unwrap();
        lines.write_all(b"b\x07\n").unwrap();
        assert!(lines.to.is_empty());
        lines.flush().unwrap();
        assert_eq!(lines.to, b"a\nb\\u{7}\n");
        let long = [b'x'; BATCH];
        lines.write_all(&long).unwrap();
        assert!(lines.to.ends_with(&long) && lines.batch.is_empty());
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
