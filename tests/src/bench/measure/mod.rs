//! A measure: the work over a path, and its figures.

mod bulk;
mod dial;
mod idle;
mod neighbours;
mod requests;
mod scale;
mod sessions;

use std::time::Duration;

use anyhow::Result;
use nix::unistd::Pid;

use super::path::{Path, PathKind, Running, SIDES};
use super::scene::Wire;
use super::usage;
use crate::side::Side;

pub use bulk::Direction;
pub use neighbours::Neighbour;
pub use sessions::Event;

/// Work of a measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// As many bytes as possible.
    Bulk(Direction, usize),
    /// From connect(2) to the first byte of the answer, one connection after another.
    Dial,
    /// Requests of 100 bytes and answers, on so many connections, each waiting for its answer.
    Requests(usize),
    /// As many connections as possible that are opened, used for a byte and closed, by a number of
    /// dialers.
    Rate(usize),
    /// Memory of so many connections that do nothing.
    Idle(usize),
    /// A request loop beside another load.
    Beside(Neighbour),
    /// Cost of a number of further agents for the server while they are idle.
    Agents(usize),
    /// Cost of a number of further routes.
    Routes(usize),
    /// So many live connections to which something happens.
    Sessions(usize, Event),
    /// Idle connections, whose process is replaced.
    IdleSessions(usize, Side),
}

/// Amount of work.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Approximate duration of one measurement.
    pub time: Duration,
    /// The most that bulk may move at once, in bytes.
    pub bytes: u64,
    /// Time for which thousands of connections are idle before the measurement.
    pub settle: Duration,
}

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Name, the same for all paths.
    pub name: &'static str,
    /// Unit of the value.
    pub unit: &'static str,
    /// Value of the figure.
    pub value: f64,
}

impl Figure {
    fn new(name: &'static str, unit: &'static str, value: f64) -> Self {
        Self { name, unit, value }
    }

    fn millis(name: &'static str, time: Duration) -> Self {
        Self::new(name, "ms", time.as_secs_f64() * 1e3)
    }

    fn micros(name: &'static str, time: Duration) -> Self {
        Self::new(name, "µs", time.as_secs_f64() * 1e6)
    }
}

impl Measure {
    /// Returns all measures, in the order of a report.
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for direction in [Direction::Down, Direction::Up] {
            all.extend([1, 8, 64].map(|streams| Self::Bulk(direction, streams)));
        }
        all.push(Self::Dial);
        all.extend([1, 16, 64].map(Self::Requests));
        all.push(Self::Rate(8));
        all.extend([1000, 10_000].map(Self::Idle));
        all.extend(Neighbour::ALL.map(Self::Beside));
        all.extend([1, 100, 2000].map(Self::Agents));
        all.extend([10, 1000, 10_000, 30_000].map(Self::Routes));
        all.extend(Event::ALL.map(|event| Self::Sessions(1000, event)));
        all.push(Self::IdleSessions(10_000, Side::Server));
        all.push(Self::IdleSessions(5000, Side::Agent));
        all
    }

    /// Returns the shortest list that characterises a path.
    pub fn few() -> Vec<Self> {
        vec![
            Self::Bulk(Direction::Down, 1),
            Self::Bulk(Direction::Up, 1),
            Self::Dial,
            Self::Requests(1),
            Self::Requests(64),
            Self::Rate(8),
            Self::Idle(1000),
        ]
    }

    /// Returns a title for reports, which is also the name for selection.
    pub fn name(self) -> String {
        match self {
            Self::Bulk(Direction::Down, 1) => "bulk down, 1 stream".to_owned(),
            Self::Bulk(Direction::Up, 1) => "bulk up, 1 stream".to_owned(),
            Self::Bulk(Direction::Down, streams) => format!("bulk down, {streams} streams"),
            Self::Bulk(Direction::Up, streams) => format!("bulk up, {streams} streams"),
            Self::Dial => "dial to first byte".to_owned(),
            Self::Requests(1) => "100 B request and response, 1 connection".to_owned(),
            Self::Requests(count) => format!("100 B request and response, {count} connections"),
            Self::Rate(dialers) => format!("new connections, {dialers} dialers"),
            Self::Idle(count) => format!("{count} idle connections"),
            Self::Beside(neighbour) => format!("requests beside {}", neighbour.name()),
            Self::Agents(1) => "1 agent more".to_owned(),
            Self::Agents(count) => format!("{count} agents more"),
            Self::Routes(count) => format!("{count} routes more"),
            Self::Sessions(count, event) => format!("{count} sessions, {}", event.name()),
            Self::IdleSessions(count, side) => {
                format!("{count} idle sessions, {}", Event::Replaced(side).name())
            }
        }
    }

    /// Whether the measure needs new programs: memory that was used once and is free again would
    /// hide the memory of connections.
    pub fn needs_fresh_path(self) -> bool {
        matches!(self, Self::Idle(_) | Self::Agents(_) | Self::Routes(_))
    }

    /// Returns why the measure makes no sense over this path, if so.
    pub fn pointless(self, path: &Path) -> Option<&'static str> {
        let is_laboratory = path.way == PathKind::Laboratory;
        if is_laboratory != matches!(self, Self::Sessions(..) | Self::IdleSessions(..)) {
            return Some("no program of it is replaced, or nothing else is measured over it");
        }
        let bulk = matches!(self, Self::Bulk(..));
        if matches!(path.wire, Wire::JUMBO | Wire::NO_USO) && !bulk {
            return Some("the wire matters to bulk alone");
        }
        if matches!(self, Self::Agents(_) | Self::Routes(_)) && path.name != "connect" {
            return Some("no program of it has agents, or another path shows the same");
        }
        let idle = matches!(self, Self::Idle(_));
        if idle && matches!(path.way, PathKind::Direct | PathKind::OpenVpn) {
            return Some("no program holds the connections");
        }
        None
    }

    /// Does it once.
    ///
    /// # Errors
    ///
    /// A connection that fails or stalls, which for some paths is the result.
    pub fn take(self, path: &mut Running, effort: &Effort) -> Result<Vec<Figure>> {
        match self {
            Self::Sessions(count, event) => sessions::take(path, event, (count, false), effort),
            Self::IdleSessions(count, side) => {
                sessions::take(path, Event::Replaced(side), (count, true), effort)
            }
            Self::Bulk(direction, streams) => {
                path.inside(|path| bulk::take(path, direction, streams, effort))
            }
            Self::Dial => path.inside(|path| dial::first_byte(path, effort)),
            Self::Requests(connections) => {
                path.inside(|path| requests::take(path, connections, effort))
            }
            Self::Rate(dialers) => path.inside(|path| dial::rate(path, dialers, effort)),
            Self::Idle(connections) => path.inside(|path| idle::take(path, connections, effort)),
            Self::Beside(neighbour) => {
                path.inside(|path| neighbours::take(path, neighbour, effort))
            }
            Self::Agents(count) => path.inside(|path| scale::take(path, count, 0, effort)),
            Self::Routes(count) => path.inside(|path| scale::take(path, 0, count, effort)),
        }
    }
}

