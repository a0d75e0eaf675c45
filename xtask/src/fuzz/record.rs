//! docs/fuzzing.md: what the last recorded run of each target came to.
//!
//! A row is replaced when its target has been run again, so that one target can be recorded alone.
//! A finding ends the run before its row is written.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::Outcome;
use crate::bench::machine::Machine;
use crate::workspace;

const HEAD: &str = "# Fuzzing

Every decoder of what a peer sends, and every machine that such input drives, has a target in `tests/fuzz`, with a
corpus beside it. `cargo xtask test` runs each for some seconds; this page is of a long run:

```sh
nice cargo xtask fuzz --runs 10000000 --record              # all of them, or name some
```

A finding ends the run and leaves its input in `target/fuzz/artifacts`: whatever has a row here had none, and
what has no row has not had its long run yet. What counts as one is a panic, an overflow, a broken assertion of the target's, 5 s for one input, or 512 MiB of memory. Edges are
those of the control flow that were reached, in the target itself and all that it is linked with. The corpus counts the
inputs that were kept because each reaches something that no other does.

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
        "{HEAD}{}\n\n{COLUMNS}{rows}\n## What each target is about\n\n{texts}",
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

/// What its file says that it is for.
fn purpose(target: &str) -> Result<String> {
    let file = PathBuf::from("tests/fuzz/fuzz_targets").join(target);
    let file = workspace::root().join(file.with_extension("rs"));
    let text =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let lines = text.lines().map_while(|line| line.strip_prefix("//! "));
    Ok(lines.collect::<Vec<_>>().join(" "))
}
