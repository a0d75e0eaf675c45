//! Bounds on the lines that peers can cause, in the log and in the audit.
//!
//! The kind of a line is its place in the code. The source of a line is the peer that its fields name
//! (`fields`): an agent or a server by its identity, or the network of an address. Each source has a
//! bucket for each kind, and all sources of a kind share another one. So neither one peer nor many fill
//! a disk, and one peer hides no line about another. Omitted lines are counted and reported in a line
//! of their own.
//!
//! Every line passes [`Throttle`], which is a filter, so that no place in the code can forget it.
//! Memory is fixed: two keyed hashes map each bucket to two of `BUCKETS` counters, and the lower one
//! counts.

mod fields;

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Filter};

use self::fields::{Fields, Source};
use super::targets::ACCESS;

/// Number of counters of all buckets, 8 bytes each.
const BUCKETS: usize = 16_384;

/// Number of kinds of lines with their own count of suppressed lines; the program has fewer.
const MAX_KINDS: usize = 1024;

/// Rate of the lines of one bucket.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Maximum number of lines at once, after a long silence.
    pub burst: u32,
    /// Interval after which the bucket gains one line.
    pub period: Duration,
}

/// Rates of a log.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Lines of one kind about one source.
    pub source: Rate,
    /// Lines of one kind about all proven identities.
    pub identities: Rate,
    /// Lines of one kind about all addresses.
    pub networks: Rate,
}

const fn rate(burst: u32, period: Duration) -> Rate {
    Rate { burst, period }
}

/// Rates of the log: a source writes 12 lines of a kind per minute.
pub const LOG: Rates = Rates {
    source: rate(100, Duration::from_secs(5)),
    identities: rate(1000, Duration::from_millis(500)),
    networks: rate(500, Duration::from_secs(1)),
};

/// Rates of the audit. Its records stay for weeks, and whole fleets may connect at once.
pub const AUDIT: Rates = Rates {
    source: rate(100, Duration::from_secs(60)),
    identities: rate(20_000, Duration::from_secs(2)),
    networks: rate(1000, Duration::from_secs(2)),
};

/// A filter that admits a bounded number of lines. Clones share the bounds.
#[derive(Clone, Debug)]
pub struct Throttle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    rates: Rates,
    started: Instant,
    hashes: [RandomState; 2],
    /// Time at which each bucket will be full, in nanoseconds since the beginning: the "theoretical
    /// arrival time" of the generic cell rate algorithm (ITU-T I.371).
    buckets: Box<[AtomicU64]>,
    suppressed: Mutex<HashMap<u64, Suppressed>>,
    total: AtomicU64,
}

/// Suppressed lines of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suppressed {
    /// Text of the lines.
    pub kind: String,
    /// Number of lines.
    pub lines: u64,
    /// Source of the last line.
    pub last: String,
}

impl Throttle {
    /// Creates a throttle with full buckets.
    pub fn new(rates: Rates, now: Instant) -> Self {
        Self(Arc::new(Shared {
            rates,
            started: now,
            hashes: [RandomState::new(), RandomState::new()],
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            suppressed: Mutex::default(),
            total: AtomicU64::new(0),
        }))
    }

    /// Whether a line of `kind` about `source` is admitted. `name` describes the kind in the report
    /// about omitted lines.
    fn admits(&self, kind: impl Hash, name: &str, source: &Source<'_>, now: Instant) -> bool {
        let shared = &self.0;
        let all = match source {
            Source::Own | Source::Identity(_) => shared.rates.identities,
            Source::Network(_) => shared.rates.networks,
        };
        let now = shared.since(now);
        let of_source = shared.slots(&(&kind, source));
        let of_all = shared.slots(&kind);
        let spent = shared
            .spend(of_source, shared.rates.source, now)
            .zip(shared.spend(of_all, all, now));
        if let Some((by_source, by_all)) = spent {
            shared.fill(of_source, by_source);
            shared.fill(of_all, by_all);
            return true;
        }
        shared.suppress(shared.hashes[0].hash_one(&kind), name, source);
        false
    }

    /// Returns the suppressed lines since the last call.
    pub fn take_suppressed(&self) -> Vec<Suppressed> {
        let mut suppressed = self.0.lock();
        suppressed.drain().map(|(_, lines)| lines).collect()
    }

    /// Returns the number of all suppressed lines.
    pub fn total(&self) -> u64 {
        self.0.total.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn slots(&self, key: &impl Hash) -> [usize; 2] {
        // Below BUCKETS.
        let slot = |hash: &RandomState| (hash.hash_one(key) % BUCKETS as u64) as usize;
        [slot(&self.hashes[0]), slot(&self.hashes[1])]
    }

    /// Returns the time at which the bucket will be full after one more line; `None` if it is empty.
    fn spend(&self, slots: [usize; 2], rate: Rate, now: u64) -> Option<u64> {
        let [a, b] = slots.map(|slot| self.buckets[slot].load(Ordering::Relaxed));
        let period = nanoseconds(rate.period);
        let full_at = a.min(b).max(now).saturating_add(period);
        let is_left = full_at - now <= period.saturating_mul(rate.burst.into());
        is_left.then_some(full_at)
    }

    fn fill(&self, slots: [usize; 2], full_at: u64) {
        for slot in slots {
            self.buckets[slot].fetch_max(full_at, Ordering::Relaxed);
        }
    }

    fn suppress(&self, kind: u64, name: &str, source: &Source<'_>) {
        self.total.fetch_add(1, Ordering::Relaxed);
        let mut suppressed = self.lock();
        if suppressed.len() >= MAX_KINDS && !suppressed.contains_key(&kind) {
            return;
        }
        let lines = suppressed.entry(kind).or_insert_with(|| Suppressed {
            kind: name.to_owned(),
            lines: 0,
            last: String::new(),
        });
        lines.lines += 1;
        lines.last.clear();
        source.write_to(&mut lines.last);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Suppressed>> {
        self.suppressed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn since(&self, now: Instant) -> u64 {
        nanoseconds(now.saturating_duration_since(self.started))
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    // After 584 years.
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 2)
}

impl<S: Subscriber> Filter<S> for Throttle {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn callsite_enabled(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::always()
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        // A filter for more than INFO asks for all lines. A connection has its one record.
        if *metadata.level() > Level::INFO || metadata.target() == ACCESS {
            return true;
        }
        Fields::with(event, |fields| {
            let kind = (metadata.callsite(), fields.listener());
            fields.is_exempt() || self.admits(kind, fields.name(), &fields.source(), Instant::now())
        })
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        // Without a hint it would hide those of the filters beside it.
        Some(LevelFilter::TRACE)
    }
}

#[cfg(test)]
mod tests;
