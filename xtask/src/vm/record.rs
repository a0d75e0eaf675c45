//! docs/kernels.md: what the last recorded run on each kernel came to.
//!
//! The section of a series is replaced when it has been run again, so that one kernel can be recorded
//! alone.

use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result};

use super::results::{Outcome, Verdict};
use crate::bench::machine::Machine;
use crate::workspace;

const HEAD: &str = include_str!("kernels.md");
const SECTION: &str = "\n## Linux ";

/// Puts the section of `outcome` into the page.
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
    sections.retain(|it| key(it) != key(&new));
    sections.push(&new);
    sections.sort_by_key(|it| key(it));
    let mut text = HEAD.to_owned();
    for section in sections {
        writeln!(text, "{SECTION}{}", section.trim_end())?;
    }
    Ok(text)
}

/// Series of the kernel and systemd's, which tell sections apart.
fn key(section: &str) -> ([u32; 2], u32) {
    let title = section.lines().next().unwrap_or_default();
    let (kernel, systemd) = title.split_once(", systemd ").unwrap_or_default();
    let number = |text: Option<&str>| text.and_then(|it| it.parse().ok()).unwrap_or(0);
    let mut numbers = kernel.split(|c: char| !c.is_ascii_digit());
    let series = [number(numbers.next()), number(numbers.next())];
    let systemd = systemd.split(|c: char| !c.is_ascii_digit()).next();
    (series, number(systemd))
}

fn section(outcome: &Outcome, machine: &Machine) -> Result<String> {
    let mut text = format!("{}, systemd {}\n\n", outcome.kernel, outcome.systemd);
    writeln!(text, "On {}\n", machine.sentence())?;
    text.push_str(
        "| what | passed | failed | skipped | s |\n| --- | ---: | ---: | ---: | ---: |\n",
    );
    for (name, [passed, skipped, failed], seconds) in outcome.groups() {
        writeln!(
            text,
            "| `{name}` | {passed} | {failed} | {skipped} | {seconds} |"
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
}
