//! A dial at the shard's circuit breaker: passed and settled, or refused.

use std::time::{Duration, Instant};

use tunnel_proto::close::{CloseClass, CloseReason};
use tunnel_proto::preface::Destination;

use super::error::DialError;
use crate::breaker::{Breaker, Change, Outcome, Pass, Refused};
use crate::shard::{Shard, Target};
use cpc_observe::metrics::Closer;

/// A dial that may go ahead. A probe that is dropped leaves its place to the next dial.
pub(super) struct BreakerPass<'a> {
    shard: &'a Shard,
    probe: Option<(Target, Pass)>,
}

impl<'a> BreakerPass<'a> {
    /// Asks the breaker, where it has anything to say.
    ///
    /// # Errors
    /// [`DialError`], which says when the destination is tried again.
    pub(super) fn new(
        shard: &'a Shard,
        target: impl FnOnce() -> Target,
    ) -> Result<Self, DialError> {
        let mut breaker = shard.breaker.borrow_mut();
        let mut probe = None;
        if !breaker.is_empty() {
            let target = target();
            match breaker.admit(&target, Instant::now()) {
                Ok(Pass::Ordinary) => {}
                Ok(pass) => probe = Some((target, pass)),
                Err(why) => return Err(refused(&target.1, &why)),
            }
        }
        Ok(Self { shard, probe })
    }

    /// Reports the outcome of the dial to the breaker.
    pub(super) fn settle(mut self, outcome: Outcome, target: impl FnOnce() -> Target) {
        let probe = self.probe.take();
        let idle = match outcome {
            Outcome::Answered => self.shard.breaker.borrow().is_empty(),
            Outcome::TimedOut => false,
            Outcome::Unknown => probe.is_none(),
        };
        if !idle {
            let (target, pass) = probe.unwrap_or_else(|| (target(), Pass::Ordinary));
            settle(self.shard, &target, pass, outcome);
        }
    }
}

impl Drop for BreakerPass<'_> {
    fn drop(&mut self) {
        if let Some((target, pass)) = self.probe.take() {
            settle(self.shard, &target, pass, Outcome::Unknown);
        }
    }
}

fn settle(shard: &Shard, target: &Target, pass: Pass, outcome: Outcome) {
    let change = shard.change_breaker(|breaker: &mut Breaker<Target>| {
        breaker.settle(target, pass, outcome, Instant::now())
    });
    // Which destination it is stands in the access log.
    match change {
        Change::Opened => {
            shard.metrics.breakers_opened.inc();
            tracing::warn!(
                tenant = %target.0,
                "dials of a destination keep timing out: they are refused (circuit_open) until it \
                 answers; the access log names it"
            );
        }
        Change::Closed => tracing::info!(tenant = %target.0, "a destination answers again"),
        Change::None => {}
    }
}

/// Derives from a failed dial whether its destination answers. `silent`: the tunnel was silent.
pub(super) fn outcome(error: &DialError, silent: bool) -> Outcome {
    match (error.by, error.reason) {
        (Closer::Agent, CloseReason::DialTimeout) => Outcome::TimedOut,
        (Closer::Target, CloseReason::DialTimeout) if !silent => Outcome::TimedOut,
        (Closer::Agent, reason) if reason.class() == CloseClass::DialFailed => Outcome::Answered,
        _ => Outcome::Unknown,
    }
}

fn refused(destination: &Destination, why: &Refused) -> DialError {
    let failures = why.failures;
    let next = if why.wait.is_zero() {
        "one dial is finding out whether it answers again".to_owned()
    } else {
        // Not 0 s.
        let seconds = why.wait.as_secs() + 1;
        let wait = humantime::format_duration(Duration::from_secs(seconds));
        format!("it is tried again in {wait}")
    };
    let text = format!(
        "{destination} did not answer the last {failures} dials: {next} (limits.breaker_failures)"
    );
    DialError::new(CloseReason::CircuitOpen, Closer::Server, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_failure_says_of_the_destination() {
        for (by, reason, silent, expected) in [
            (
                Closer::Agent,
                CloseReason::DialTimeout,
                false,
                Outcome::TimedOut,
            ),
            (
                Closer::Target,
                CloseReason::DialTimeout,
                false,
                Outcome::TimedOut,
            ),
            (
                Closer::Target,
                CloseReason::DialTimeout,
                true,
                Outcome::Unknown,
            ),
            (
                Closer::Tunnel,
                CloseReason::DialTimeout,
                false,
                Outcome::Unknown,
            ),
            (
                Closer::Agent,
                CloseReason::ConnectionRefused,
                false,
                Outcome::Answered,
            ),
            (
                Closer::Agent,
                CloseReason::PolicyDenied,
                false,
                Outcome::Unknown,
            ),
            (
                Closer::Client,
                CloseReason::Cancelled,
                false,
                Outcome::Unknown,
            ),
            (
                Closer::Tunnel,
                CloseReason::LinkLost,
                false,
                Outcome::Unknown,
            ),
        ] {
            let error = DialError::new(reason, by, "why");
            assert_eq!(outcome(&error, silent), expected, "{by:?} {reason:?}");
        }
    }

    #[test]
    fn a_refusal_says_when_it_is_tried_again() {
        let destination = "10.0.0.1:80".parse().unwrap();
        let mut why = Refused {
            failures: 5,
            wait: Duration::from_millis(3500),
        };
        let said = refused(&destination, &why).to_string();
        assert!(
            said.contains("the last 5 dials: it is tried again in 4s"),
            "{said}"
        );
        why.wait = Duration::ZERO;
        let said = refused(&destination, &why).to_string();
        assert!(said.contains("finding out"), "{said}");
    }
}
