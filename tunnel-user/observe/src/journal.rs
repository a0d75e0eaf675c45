//! Priorities of log lines under systemd: prefixes such as `<3>` (sd-daemon(3)). The journal removes
//! them, so that `journalctl -p err` and alerts by priority work.

use std::env;
use std::fmt;

use nix::sys::stat::fstat;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Whether standard error is the journal: `JOURNAL_STREAM` names its device and inode number
/// (systemd.exec(5)), and a process whose output was redirected inherits the variable too.
pub(super) fn is_stderr() -> bool {
    let named = env::var("JOURNAL_STREAM").ok();
    let stderr = fstat(std::io::stderr()).ok();
    named
        .zip(stderr)
        .is_some_and(|(named, stderr)| named == format!("{}:{}", stderr.st_dev, stderr.st_ino))
}

/// A formatter that writes the priority ahead of the event that `format` writes.
pub(super) struct Prioritised<F> {
    format: F,
    is_on: bool,
}

impl<F> Prioritised<F> {
    /// Creates a formatter that adds priorities only if `is_on`.
    pub(super) fn new(format: F, is_on: bool) -> Self {
        Self { format, is_on }
    }
}

impl<S, N, F> FormatEvent<S, N> for Prioritised<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if self.is_on {
            write!(writer, "<{}>", priority(*event.metadata().level()))?;
        }
        self.format.format_event(context, writer, event)
    }
}

/// Returns the number of syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::format::{Format, JsonFields};
    use tracing_subscriber::prelude::*;

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Log {
        fn lines(&self) -> Vec<String> {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            text.lines().map(str::to_owned).collect()
        }
    }

    fn log_all() {
        tracing::error!("a");
        tracing::warn!("b");
        tracing::info!("c");
        tracing::debug!("d");
    }

    #[test]
    fn each_line_begins_with_its_priority() {
        let log = Log::default();
        let writer = log.clone();
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .map_event_format(|format| Prioritised::new(format, true));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), log_all);
        let heads: Vec<_> = log
            .lines()
            .iter()
            .map(|line| line[..3].to_owned())
            .collect();
        assert_eq!(heads, ["<3>", "<4>", "<6>", "<7>"]);
    }

    #[test]
    fn json_stays_json_behind_it() {
        for (is_on, head) in [(true, "<3>{"), (false, "{")] {
            let log = Log::default();
            let writer = log.clone();
            let lines = tracing_subscriber::fmt::layer()
                .with_writer(move || writer.clone())
                .fmt_fields(JsonFields::new())
                .event_format(Prioritised::new(Format::default().json(), is_on));
            tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), log_all);
            let line = log.lines().remove(0);
            let json = line.strip_prefix(&head[..head.len() - 1]).unwrap();
            assert!(line.starts_with(head) && json.ends_with('}'), "{line}");
        }
    }
}
