//! The run: every measure over every path, in turns, and the results.
//!
//! Paths alternate within a round and rounds follow each other (A B A B), so that all of them meet
//! the same disturbances.

use std::collections::BTreeMap;
use std::io;

use anyhow::Result;
use serde::Serialize;

use super::load::PATIENCE;
use super::measure::{Effort, Figure, Measure};
use super::path::{Path, Programs, Running};
use super::scene::{Stage, Wire};

/// Paths and measures of a run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The programs.
    pub programs: Programs,
    /// The ways.
    pub paths: Vec<Path>,
    /// Measures over each path.
    pub measures: Vec<Measure>,
    /// Number of rounds.
    pub rounds: usize,
    /// Amount of work for each.
    pub effort: Effort,
}

/// Current work, for people.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Current measure.
    pub measure: &'a str,
    /// Over which path.
    pub path: &'a str,
    /// Number of finished measurements.
    pub done: usize,
    /// Number of all measurements.
    pub of: usize,
}

/// The values of one figure, one a round.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Measure of the row.
    pub measure: String,
    /// Over which path.
    pub path: String,
    /// Name of the figure.
    pub figure: String,
    /// Unit of the figure.
    pub unit: String,
    /// The middle of the values.
    pub median: f64,
    /// The least of them.
    pub min: f64,
    /// The most.
    pub max: f64,
    /// All of them, in the order of the rounds.
    pub values: Vec<f64>,
}

/// A skipped measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Skipped {
    /// Over which path.
    pub path: String,
    /// Measure; all of them when missing.
    pub measure: Option<String>,
    /// Cause.
    pub why: String,
}

/// Results of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Results {
    /// All figures.
    pub rows: Vec<Row>,
    /// Skipped measurements.
    pub skipped: Vec<Skipped>,
}

impl Results {
    /// Returns the row of this figure, if it was measured.
    pub fn row(&self, measure: &str, path: &str, figure: &str) -> Option<&Row> {
        self.rows
            .iter()
            .find(|row| row.measure == measure && row.path == path && row.figure == figure)
    }

    fn add(&mut self, measure: &str, path: &str, figure: Figure) {
        let found = self
            .rows
            .iter_mut()
            .find(|row| row.measure == measure && row.path == path && row.figure == figure.name);
        match found {
            Some(row) => row.values.push(figure.value),
            None => self.rows.push(Row {
                measure: measure.to_owned(),
                path: path.to_owned(),
                figure: figure.name.to_owned(),
                unit: figure.unit.to_owned(),
                median: 0.0,
                min: 0.0,
                max: 0.0,
                values: vec![figure.value],
            }),
        }
    }

    fn skip(&mut self, path: &str, measure: Option<&str>, why: impl Into<String>) {
        let skipped = Skipped {
            path: path.to_owned(),
            measure: measure.map(str::to_owned),
            why: why.into(),
        };
        if !self.skipped.contains(&skipped) {
            self.skipped.push(skipped);
        }
    }

    fn summarise(&mut self) {
        for row in &mut self.rows {
            let mut sorted = row.values.clone();
            sorted.sort_by(f64::total_cmp);
            row.median = median(&sorted);
            row.min = sorted.first().copied().unwrap_or_default();
            row.max = sorted.last().copied().unwrap_or_default();
        }
    }
}

/// Returns the median of sorted values, between the two in the middle where their number is even.
pub fn median(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    match (sorted.len() % 2, sorted.get(half)) {
        (_, None) => 0.0,
        (0, Some(upper)) => f64::midpoint(sorted[half - 1], *upper),
        (_, Some(middle)) => *middle,
    }
}

/// A path of a run, with its number and its programs.
struct Runner {
    path: Path,
    number: u8,
    running: Option<Running>,
    starts: usize,
}

impl Runner {
    /// Returns the running path; starts it if it does not run, or must be `fresh`.
    fn up(&mut self, stage: &mut Stage, programs: &Programs, fresh: bool) -> Result<&mut Running> {
        if fresh {
            self.running = None;
        }
        let running = match self.running.take() {
            Some(running) => running,
            None => {
                self.starts += 1;
                self.path.start(stage, programs, self.number, self.starts)?
            }
        };
        Ok(self.running.insert(running))
    }
}

