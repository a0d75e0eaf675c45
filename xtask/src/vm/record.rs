//! docs/kernels.md: the result of the last recorded run on each kernel.
//!
//! A run replaces the rows of its groups, so that one kernel or one part can be recorded alone.
//! Each row has its commit.

use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result};

use super::results::{Outcome, Verdict};
use crate::bench::machine::Machine;
use crate::workspace;

const HEAD: &str = include_str!("kernels.head");
const SECTION: &str = "\n## Linux ";
const COLUMNS: &str = "\
| what | passed | failed | skipped | s | load | commit |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
";

/// Writes the section of `outcome` into the page.
pub(super) fn write(outcome: &Outcome, machine: &Machine) -> Result<()> {
    let page = workspace::root().join("docs/kernels.md");
    // Missing at the first time.
    let old = fs::read_to_string(&page).unwrap_or_default();
    fs::write(&page, with(&old, outcome, machine)?)
        .with_context(|| format!("cannot write {}", page.display()))?;
    eprintln!("    written to {}", page.display());
    Ok(())
}

fn with(old: &str, outcome: &Outcome, machine: &Machine) -> Result<String> {
    let new = section(outcome, machine)?;
    let mut sections: Vec<&str> = old.split(SECTION).skip(1).collect();
    let before = sections.iter().find(|it| key(it) == key(&new));
    let new = section_with(&new, before.copied().unwrap_or_default(), outcome);
    sections.retain(|it| key(it) != key(&new));
    sections.push(&new);
    sections.sort_by_key(|it| key(it));
    let mut text = HEAD.to_owned();
    for section in sections {
        writeln!(text, "{SECTION}{}", section.trim_end())?;
    }
    Ok(text)
}

/// Returns the series of the kernel and the version of systemd, which identify a section.
fn key(section: &str) -> ([u32; 2], u32) {
    let title = section.lines().next().unwrap_or_default();
    let (kernel, systemd) = title.split_once(", systemd ").unwrap_or_default();
    let number = |text: Option<&str>| text.and_then(|it| it.parse().ok()).unwrap_or(0);
    let mut numbers = kernel.split(|c: char| !c.is_ascii_digit());
    let series = [number(numbers.next()), number(numbers.next())];
    let systemd = systemd.split(|c: char| !c.is_ascii_digit()).next();
    (series, number(systemd))
}

/// Returns the section, with the rows of the old one for groups that did not run this time.
fn section_with(new: &str, before: &str, outcome: &Outcome) -> String {
    let ran = |line: &str| {
        let group = line.split('`').nth(1).unwrap_or_default();
        outcome.groups().iter().any(|(name, ..)| *name == group)
    };
    let of = |head: &str| {
        let kept = before
            .lines()
            .filter(|line| line.starts_with(head) && !ran(line));
        kept.map(|line| format!("{line}\n")).collect::<String>()
    };
    let (table, list) = new.rsplit_once("|\n\n").unwrap_or((new, ""));
    format!("{table}|\n{}\n{list}{}", of("| `"), of("* "))
}

fn section(outcome: &Outcome, machine: &Machine) -> Result<String> {
    let mut text = format!("{}, systemd {}\n\n", outcome.kernel, outcome.systemd);
    text.push_str(COLUMNS);
    for (name, [passed, skipped, failed], seconds) in outcome.groups() {
        let (load, commit) = (&machine.load_before, &machine.commit);
        writeln!(
            text,
            "| `{name}` | {passed} | {failed} | {skipped} | {seconds} | {load} | {commit} |"
        )?;
    }
    text.push('\n');
    for check in &outcome.checks {
        match &check.verdict {
            Verdict::Passed => {}
            Verdict::Failed => writeln!(text, "* failed: `{}` `{}`", check.group, check.name)?,
            Verdict::Skipped(why) => {
                writeln!(text, "* skipped: `{}` `{}`: {why}", check.group, check.name)?;
            }
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::results::Check;

    fn outcome(kernel: &str, systemd: &str) -> Outcome {
        Outcome {
            kernel: kernel.to_owned(),
            systemd: systemd.to_owned(),
            checks: vec![Check {
                group: "units".to_owned(),
                name: "reload".to_owned(),
                verdict: Verdict::Passed,
                seconds: 3,
            }],
        }
    }

    #[test]
    fn a_series_has_one_section_and_they_are_in_order() {
        let machine = Machine::look(false);
        let mut page = String::new();
        for (kernel, systemd) in [
            ("6.12.95+deb12-cloud-amd64", "257.13-1"),
            ("6.1.0-50-cloud-amd64", "252.39-1"),
            ("6.12.117+deb13-cloud-amd64", "257.13-1"),
            ("6.12.117+deb13-cloud-amd64", "252.39-1"),
        ] {
            page = with(&page, &outcome(kernel, systemd), &machine).unwrap();
        }
        assert!(page.starts_with(HEAD));
        let titles: Vec<_> = page
            .lines()
            .filter(|it| it.starts_with("## Linux"))
            .collect();
        let expected = [
            "## Linux 6.1.0-50-cloud-amd64, systemd 252.39-1",
            "## Linux 6.12.117+deb13-cloud-amd64, systemd 252.39-1",
            "## Linux 6.12.117+deb13-cloud-amd64, systemd 257.13-1",
        ];
        assert_eq!(titles, expected);
    }

    #[test]
    fn what_was_not_run_again_stays() {
        let machine = Machine::look(false);
        let mut first = outcome("6.1.0-50", "252");
        for (group, name) in [("redirect", "one"), ("units", "two")] {
            first.checks.push(Check {
                group: group.to_owned(),
                name: name.to_owned(),
                verdict: Verdict::Failed,
                seconds: 1,
            });
        }
        let page = with("", &first, &machine).unwrap();
        let page = with(&page, &outcome("6.1.0-51", "252"), &machine).unwrap();
        assert_eq!(page.matches("## Linux").count(), 1);
        assert!(page.contains("## Linux 6.1.0-51"), "{page}");
        assert!(page.contains("| `units` | 1 | 0 | 0 | 3 |"), "{page}");
        assert!(page.contains("| `redirect` | 0 | 1 | 0 | 1 |"), "{page}");
        assert!(page.contains("* failed: `redirect` `one`"), "{page}");
        assert!(!page.contains("`two`"), "{page}");
    }
}
