//! The output of the machine: a line for each check of the units, and the output of cargo-nextest.

use anyhow::{Context, Result};

/// Result of one run.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Release of the kernel.
    pub(super) kernel: String,
    /// Version of systemd.
    pub(super) systemd: String,
    pub(super) checks: Vec<Check>,
}

/// A test or a check.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Check {
    /// `units`, or the test program.
    pub(super) group: String,
    pub(super) name: String,
    pub(super) verdict: Verdict,
    /// Duration in whole seconds.
    pub(super) seconds: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Passed,
    Failed,
    /// Skipped, for this reason.
    Skipped(String),
}

impl Outcome {
    /// Reads the output.
    pub(super) fn read(text: &str) -> Result<Self> {
        let machine = text.lines().find_map(|line| line.strip_prefix("machine "));
        let (kernel, systemd) = machine
            .and_then(|line| line.split_once(", systemd "))
            .context("the output does not name the machine")?;
        let mut checks: Vec<Check> = Vec::new();
        for line in text.lines() {
            if let Some(line) = line.strip_prefix("result ") {
                checks.extend(of_units(line));
            } else if let Some(line) = line.strip_prefix("> ") {
                if let Some(check) = of_nextest(line) {
                    checks.push(check);
                } else if let Some((_, why)) = line.split_once("skipped: ")
                    && let Some(last) = checks.last_mut()
                    && last.verdict == Verdict::Passed
                {
                    // What a test says that returns early; it follows the test's line.
                    last.verdict = Verdict::Skipped(why.trim().to_owned());
                }
            }
        }
        Ok(Self {
            kernel: kernel.to_owned(),
            systemd: systemd.to_owned(),
            checks,
        })
    }

    pub(super) fn succeeded(&self) -> bool {
        let failed = |check: &Check| check.verdict == Verdict::Failed;
        !self.checks.is_empty() && !self.checks.iter().any(failed)
    }

    /// Returns a title: `Linux 6.1.0-50-cloud-amd64, systemd 252.39`.
    pub(super) fn title(&self) -> String {
        format!("Linux {}, systemd {}", self.kernel, self.systemd)
    }

    /// Returns the groups, in the order in which they ran, with the numbers of passed, skipped and
    /// failed checks, and seconds.
    pub(super) fn groups(&self) -> Vec<(&str, [usize; 3], u64)> {
        let mut groups: Vec<(&str, [usize; 3], u64)> = Vec::new();
        for check in &self.checks {
            let known = groups.iter().position(|(name, ..)| *name == check.group);
            let at = known.unwrap_or_else(|| {
                groups.push((&check.group, [0; 3], 0));
                groups.len() - 1
            });
            let column = match check.verdict {
                Verdict::Passed => 0,
                Verdict::Skipped(_) => 1,
                Verdict::Failed => 2,
            };
            groups[at].1[column] += 1;
            groups[at].2 += check.seconds;
        }
        groups
    }

    /// Prints the sums, and the checks that did not pass.
    pub(super) fn print(&self) {
        println!("{}", self.title());
        for (name, [passed, skipped, failed], seconds) in self.groups() {
            println!("  {name}: {passed} passed, {failed} failed, {skipped} skipped, {seconds} s");
        }
        for check in &self.checks {
            match &check.verdict {
                Verdict::Passed => {}
                Verdict::Failed => println!("  FAILED {} {}", check.group, check.name),
                Verdict::Skipped(why) => {
                    println!("  skipped {} {}: {why}", check.group, check.name);
                }
            }
        }
    }
}

/// Parses `ok NAME SECONDS`, `failed NAME SECONDS ..` or `skipped NAME SECONDS WHY`.
fn of_units(line: &str) -> Option<Check> {
    let mut words = line.splitn(4, ' ');
    let verdict = words.next()?;
    let name = words.next()?.to_owned();
    let seconds = words.next()?.parse().ok()?;
    let verdict = match verdict {
        "ok" => Verdict::Passed,
        "skipped" => Verdict::Skipped(words.next().unwrap_or_default().to_owned()),
        _ => Verdict::Failed,
    };
    Some(Check {
        group: "units".to_owned(),
        name,
        verdict,
        seconds,
    })
}

/// Parses `PASS [   1.234s] (1/46) cpc-redirect::redirect capture::name`.
fn of_nextest(line: &str) -> Option<Check> {
    let (verdict, rest) = line.trim_start().split_once(" [")?;
    let verdict = match verdict {
        "PASS" | "LEAK" | "SLOW+PASS" => Verdict::Passed,
        "FAIL" | "TIMEOUT" | "ABORT" | "LEAK-FAIL" => Verdict::Failed,
        signal if signal.starts_with("SIG") => Verdict::Failed,
        _ => return None,
    };
    let (time, rest) = rest.split_once(']')?;
    let seconds: f64 = time.trim().trim_end_matches('s').parse().ok()?;
    let mut words = rest
        .split_whitespace()
        .filter(|word| !word.starts_with('('));
    Some(Check {
        group: words.next()?.to_owned(),
        name: words.next()?.to_owned(),
        verdict,
        seconds: seconds.round() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
machine 6.1.0-50-cloud-amd64, systemd 252.39-1~deb12u2
>     Starting 3 tests across 2 binaries
>         PASS [   1.500s] (1/3) cpc-redirect::redirect capture::one
>         PASS [   0.020s] (2/3) cpc-redirect::redirect refusal::two
>   stderr ---
>     skipped: refusal by errno needs Linux 6.1
>         SLOW [> 60.000s] (3/3) tunnel-tests::connector three
>         FAIL [  61.000s] (3/3) tunnel-tests::connector three
>     skipped: not this one
result ok reload 12
result skipped reload_is_waited_for 1 Type=notify-reload is of systemd 253
result failed watchdog 61 exit code 1
| something
finished
";

    #[test]
    fn every_line_is_read() {
        let outcome = Outcome::read(TEXT).unwrap();
        assert_eq!(
            outcome.title(),
            "Linux 6.1.0-50-cloud-amd64, systemd 252.39-1~deb12u2"
        );
        let skipped = |why: &str| Verdict::Skipped(why.to_owned());
        let of = |check: &Check| (check.name.clone(), check.seconds);
        let found: Vec<_> = outcome.checks.iter().map(of).collect();
        let expected = [
            ("capture::one", 2),
            ("refusal::two", 0),
            ("three", 61),
            ("reload", 12),
            ("reload_is_waited_for", 1),
            ("watchdog", 61),
        ];
        assert_eq!(found, expected.map(|(name, time)| (name.to_owned(), time)));
        assert_eq!(
            outcome.checks[1].verdict,
            skipped("refusal by errno needs Linux 6.1")
        );
        assert_eq!(outcome.checks[2].verdict, Verdict::Failed);
        assert_eq!(
            outcome.checks[4].verdict,
            skipped("Type=notify-reload is of systemd 253")
        );
        assert!(!outcome.succeeded());
        let groups = [
            ("cpc-redirect::redirect", [1, 1, 0], 2),
            ("tunnel-tests::connector", [0, 0, 1], 61),
            ("units", [1, 1, 1], 74),
        ];
        assert_eq!(outcome.groups(), groups);
    }

    #[test]
    fn nothing_run_is_no_success() {
        let text = "machine 6.1, systemd 252\nfinished\n";
        assert!(!Outcome::read(text).unwrap().succeeded());
        assert!(Outcome::read("").is_err());
    }
}
