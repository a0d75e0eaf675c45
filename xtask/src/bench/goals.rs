//! The comparisons by which the datapath is judged.
//!
//! Each compares one figure of the connector with the same figure of another path of the same run.
//! There are no thresholds: machines differ.

use serde::Serialize;
use tunnel_tests::bench::run::{Results, Row};

/// Form of a comparison.
#[derive(Clone, Copy)]
enum By {
    /// Divided by that of the best of these.
    Ratio(&'static [&'static str]),
    /// Less that of the best of these.
    Difference(&'static [&'static str]),
    /// The figure as it is.
    Itself,
}

struct Goal {
    /// Name of the comparison, as a row of the table.
    title: &'static str,
    measure: &'static str,
    figure: &'static str,
    by: By,
    /// Whether more is better.
    more: bool,
    /// Suffix of the names of all paths concerned: the wire, where it is not the usual one.
    wire: &'static str,
}

const QUINN: By = By::Ratio(&["quinn copy", "quinn chunks"]);
const DIRECT: &[&str] = &["direct"];
const KONNECTIVITY: By = By::Ratio(&["konnectivity"]);
const DOWN: &str = "bulk down, 1 stream";
const UP: &str = "bulk up, 1 stream";
const BOTH: &str = "CPU both";

const fn goal(title: &'static str, measure: &'static str, figure: &'static str, by: By) -> Goal {
    Goal {
        title,
        measure,
        figure,
        by,
        more: false,
        wire: "",
    }
}

const fn more(goal: Goal) -> Goal {
    Goal { more: true, ..goal }
}

const fn jumbo(goal: Goal) -> Goal {
    Goal {
        wire: ", mtu 9000",
        ..goal
    }
}

const GOALS: &[Goal] = &[
    goal("CPU/GB down, over stock quinn", DOWN, BOTH, QUINN),
    goal("CPU/GB up, over stock quinn", UP, BOTH, QUINN),
    jumbo(goal("the same down, large packets", DOWN, BOTH, QUINN)),
    jumbo(goal("the same up, large packets", UP, BOTH, QUINN)),
    more(goal("speed down, over stock quinn", DOWN, "speed", QUINN)),
    more(goal("speed up, over stock quinn", UP, "speed", QUINN)),
    more(goal(
        "speed down, over Konnectivity",
        DOWN,
        "speed",
        KONNECTIVITY,
    )),
    more(goal(
        "speed up, over Konnectivity",
        UP,
        "speed",
        KONNECTIVITY,
    )),
    goal(
        "CPU of 64 busy small connections, over stock quinn",
        "100 B request and response, 64 connections",
        BOTH,
        QUINN,
    ),
    goal(
        "dial to first byte, less direct's",
        "dial to first byte",
        "p50",
        By::Difference(DIRECT),
    ),
    goal(
        "100 B request and response, less direct's",
        "100 B request and response, 1 connection",
        "p50",
        By::Difference(DIRECT),
    ),
    goal(
        "an idle connection's memory, server",
        "1000 idle connections",
        "server",
        By::Itself,
    ),
    goal(
        "an idle connection's memory, agent",
        "1000 idle connections",
        "agent",
        By::Itself,
    ),
    more(goal(
        "new connections a second, over direct",
        "new connections, 8 dialers",
        "rate",
        By::Ratio(DIRECT),
    )),
    goal(
        "p99 beside 8 bulk streams, over direct's beside its own",
        "requests beside 8 bulk streams",
        "p99",
        By::Ratio(DIRECT),
    ),
];

/// Returns the end of a path's name that names its wire; empty for the usual one.
fn wire(path: &str) -> &str {
    path.find(", mtu").map_or("", |at| &path[at..])
}

/// Result of one comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Outcome {
    /// Name of the comparison.
    pub(super) title: &'static str,
    /// Path of the connector.
    pub(super) path: String,
    /// Value of the comparison.
    pub(super) value: f64,
    /// Unit of the value; empty for a ratio.
    pub(super) unit: String,
    /// Whether more is better.
    pub(super) more_is_better: bool,
}

