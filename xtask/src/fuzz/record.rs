//! docs/fuzzing.md: the result of the last recorded run of each target.
//!
//! A run replaces the row of its target, so that one target can be recorded alone. A finding ends
//! the run before its row is written.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::Outcome;
use crate::bench::machine::Machine;
use crate::workspace;

const HEAD: &str = "# Fuzzing

Every decoder of a peer's input, and every state machine behind one, has a target in `tests/fuzz`, with a corpus beside it.
`cargo xtask test` runs each target for some seconds. This page records long runs:

```sh
nice cargo xtask fuzz --runs 10000000 --record              # all targets, or the named ones
```

A finding ends the run and leaves its input in `target/fuzz/artifacts`. A finding is a panic, an overflow, a broken assertion of
the target, 5 s for one input, or 512 MiB of memory. A target with a row here had no finding; a target without one had no long run
yet. *Edges* are the reached edges of the control flow, in the target and all of its dependencies. *Corpus* is the number of
inputs in the corpus, each of which reaches an edge that no other one does.

";

const COLUMNS: &str = "\
| target | executions | s | executions/s | edges | corpus | commit |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
";

/// Puts the row of `outcome` into the page; `targets` are all that there are.
pub(super) fn write(outcome: &Outcome, machine: &Machine, targets: &[String]) -> Result<()> {
    let page = workspace::root().join("docs/fuzzing.md");
    // Missing at the first time.
    let old = fs::read_to_string(&page).unwrap_or_default();
    let row = |target: &str| {
        if target == outcome.target {
            return Some(row(outcome, &machine.commit));
        }
        let head = head_of_row(target);
        old.lines()
            .find(|line| line.starts_with(&head))
            .map(|line| format!("{line}\n"))
    };
    let rows: String = targets.iter().filter_map(|target| row(target)).collect();
    let texts = targets
        .iter()
        .map(|target| Ok(format!("* `{target}`: {}\n", purpose(target)?)))
        .collect::<Result<String>>()?;
    let text = format!(
        "{HEAD}{}\n\n{COLUMNS}{rows}\n## Targets\n\n{texts}",
        machine.sentence()
    );
    fs::write(&page, text).with_context(|| format!("cannot write {}", page.display()))
}

fn head_of_row(target: &str) -> String {
    format!("| `{target}` |")
}

fn row(outcome: &Outcome, commit: &str) -> String {
    let seconds = outcome.elapsed.as_secs_f64();
    format!(
        "{} {} | {seconds:.0} | {:.0} | {} | {} | {commit} |\n",
        head_of_row(&outcome.target),
        outcome.executions,
        outcome.executions as f64 / seconds,
        outcome.edges,
        outcome.corpus,
    )
}

/// Returns the purpose of a target, from the head of its file.
fn purpose(target: &str) -> Result<String> {
    let file = PathBuf::from("tests/fuzz/fuzz_targets").join(target);
    let file = workspace::root().join(file.with_extension("rs"));
    let text =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let lines = text.lines().map_while(|line| line.strip_prefix("//! "));
    Ok(lines.collect::<Vec<_>>().join(" "))
}