/// Carries out `plan`; `watch` is called before each measurement and may end the run.
///
/// # Errors
///
/// The stage can't be built, or what `watch` says. A path that fails is no error but a result.
pub fn run(plan: &Plan, mut watch: impl FnMut(Progress<'_>) -> Result<()>) -> Result<Results> {
    let mut results = Results::default();
    let mut chosen = Vec::new();
    for path in &plan.paths {
        match path.missing(&plan.programs) {
            Some(why) => results.skip(&path.name, None, why),
            None => chosen.push(Runner {
                path: path.clone(),
                number: u8::try_from(chosen.len() + 1)?,
                running: None,
                starts: 0,
            }),
        }
    }
    let mut wires: Vec<Wire> = Vec::new();
    for runner in &chosen {
        if !wires.contains(&runner.path.wire) {
            wires.push(runner.path.wire);
        }
    }
    let mut stage = Stage::create(&wires, &plan.programs.target)?;
    // After the stage, so that it is dropped before it.
    let mut runners = chosen;
    runners.retain_mut(
        |runner| match runner.up(&mut stage, &plan.programs, false) {
            Ok(_) => true,
            Err(error) => {
                results.skip(&runner.path.name, None, reason(&error));
                false
            }
        },
    );

    let (mut done, of) = (0, plan.measures.len() * plan.rounds * runners.len());
    let mut failures: BTreeMap<(String, String), usize> = BTreeMap::new();
    for measure in &plan.measures {
        let name = measure.name();
        for _ in 0..plan.rounds {
            for runner in &mut runners {
                let path = runner.path.name.clone();
                watch(Progress {
                    measure: &name,
                    path: &path,
                    done,
                    of,
                })?;
                done += 1;
                if let Some(why) = measure.pointless(&runner.path) {
                    results.skip(&path, Some(&name), why);
                    continue;
                }
                let failed = failures.entry((path.clone(), name.clone())).or_default();
                if *failed > 0 {
                    // It takes a time-out each; once is enough.
                    continue;
                }
                let taken = runner
                    .up(&mut stage, &plan.programs, measure.needs_fresh_path())
                    .and_then(|running| measure.take(running, &plan.effort));
                match taken {
                    Ok(figures) => {
                        for figure in figures {
                            results.add(&name, &path, figure);
                        }
                    }
                    Err(error) => {
                        *failed += 1;
                        results.skip(&path, Some(&name), format!("failed: {}", reason(&error)));
                        // What a failure leaves behind is not the next measurement's.
                        runner.running = None;
                    }
                }
            }
        }
    }
    drop(runners);
    results.summarise();
    Ok(results)
}

/// Returns an error on one line, without the logs that may follow.
fn reason(error: &anyhow::Error) -> String {
    let stalled = |cause: &(dyn std::error::Error + 'static)| {
        let io = cause.downcast_ref::<io::Error>();
        io.is_some_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    };
    if error.chain().any(stalled) {
        return format!("stalled: nothing moved for {PATIENCE:?} ({error})");
    }
    let text = format!("{error:#}");
    let lines: Vec<_> = text.lines().map(str::trim).take(3).collect();
    lines.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_values() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[1.0, 2.0]), 1.5);
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
    }

    #[test]
    fn rows_gather_rounds() {
        let mut results = Results::default();
        for value in [3.0, 1.0, 2.0] {
            let figure = Figure {
                name: "speed",
                unit: "Gbit/s",
                value,
            };
            results.add("bulk", "direct", figure);
        }
        results.skip("openvpn", None, "not installed");
        results.skip("openvpn", None, "not installed");
        results.summarise();
        let row = results.row("bulk", "direct", "speed").unwrap();
        assert_eq!((row.median, row.min, row.max), (2.0, 1.0, 3.0));
        assert_eq!(row.values, [3.0, 1.0, 2.0]);
        assert_eq!(results.skipped.len(), 1);
        assert!(results.row("bulk", "direct", "CPU both").is_none());
    }
}
