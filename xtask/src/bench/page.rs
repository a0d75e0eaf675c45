//! docs/performance.md and its plots.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use tunnel_tests::bench::run::{Results, Row};

use super::{Report, plot, table};

const NAME: &str = "performance.md";
const PLOTS: &str = "performance";

const HEAD: &str = "# Performance

`cargo xtask bench` measures your machine; `cargo xtask bench --help` lists the parts. One run measures all paths in turns.
Figures are the medians of the rounds, with minimum and maximum in brackets. Differences under 10 % are ties. Compare within a
table, not across machines.

";

const METHOD: &str = "## How to read it

* **direct** is TCP without a tunnel over the same wire, a veth between two network namespaces. **quinn** is the
  simplest tunnel over stock quinn (`tests/benches/stock_quinn`), with copies or with owned chunks, and with the cipher,
  windows and socket buffers of the connector: plain use of the library. **connect** and **redirect** are the connector, by
  HTTP CONNECT over a Unix socket and redirected in the kernel.
* **CPU** is user and system time of the processes of server and agents, for each GB (10^9 bytes) moved or for each request.
  Client and target do not count, though they share the processors. The kernel's work in interrupts counts for the process
  that it interrupts.
* Client and target send from the page cache and discard received bytes, so that they take little of the processors. So
  direct bulk copies nothing, which no program in between can reach.
* A veth passes a large UDP packet whole, which flatters the figures. The rows *no USO* have the cost of a network card
  without UDP segmentation offload.
* The access log of the connector is on, as by default; Konnectivity logs nothing (`-v=0`).
* Memory of idle connections is anonymous resident memory of the processes. The kernel's memory is the growth of its slabs
  on the whole machine, for all four sockets of a connection, including other work on the machine.
* Requests beside 8 bulk streams compete for the processors. The p99 of direct TCP at the same time shows the part of the
  machine.
";

/// Writes page and plots into `folder`.
pub(super) fn write(report: &Report, folder: &Path) -> Result<()> {
    let plots = folder.join(PLOTS);
    fs::create_dir_all(&plots).with_context(|| format!("cannot make {}", plots.display()))?;
    let mut page = HEAD.to_owned();
    let asked: Vec<_> = std::env::args().skip(1).collect();
    writeln!(page, "Written by `cargo xtask {}`.", asked.join(" "))?;
    writeln!(page, "{}", report.machine.sentence())?;
    writeln!(
        page,
        "{} rounds, about {} s a measurement.\n",
        report.rounds, report.seconds
    )?;
    if !report.goals.is_empty() {
        writeln!(page, "## The connector beside the others\n")?;
        writeln!(page, "| | path | | better is |\n| --- | --- | ---: | --- |")?;
        for goal in &report.goals {
            let better = if goal.more_is_better { "more" } else { "less" };
            let value = table::with_unit(goal.value, &goal.unit);
            writeln!(
                page,
                "| {} | {} | {value} | {better} |",
                goal.title, goal.path
            )?;
        }
        page.push('\n');
    }
    for measure in table::measures(&report.results) {
        section(&mut page, &report.results, measure, &plots)?;
    }
    let skipped = table::skipped(&report.results);
    if !skipped.is_empty() {
        writeln!(page, "## Skipped\n")?;
        for line in skipped {
            writeln!(page, "* {line}")?;
        }
        page.push('\n');
    }
    page.push_str(METHOD);
    let file = folder.join(NAME);
    fs::write(&file, page).with_context(|| format!("cannot write {}", file.display()))?;
    eprintln!("written: {} and {}/", file.display(), plots.display());
    Ok(())
}

fn section(page: &mut String, results: &Results, measure: &str, plots: &Path) -> Result<()> {
    writeln!(page, "## {}\n", capitalised(measure))?;
    let grid = table::grid(results, measure);
    writeln!(page, "| {} |", grid.header.join(" | "))?;
    let columns = grid.header.len().saturating_sub(1);
    writeln!(page, "| --- |{}", " ---: |".repeat(columns))?;
    for row in &grid.rows {
        writeln!(page, "| {} |", row.join(" | "))?;
    }
    page.push('\n');
    for figure in plotted(results, measure) {
        let rows: Vec<&Row> = results
            .rows
            .iter()
            .filter(|row| row.measure == measure && row.figure == figure)
            .collect();
        let title = format!("{measure}: {figure}");
        let file = format!("{}.svg", file_name(&title));
        fs::write(plots.join(&file), plot::bars(&title, &rows)?)?;
        writeln!(page, "![{title}]({PLOTS}/{file})\n")?;
    }
    Ok(())
}

/// Returns the figures of a measure that get a plot: the first one, and the cost.
fn plotted<'a>(results: &'a Results, measure: &str) -> Vec<&'a str> {
    let of_measure = results.rows.iter().filter(|row| row.measure == measure);
    let mut figures: Vec<&str> = Vec::new();
    for row in of_measure {
        let cost = row.figure == "CPU both";
        if (figures.is_empty() || cost) && !figures.contains(&row.figure.as_str()) {
            figures.push(&row.figure);
        }
    }
    figures
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().into_iter().flat_map(char::to_uppercase);
    first.chain(letters).collect()
}

/// Letters, digits and single dashes.
fn file_name(text: &str) -> String {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric());
    let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
    words.join("-").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_plain_names() {
        let name = file_name("100 B request and response, 64 connections: CPU both");
        assert_eq!(name, "100-b-request-and-response-64-connections-cpu-both");
        assert_eq!(capitalised("bulk down"), "Bulk down");
    }
}
