//! A report as tables in the terminal.

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use tunnel_tests::bench::run::{Results, Row};

use super::Report;

/// Prints it.
pub(super) fn print(report: &Report) {
    println!("{}", report.machine.sentence());
    println!(
        "{} rounds of about {} s each, in turns; the middle of the rounds (least-most).",
        report.rounds, report.seconds
    );
    for measure in measures(&report.results) {
        println!("\n{measure}");
        let grid = grid(&report.results, measure);
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY);
        table.set_header(&grid.header);
        table.add_rows(&grid.rows);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        println!("{table}");
    }
    if !report.goals.is_empty() {
        println!("\nThe connector beside the others");
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY);
        table.set_header(["", "path", "", "better is"]);
        for goal in &report.goals {
            let better = if goal.more_is_better { "more" } else { "less" };
            let value = with_unit(goal.value, &goal.unit);
            table.add_row([goal.title, &goal.path, &value, better]);
        }
        println!("{table}");
    }
    let skipped = skipped(&report.results);
    if !skipped.is_empty() {
        println!("\nSkipped");
    }
    for line in skipped {
        println!("  {line}");
    }
}

/// Returns the measures of a run, in its order.
pub(super) fn measures(results: &Results) -> Vec<&str> {
    let mut measures: Vec<&str> = Vec::new();
    for row in &results.rows {
        if !measures.contains(&row.measure.as_str()) {
            measures.push(&row.measure);
        }
    }
    measures
}

/// One measure: a row for each path, a column for each figure.
pub(super) struct Grid {
    /// Names of the columns, with units.
    pub(super) header: Vec<String>,
    /// The path's name first.
    pub(super) rows: Vec<Vec<String>>,
}

/// Returns the grid of `measure`.
pub(super) fn grid(results: &Results, measure: &str) -> Grid {
    let of_measure = || results.rows.iter().filter(|row| row.measure == measure);
    let (mut figures, mut paths): (Vec<&Row>, Vec<&str>) = Default::default();
    for row in of_measure() {
        if !figures.iter().any(|known| known.figure == row.figure) {
            figures.push(row);
        }
        if !paths.contains(&row.path.as_str()) {
            paths.push(&row.path);
        }
    }
    let titles = figures
        .iter()
        .map(|row| format!("{}, {}", row.figure, row.unit));
    let cell = |path: &str, figure: &str| {
        let found = results.row(measure, path, figure);
        found.map_or_else(|| "-".to_owned(), spread)
    };
    let line = |path: &&str| {
        let cells = figures.iter().map(|figure| cell(path, &figure.figure));
        std::iter::once((*path).to_owned()).chain(cells).collect()
    };
    Grid {
        header: std::iter::once(String::new()).chain(titles).collect(),
        rows: paths.iter().map(line).collect(),
    }
}

/// Returns the skipped measures, one line each.
pub(super) fn skipped(results: &Results) -> Vec<String> {
    let line = |it: &tunnel_tests::bench::run::Skipped| match &it.measure {
        Some(measure) => format!("{}, {measure}: {}", it.path, it.why),
        None => format!("{}: {}", it.path, it.why),
    };
    // A measure that makes no sense over a path needs no excuse in a report for people.
    let excused = |why: &str| why.starts_with("the wire") || why.starts_with("no program");
    let told = results.skipped.iter().filter(|it| !excused(&it.why));
    told.map(line).collect()
}

/// Returns the median and, if there are several values, in brackets the minimum and the maximum.
fn spread(row: &Row) -> String {
    if row.values.len() == 1 {
        return number(row.median);
    }
    format!(
        "{} ({}-{})",
        number(row.median),
        number(row.min),
        number(row.max)
    )
}

/// Returns a value with its unit; a ratio has none.
pub(super) fn with_unit(value: f64, unit: &str) -> String {
    match unit {
        "" => format!("{value:.2} x"),
        unit => format!("{} {unit}", number(value)),
    }
}

/// Returns a number with three significant digits.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(number(0.123), "0.12");
        assert_eq!(number(1.234), "1.23");
        assert_eq!(number(12.34), "12.3");
        assert_eq!(number(1234.5), "1234");
        assert_eq!(with_unit(0.5, ""), "0.50 x");
        assert_eq!(with_unit(300.0, "µs"), "300 µs");
    }

    #[test]
    fn a_figure_that_a_path_lacks_is_a_dash() {
        let row = |path: &str, figure: &str| Row {
            measure: "bulk".to_owned(),
            path: path.to_owned(),
            figure: figure.to_owned(),
            unit: "s/GB".to_owned(),
            median: 2.0,
            min: 1.0,
            max: 3.0,
            values: vec![1.0, 2.0, 3.0],
        };
        let results = Results {
            rows: vec![
                row("direct", "speed"),
                row("redirect", "speed"),
                row("redirect", "CPU"),
            ],
            ..Results::default()
        };
        assert_eq!(measures(&results), ["bulk"]);
        let grid = grid(&results, "bulk");
        assert_eq!(grid.header, ["", "speed, s/GB", "CPU, s/GB"]);
        let spread = "2.00 (1.00-3.00)";
        assert_eq!(
            grid.rows,
            [["direct", spread, "-"], ["redirect", spread, spread]]
        );
    }
}
