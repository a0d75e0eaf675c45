//! Output of the demonstration: one line a step while the step runs, then its evidence.
//!
//! A step holds only if its check does. The first that does not ends the demonstration.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{interrupt, sh};

/// Observations of a step, line by line, printed below it.
#[derive(Default)]
pub(super) struct Evidence(Vec<String>);

impl Evidence {
    /// Adds a line, or several.
    pub(super) fn note(&mut self, text: impl AsRef<str>) {
        self.0.extend(text.as_ref().lines().map(str::to_owned));
    }

    /// Runs `command` and adds it with its output, as in a terminal.
    pub(super) fn run(&mut self, command: &mut Command) -> Result<CommandOutput> {
        self.note(format!("$ {}", sh::text(command)));
        let output = command
            .output()
            .with_context(|| format!("cannot start `{}`", sh::text(command)))?;
        let both = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&both).trim_end().to_owned();
        self.note(&text);
        Ok(CommandOutput {
            success: output.status.success(),
            text,
        })
    }
}

/// Result of a command.
pub(super) struct CommandOutput {
    /// Whether its exit code was 0.
    pub(super) success: bool,
    /// Both of its outputs.
    pub(super) text: String,
}

impl CommandOutput {
    /// Fails unless the command succeeded and printed `part`.
    pub(super) fn expect_success(&self, part: &str) -> Result<()> {
        if !self.success || !self.text.contains(part) {
            bail!("the command should have succeeded and printed {part:?}");
        }
        Ok(())
    }

    /// Fails unless the command failed and printed `part`.
    pub(super) fn expect_failure(&self, part: &str) -> Result<()> {
        if self.success {
            bail!("the command should have failed");
        }
        // curl and kubectl write the same error with other capitals.
        if !self.text.to_lowercase().contains(&part.to_lowercase()) {
            bail!("the command should have failed with {part:?}");
        }
        Ok(())
    }
}

/// Runs one step and prints it.
pub(super) fn step<T>(title: &str, work: impl FnOnce(&mut Evidence) -> Result<T>) -> Result<T> {
    let spinner = ProgressBar::new_spinner()
        .with_style(ProgressStyle::with_template(
            "{spinner} {msg} {elapsed:.dim}",
        )?)
        .with_message(title.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(100));
    let start = Instant::now();
    let mut evidence = Evidence::default();
    let result = work(&mut evidence);
    spinner.finish_and_clear();
    let mark = if result.is_ok() { '✔' } else { '✘' };
    println!("{mark} {title}  ({:.1} s)", start.elapsed().as_secs_f64());
    for line in evidence.0 {
        println!("      {line}");
    }
    println!();
    interrupt::check()?;
    result.with_context(|| format!("failed step: {title}"))
}
