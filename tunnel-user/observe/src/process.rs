//! Metrics of the process, under the names of Prometheus' client libraries (`process_`).
//!
//! Each scrape reads `/proc/self` (proc_pid_stat(5)) and omits unreadable values.

use std::fmt;
use std::fs;

use nix::sys::resource::{Resource, getrlimit};
use nix::time::{ClockId, clock_gettime};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use rustix::param::{clock_ticks_per_second, page_size};

const SELF: &str = "/proc/self";

/// Collector of the metrics of the process.
#[derive(Debug)]
struct ProcessMetrics {
    /// Start time, read once: a value that moves looks like a restart.
    started: Option<f64>,
}

/// Registers the collector; `registry` must have no prefix.
pub fn register(registry: &mut Registry) {
    let started = Stat::read().and_then(|stat| started(stat.started));
    registry.register_collector(Box::new(ProcessMetrics { started }));
}

impl Collector for ProcessMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut put = |name: &str, help: &str, value: Option<f64>, is_counter: bool| {
            let Some(value) = value else {
                return Ok(());
            };
            let (gauge, counter) = (ConstGauge::new(value), ConstCounter::new(value));
            let metric: &dyn EncodeMetric = if is_counter { &counter } else { &gauge };
            let descriptor = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
            metric.encode(descriptor)
        };
        let stat = Stat::read();
        put(
            "process_cpu_seconds",
            "CPU time of all threads, in user and system mode.",
            stat.map(|stat| stat.cpu),
            true,
        )?;
        put(
            "process_open_fds",
            "Open file descriptors.",
            open_files(),
            false,
        )?;
        put(
            "process_max_fds",
            "Maximum number of open file descriptors (RLIMIT_NOFILE).",
            limit(Resource::RLIMIT_NOFILE),
            false,
        )?;
        put(
            "process_virtual_memory_bytes",
            "Virtual memory.",
            stat.map(|stat| stat.virtual_memory),
            false,
        )?;
        put(
            "process_virtual_memory_max_bytes",
            "Maximum virtual memory (RLIMIT_AS).",
            limit(Resource::RLIMIT_AS),
            false,
        )?;
        put(
            "process_resident_memory_bytes",
            "Resident memory.",
            stat.map(|stat| stat.resident_memory),
            false,
        )?;
        put(
            "process_start_time_seconds",
            "Start time of the process, in seconds since 1970-01-01 UTC.",
            self.started,
            false,
        )
    }
}

/// Values of `/proc/self/stat`, in seconds and bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stat {
    cpu: f64,
    /// Start of the process, since boot.
    started: f64,
    virtual_memory: f64,
    resident_memory: f64,
}

impl Stat {
    fn read() -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("{SELF}/stat")).ok()?)
    }

    fn parse(line: &str) -> Option<Self> {
        // The program's name may contain anything; what follows its last parenthesis does not.
        let (_, rest) = line.rsplit_once(')')?;
        // Fields count from 1, and the first of these is the third.
        let fields: Vec<_> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let (tick, page) = (clock_ticks_per_second() as f64, page_size() as f64);
        Some(Self {
            cpu: (field(14)? + field(15)?) / tick,
            started: field(22)? / tick,
            virtual_memory: field(23)?,
            resident_memory: field(24)? * page,
        })
    }
}

/// Returns the time of day at `since_boot` seconds.
fn started(since_boot: f64) -> Option<f64> {
    let seconds = |clock: ClockId| {
        let time = clock_gettime(clock).ok()?;
        Some(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
    };
    Some(seconds(ClockId::CLOCK_REALTIME)? - seconds(ClockId::CLOCK_BOOTTIME)? + since_boot)
}

fn open_files() -> Option<f64> {
    let folder = format!("{SELF}/fd");
    // The size says it since Linux 6.2.
    let counted = fs::metadata(&folder).ok()?.len();
    if counted > 0 {
        return Some(counted as f64);
    }
    // Less the one that reads them.
    Some(fs::read_dir(folder).ok()?.count().saturating_sub(1) as f64)
}

fn limit(of: Resource) -> Option<f64> {
    getrlimit(of).ok().map(|(soft, _)| soft as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exposition::Format;

    #[test]
    fn a_programs_name_moves_no_field() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 150 50 13 14 15 16 17 18 1000 4096 2 21";
        let stat = Stat::parse(&format!("77 (a) (b c) {rest}")).unwrap();
        let tick = clock_ticks_per_second() as f64;
        let expected = Stat {
            cpu: 200.0 / tick,
            started: 1000.0 / tick,
            virtual_memory: 4096.0,
            resident_memory: 2.0 * page_size() as f64,
        };
        assert_eq!(stat, expected);
        assert_eq!(Stat::parse("77 (cut) S 1 2"), None);
    }

    #[test]
    fn this_process_is_there() {
        let mut registry = Registry::default();
        register(&mut registry);
        let page = Format::Text.page(&registry).unwrap();
        let value = |name: &str| {
            let mut lines = page.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value
                .unwrap_or_else(|| panic!("no {name} in {page}"))
                .parse::<f64>()
                .unwrap()
        };
        assert!(value("process_open_fds") >= 3.0);
        assert!(value("process_max_fds") >= value("process_open_fds"));
        assert!(value("process_resident_memory_bytes") > 100_000.0);
        assert!(value("process_virtual_memory_bytes") >= value("process_resident_memory_bytes"));
        assert!(value("process_virtual_memory_max_bytes") > 0.0);
        assert!(value("process_cpu_seconds_total") >= 0.0);
        let now = std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap()
            .as_secs_f64();
        assert!((now - 86_400.0..=now).contains(&value("process_start_time_seconds")));
    }
}