/// The processor time of both sides.
struct Meter<'a> {
    path: &'a Running,
    before: [Duration; 2],
}

impl<'a> Meter<'a> {
    fn start(path: &'a Running) -> Result<Self> {
        let before = Self::read(path)?;
        Ok(Self { path, before })
    }

    fn read(path: &Running) -> Result<[Duration; 2]> {
        let of = |side| usage::processor_time(&path.processes(side));
        Ok([of(0)?, of(1)?])
    }

    /// Returns seconds since the start, for each side; nothing for a path without programs.
    fn stop(self) -> Result<Option<[f64; 2]>> {
        let after = Self::read(self.path)?;
        let any = !self.path.processes(0).is_empty();
        let seconds = |side: usize| (after[side] - self.before[side]).as_secs_f64();
        Ok(any.then(|| [seconds(0), seconds(1)]))
    }
}

/// Returns the memory of each side, in bytes.
fn memory(path: &Running) -> Result<[u64; 2]> {
    let of = |side| usage::memory(&path.processes(side) as &[Pid]);
    debug_assert_eq!(SIDES.len(), 2);
    Ok([of(0)?, of(1)?])
}

/// Returns the value below which `part` of the sorted `times` lie.
fn percentile(times: &[Duration], part: f64) -> Duration {
    let last = times.len().saturating_sub(1);
    let index = (times.len() as f64 * part) as usize;
    times.get(index.min(last)).copied().unwrap_or_default()
}

/// Returns the median and the slow end of `times`.
fn latency(mut times: Vec<Duration>) -> Vec<Figure> {
    times.sort_unstable();
    vec![
        Figure::micros("p50", percentile(&times, 0.5)),
        Figure::micros("p99", percentile(&times, 0.99)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_members() {
        let times: Vec<_> = (1..=100).map(Duration::from_micros).collect();
        assert_eq!(percentile(&times, 0.5), Duration::from_micros(51));
        assert_eq!(percentile(&times, 0.99), Duration::from_micros(100));
        assert_eq!(percentile(&times[..1], 0.99), Duration::from_micros(1));
        assert_eq!(percentile(&[], 0.5), Duration::ZERO);
    }

    #[test]
    fn names_tell_measures_apart() {
        let mut names: Vec<_> = Measure::all().into_iter().map(Measure::name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
