//! A circuit breaker for destinations whose dials keep timing out: it refuses at once a dial that would
//! hold a client and a stream until its deadline, for nothing.
//!
//! After so many consecutive time-outs a destination is *open*: it is not dialled for a while, then by
//! one dial at a time, a probe. A probe that times out doubles the wait, up to a bound. Any dial that
//! the destination answers, even by a refusal, removes it.
//!
//! A table belongs to one shard, that of the links it dials over. Destinations that answer are not in
//! it, so that a healthy server never looks anything up. The table is bounded: at the bound the entry
//! that was used the longest ago makes room. No clock: time is an argument.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use cpc_config::server::BreakerSettings as Settings;

/// Maximum number of destinations in one table.
const MAX_ENTRIES: usize = 1024;

/// Time without a dial after which a destination is forgotten.
pub(super) const FORGET: Duration = Duration::from_secs(600);

/// Outcome of an admitted dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The destination, or its network, has answered.
    Answered,
    /// The destination did not answer in the whole time.
    TimedOut,
    /// The dial says nothing about the destination: the client left, the tunnel was lost, or no agent
    /// dialled.
    Unknown,
}

/// An admitted dial, to be settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// An ordinary dial.
    Ordinary,
    /// A probe of the destination, with its number: one from before the destination answered and opened
    /// again does not count.
    Probe(u64),
}

/// A refused dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// Number of consecutive time-outs.
    pub failures: u32,
    /// Time until the next dial is admitted; zero while a probe is under way.
    pub wait: Duration,
}

/// Change by the settling of a dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// No relevant change.
    None,
    /// The destination is refused from now on.
    Opened,
    /// The destination is dialled again.
    Closed,
}

/// Destinations of one shard that have timed out lately.
#[derive(Debug)]
pub(super) struct Breaker<K> {
    settings: Settings,
    entries: HashMap<K, Entry>,
    last_probe: u64,
}

#[derive(Debug)]
struct Entry {
    failures: u32,
    touched: Instant,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    wait: Duration,
    until: Instant,
    probe: Option<u64>,
}

impl Open {
    fn is_probed_by(&self, pass: Pass) -> bool {
        matches!(pass, Pass::Probe(id) if self.probe == Some(id))
    }
}

impl<K: Hash + Eq + Clone> Breaker<K> {
    /// Creates an empty table.
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            settings,
            entries: HashMap::new(),
            last_probe: 0,
        }
    }

    /// Whether every dial is admitted, without a look-up.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns the number of open destinations.
    pub(super) fn open(&self) -> usize {
        let open = |entry: &&Entry| entry.open.is_some();
        self.entries.values().filter(open).count()
    }

    /// Admits a dial, which must be settled, or refuses it.
    ///
    /// # Errors
    /// [`Refused`].
    pub(super) fn admit(&mut self, key: &K, now: Instant) -> Result<Pass, Refused> {
        let Some(entry) = self.entries.get_mut(key) else {
            return Ok(Pass::Ordinary);
        };
        entry.touched = now;
        let Some(open) = &mut entry.open else {
            return Ok(Pass::Ordinary);
        };
        if open.probe.is_some() || now < open.until {
            return Err(Refused {
                failures: entry.failures,
                wait: open.until.saturating_duration_since(now),
            });
        }
        self.last_probe += 1;
        open.probe = Some(self.last_probe);
        Ok(Pass::Probe(self.last_probe))
    }

    /// Notes the outcome of a dial. The next one may be admitted only then.
    pub(super) fn settle(&mut self, key: &K, pass: Pass, outcome: Outcome, now: Instant) -> Change {
        match outcome {
            Outcome::Answered => match self.entries.remove(key) {
                Some(Entry { open: Some(_), .. }) => Change::Closed,
                _ => Change::None,
            },
            Outcome::Unknown => {
                let open = self.entries.get_mut(key).and_then(|e| e.open.as_mut());
                if let Some(open) = open.filter(|open| open.is_probed_by(pass)) {
                    // The next dial is the probe.
                    open.probe = None;
                }
                Change::None
            }
            Outcome::TimedOut => self.timed_out(key, pass, now),
        }
    }

    fn timed_out(&mut self, key: &K, pass: Pass, now: Instant) -> Change {
        let Settings {
            failures,
            retry,
            max_retry,
        } = self.settings;
        if failures == 0 {
            return Change::None;
        }
        if !self.entries.contains_key(key) {
            self.make_room();
        }
        let entry = self.entries.entry(key.clone()).or_insert(Entry {
            failures: 0,
            touched: now,
            open: None,
        });
        entry.touched = now;
        entry.failures = entry.failures.saturating_add(1);
        match &mut entry.open {
            None if entry.failures >= failures => {
                entry.open = Some(Open {
                    wait: retry,
                    until: now + retry,
                    probe: None,
                });
                Change::Opened
            }
            Some(open) if open.is_probed_by(pass) => {
                open.wait = open.wait.saturating_mul(2).min(max_retry);
                open.until = now + open.wait;
                open.probe = None;
                Change::None
            }
            // One that was under way when it opened tells nothing new.
            None | Some(_) => Change::None,
        }
    }

    fn make_room(&mut self) {
        if self.entries.len() < MAX_ENTRIES {
            return;
        }
        let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.touched);
        if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
            self.entries.remove(&oldest);
        }
    }

    /// Removes destinations that were not dialled lately, unless a probe is under way.
    pub(super) fn expire(&mut self, now: Instant) {
        self.entries.retain(|_, entry| {
            let probing = entry.open.as_ref().is_some_and(|open| open.probe.is_some());
            probing || now.saturating_duration_since(entry.touched) < FORGET
        });
    }
}