/// Returns every comparison for which the run has both figures.
pub(super) fn judge(results: &Results) -> Vec<Outcome> {
    GOALS.iter().flat_map(|goal| goal.judge(results)).collect()
}

impl Goal {
    fn judge(&self, results: &Results) -> Vec<Outcome> {
        let is_ours = |row: &&Row| {
            let ours = row.path.starts_with("redirect") || row.path.starts_with("connect");
            ours && wire(&row.path) == self.wire
                && row.measure == self.measure
                && row.figure == self.figure
        };
        let compared = |row: &Row| {
            let (value, unit) = match self.by {
                By::Ratio(others) => (row.median / self.best(results, others)?, String::new()),
                By::Difference(others) => {
                    (row.median - self.best(results, others)?, row.unit.clone())
                }
                By::Itself => (row.median, row.unit.clone()),
            };
            Some(Outcome {
                title: self.title,
                path: row.path.clone(),
                value,
                unit,
                more_is_better: self.more,
            })
        };
        results
            .rows
            .iter()
            .filter(is_ours)
            .filter_map(compared)
            .collect()
    }

    /// Returns the best measured figure among the other paths.
    fn best(&self, results: &Results, others: &[&str]) -> Option<f64> {
        let of = |path: &&str| {
            let path = format!("{path}{}", self.wire);
            Some(results.row(self.measure, &path, self.figure)?.median)
        };
        let medians = others.iter().filter_map(of);
        match self.more {
            true => medians.max_by(f64::total_cmp),
            false => medians.min_by(f64::total_cmp),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(measure: &str, path: &str, figure: &str, median: f64) -> Row {
        Row {
            measure: measure.to_owned(),
            path: path.to_owned(),
            figure: figure.to_owned(),
            unit: "µs".to_owned(),
            median,
            min: median,
            max: median,
            values: vec![median],
        }
    }

    fn results(rows: Vec<Row>) -> Results {
        Results {
            rows,
            ..Results::default()
        }
    }

    #[test]
    fn the_better_yardstick_counts() {
        let results = results(vec![
            row(DOWN, "quinn copy", BOTH, 4.0),
            row(DOWN, "quinn chunks", BOTH, 3.0),
            row(DOWN, "redirect", BOTH, 1.5),
            row(DOWN, "quinn copy", "speed", 4.0),
            row(DOWN, "quinn chunks", "speed", 3.0),
            row(DOWN, "redirect", "speed", 8.0),
        ]);
        let values: Vec<_> = judge(&results).iter().map(|it| it.value).collect();
        assert_eq!(values, [0.5, 2.0]);
    }

    #[test]
    fn wires_are_not_mixed() {
        let results = results(vec![
            row(DOWN, "quinn chunks", BOTH, 4.0),
            row(DOWN, "quinn chunks, mtu 9000", BOTH, 2.0),
            row(DOWN, "redirect, mtu 9000", BOTH, 1.0),
            row(DOWN, "redirect, mtu 1500, no USO", BOTH, 9.0),
        ]);
        let judged = judge(&results);
        assert_eq!(judged.len(), 1, "{judged:?}");
        assert_eq!(
            (judged[0].value, judged[0].path.as_str()),
            (0.5, "redirect, mtu 9000")
        );
    }

    #[test]
    fn differences_have_a_unit() {
        let dial = "dial to first byte";
        let results = results(vec![
            row(dial, "direct", "p50", 100.0),
            row(dial, "connect", "p50", 400.0),
        ]);
        let judged = judge(&results);
        assert_eq!((judged[0].value, judged[0].unit.as_str()), (300.0, "µs"));
    }

    #[test]
    fn every_goal_names_a_measure() {
        let names: Vec<_> = tunnel_tests::bench::measure::Measure::all()
            .into_iter()
            .map(|measure| measure.name())
            .collect();
        for goal in GOALS {
            assert!(
                names.iter().any(|name| name == goal.measure),
                "{}",
                goal.measure
            );
        }
    }
}
