//! Clients of every worker, the times in which their requests may fail, and whether any has failed
//! outside of them.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tunnel_tests::lab::server::ControlPlane;
use tunnel_tests::load::{Attempt, Failure, Load};

use crate::script::SOON;

/// Answers that every worker has to give after each step.
const ANSWERS: usize = 20;
/// Number of clients of one worker.
const CLIENTS: usize = 2;

/// A time in which some requests may fail.
#[derive(Debug)]
pub(crate) struct Window {
    pub(crate) start: Instant,
    pub(crate) end: Instant,
    /// Worker whose requests these are; all workers when missing.
    pub(crate) worker: Option<u8>,
}

/// A load for each worker; worker `n`'s is at index `n - 1`. They are in the laboratory's control
/// group, so they have to end before it.
#[derive(Default)]
pub(crate) struct Loads(Vec<Load>);

impl Loads {
    /// Lets clients ask the next worker.
    pub(crate) fn start(
        &mut self,
        place: &ControlPlane,
        ask: impl Fn(&str) -> Result<String, Failure> + Send + Sync + 'static,
    ) -> Result<()> {
        self.0.push(Load::start(place, CLIENTS, ask)?);
        Ok(())
    }

    /// Every worker answers.
    pub(crate) fn answered(&self, what: &str) -> Result<()> {
        for load in &self.0 {
            load.wait_answered(ANSWERS, SOON)
                .with_context(|| what.to_owned())?;
        }
        Ok(())
    }

    /// Ends them. Fails if a request did that was not under way in one of the windows.
    pub(crate) fn judge(&mut self, what: &str, windows: &[Window]) -> Result<()> {
        let mut result = Ok(());
        while let Some(load) = self.0.pop() {
            let n = u8::try_from(self.0.len())? + 1;
            result = result.and(judge(what, n, &load.stop(), windows));
        }
        result
    }
}

impl Drop for Loads {
    fn drop(&mut self) {
        // The last first: each leads back to the control group that this process was in before.
        while self.0.pop().is_some() {}
    }
}

fn judge(what: &str, n: u8, attempts: &[Attempt], windows: &[Window]) -> Result<()> {
    let failed = attempts.iter().filter(|attempt| attempt.result.is_err());
    let excused = |attempt: &&Attempt| {
        windows.iter().any(|window| {
            window.worker.is_none_or(|worker| worker == n)
                && attempt.start <= window.end
                && attempt.end >= window.start
        })
    };
    let (excused, guilty): (Vec<_>, Vec<_>) = failed.partition(excused);
    println!(
        "{what}: worker {n}: {} requests, {} failed in windows",
        attempts.len(),
        excused.len()
    );
    ensure!(
        guilty.is_empty(),
        "worker {n}: {} failed outside: {:?}",
        guilty.len(),
        guilty[0]
    );
    Ok(())
}
