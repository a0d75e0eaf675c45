//! Verdicts about tokens, known or pending.
//!
//! Invariant: bounded. At the bound refused tokens are forgotten first; granted ones stay until they
//! run out.

use std::collections::HashMap;

use aws_lc_rs::digest::{SHA256, digest};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Verdict;

/// Maximum number of cached tokens: each agent has one, and another one during a renewal.
const MAX_TOKENS: usize = 16_384;

/// SHA-256 of a token.
type Key = [u8; 32];

/// A verdict with its expiry.
#[derive(Clone, Debug)]
pub(super) struct CachedVerdict {
    /// The verdict.
    pub verdict: Verdict,
    /// Expiry of the verdict.
    pub until: Instant,
}

/// Channel that the reviewer fills once.
pub(super) type Slot = watch::Receiver<Option<CachedVerdict>>;

/// State of a token.
#[derive(Debug)]
pub(super) enum Lookup {
    /// A valid or pending verdict.
    Cached(Slot),
    /// No verdict: the caller has to review.
    Missing {
        /// Takes the verdict.
        settle: watch::Sender<Option<CachedVerdict>>,
        /// Gives the verdict.
        slot: Slot,
    },
    /// Too many concurrent reviews.
    Full,
}

/// Verdicts by token.
#[derive(Debug, Default)]
pub(super) struct Verdicts(HashMap<Key, Slot>);

impl Verdicts {
    /// Returns the state of `token`.
    pub(super) fn look_up(&mut self, token: &str, now: Instant) -> Lookup {
        let mut key = Key::default();
        key.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        if let Some(slot) = self.0.get(&key).filter(|slot| is_good(slot, now)) {
            return Lookup::Cached(slot.clone());
        }
        self.0.remove(&key);
        if self.0.len() >= MAX_TOKENS {
            self.0
                .retain(|_, slot| is_good(slot, now) && !is_refused(slot));
        }
        if self.0.len() >= MAX_TOKENS {
            return Lookup::Full;
        }
        let (settle, slot) = watch::channel(None);
        self.0.insert(key, slot.clone());
        Lookup::Missing { settle, slot }
    }
}

/// Whether a verdict is valid or pending.
fn is_good(slot: &Slot, now: Instant) -> bool {
    match &*slot.borrow() {
        Some(cached) => now < cached.until,
        // The reviewing task may have been dropped.
        None => slot.has_changed().is_ok(),
    }
}

fn is_refused(slot: &Slot) -> bool {
    matches!(
        &*slot.borrow(),
        Some(CachedVerdict {
            verdict: Err(_),
            ..
        })
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{ReviewError, ServiceAccount};
    use super::*;

    fn granted() -> Verdict {
        Ok(ServiceAccount {
            namespace: "n".into(),
            name: "a".into(),
            node: None,
            credential: None,
        })
    }

    fn settle(verdicts: &mut Verdicts, token: &str, verdict: Verdict, until: Instant) {
        match verdicts.look_up(token, Instant::now()) {
            Lookup::Missing { settle, .. } => {
                settle.send_replace(Some(CachedVerdict { verdict, until }));
            }
            other => panic!("{token}: {other:?}"),
        }
    }

    #[test]
    fn a_verdict_holds_until_its_time() {
        let mut verdicts = Verdicts::default();
        let now = Instant::now();
        let until = now + Duration::from_secs(5);
        settle(&mut verdicts, "t", granted(), until);
        assert!(matches!(verdicts.look_up("t", now), Lookup::Cached(_)));
        assert!(matches!(verdicts.look_up("u", now), Lookup::Missing { .. }));
        assert!(matches!(
            verdicts.look_up("t", until),
            Lookup::Missing { .. }
        ));
    }

    #[test]
    fn a_review_that_was_torn_down_is_begun_anew() {
        let mut verdicts = Verdicts::default();
        let now = Instant::now();
        let first = verdicts.look_up("t", now);
        assert!(matches!(verdicts.look_up("t", now), Lookup::Cached(_)));
        drop(first);
        assert!(matches!(verdicts.look_up("t", now), Lookup::Missing { .. }));
    }

    #[test]
    fn at_the_bound_what_was_refused_goes_first() {
        let mut verdicts = Verdicts::default();
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(60));
        settle(&mut verdicts, "good", granted(), later);
        for n in 1..MAX_TOKENS {
            let refused = Err(ReviewError::NotValid);
            settle(&mut verdicts, &n.to_string(), refused, later);
        }
        assert!(matches!(
            verdicts.look_up("next", now),
            Lookup::Missing { .. }
        ));
        assert!(matches!(verdicts.look_up("good", now), Lookup::Cached(_)));

        let mut waiting = Vec::new();
        while let Lookup::Missing { settle, .. } = verdicts.look_up(&waiting.len().to_string(), now)
        {
            waiting.push(settle);
        }
        assert!(waiting.len() < MAX_TOKENS);
        assert!(matches!(verdicts.look_up("more", now), Lookup::Full));
        assert!(matches!(verdicts.look_up("good", now), Lookup::Cached(_)));
    }
}
