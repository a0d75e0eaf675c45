//! Whose a token is: asked of the API server, with `TokenReview`, and remembered for a moment.
//!
//! Invariants: a token lets in for at most [`GRANTED_FOR`] after it was reviewed, and never past
//! the expiry that it names itself. One token is under review once, however many ask; few tokens
//! are at the same time. Tokens are kept as digests.

pub mod claims;
pub mod fingerprint;
mod judge;
mod verdicts;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::client::call;
use super::delays::Delays;
use claims::left;
use cpc_config::kubernetes::TokenRules;
use judge::judge;
use verdicts::{Entered, Kept, Verdicts};

/// How long a granted token is believed without asking again.
pub const GRANTED_FOR: Duration = Duration::from_secs(60);

/// How long a refused one is refused without asking again.
const REFUSED_FOR: Duration = Duration::from_secs(10);

/// How long a review may take with all its tries. An agent waits for no longer than that.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reviews that the API server is asked for at the same time.
const AT_ONCE: usize = 16;

/// Whose a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The node of the pod that the token was issued to, where the API server knows it.
    pub node: Option<String>,
    /// What tells the token apart from others, where the API server says it.
    pub credential: Option<String>,
}

/// Why a token does not let in. The texts are those of proxy-server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// Nobody knows: the API server was not reached, or does not review for us.
    #[error("Failed to authenticate request. err:{0}")]
    Unavailable(String),
    /// The API server could not check the token, and says why.
    #[error("lookup failed: {0}")]
    Lookup(String),
    /// Not a token of this cluster, or not any more.
    #[error("lookup failed: service account jwt not valid")]
    NotValid,
    /// Good, but not for us.
    #[error("lookup failed: the token is not for audience {0:?}")]
    Audience(String),
    /// Not a user as service accounts are.
    #[error("lookup failed: unexpected username format")]
    Format,
    /// Another kind of user.
    #[error("lookup failed: username returned is not a service account")]
    NotServiceAccount,
    /// A service account elsewhere.
    #[error("lookup failed: incoming request from {found:?} namespace. Expected {expected:?}")]
    Namespace {
        /// Where.
        found: String,
        /// Where it should be.
        expected: String,
    },
    /// Another service account.
    #[error(
        "lookup failed: incoming request from {found:?} service account. Expected {expected:?}"
    )]
    ServiceAccount {
        /// Which.
        found: String,
        /// Which it should be.
        expected: String,
    },
}

/// What became of a review.
type Verdict = Result<ServiceAccount, ReviewError>;

/// Reviews tokens. Clones share what they know, and may be used on any runtime.
#[derive(Clone)]
pub struct TokenReviewer(Arc<Inner>);

struct Inner {
    reviews: Api<TokenReview>,
    rules: TokenRules,
    verdicts: Mutex<Verdicts>,
    turns: Semaphore,
    pause: Mutex<Pause>,
    home: Handle,
}

/// The API server is left alone after a failure.
#[derive(Default)]
struct Pause {
    delays: Delays,
    /// Until when, and why.
    until: Option<(Instant, String)>,
}

impl TokenReviewer {
    /// Asks `client`, on the current runtime.
    pub fn new(client: Client, rules: TokenRules) -> Self {
        Self(Arc::new(Inner {
            reviews: Api::all(client),
            rules,
            verdicts: Mutex::default(),
            turns: Semaphore::new(AT_ONCE),
            pause: Mutex::default(),
            home: Handle::current(),
        }))
    }

    /// Whose `token` is.
    ///
    /// # Errors
    /// [`ReviewError`], after some 10 s at most.
    pub async fn review(&self, token: &str) -> Verdict {
        let entered = lock(&self.0.verdicts).enter(token, Instant::now());
        let mut slot = match entered {
            Entered::Known(slot) => slot,
            Entered::New { settle, slot } => {
                // Its own task: whoever asks may go away, and others may be waiting with him.
                let asked = self.0.clone().settle(token.to_owned(), settle);
                self.0.home.spawn(asked);
                slot
            }
            Entered::Full => {
                let why = "too many tokens are under review".into();
                return Err(ReviewError::Unavailable(why));
            }
        };
        let settled = slot.wait_for(Option::is_some).await;
        match settled.ok().as_deref() {
            Some(Some(kept)) => kept.verdict.clone(),
            _ => Err(ReviewError::Unavailable("the review was given up".into())),
        }
    }
}

impl Inner {
    async fn settle(self: Arc<Self>, token: String, settle: watch::Sender<Option<Kept>>) {
        let verdict = match self.ask(&token).await {
            Ok(status) => judge(status, &self.rules),
            Err(error) => Err(error),
        };
        let keep = match &verdict {
            Ok(_) => left(&token).map_or(GRANTED_FOR, |left| left.min(GRANTED_FOR)),
            Err(ReviewError::Unavailable(_)) => Duration::ZERO,
            Err(_) => REFUSED_FOR,
        };
        let until = Instant::now() + keep;
        settle.send_replace(Some(Kept { verdict, until }));
    }

    /// Asks the API server until it answers.
    async fn ask(&self, token: &str) -> Result<TokenReviewStatus, ReviewError> {
        let deadline = Instant::now() + PATIENCE;
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![self.rules.audience.clone()]),
                token: token.to_owned(),
            },
            ..TokenReview::default()
        };
        let answered = timeout_at(deadline, async {
            // The semaphore is never closed.
            let _turn = self.turns.acquire().await.ok();
            loop {
                self.rest(deadline).await?;
                let since = Instant::now();
                match call(self.reviews.create(&PostParams::default(), &review)).await {
                    Ok(answer) => {
                        *lock(&self.pause) = Pause::default();
                        return Ok(answer.status.unwrap_or_default());
                    }
                    // One agent's doing, which is no reason to leave the API server alone.
                    Err(error) if error.is_bad_request() => {
                        return Err(ReviewError::Lookup(error.to_string()));
                    }
                    Err(error) => {
                        self.failed(since, error.to_string());
                        if !error.may_pass() {
                            return Err(ReviewError::Unavailable(error.to_string()));
                        }
                    }
                }
            }
        });
        let late = |_| {
            let why = self.why().unwrap_or_else(|| "no answer in time".into());
            Err(ReviewError::Unavailable(why))
        };
        answered.await.unwrap_or_else(late)
    }

    /// Waits while the API server is left alone; fails when that is for too long.
    async fn rest(&self, deadline: Instant) -> Result<(), ReviewError> {
        let pause = lock(&self.pause).until.clone();
        match pause {
            Some((until, why)) if until > deadline => Err(ReviewError::Unavailable(why)),
            Some((until, _)) => {
                sleep_until(until).await;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Notes that what was asked `since` then has failed. What failed together counts once.
    fn failed(&self, since: Instant, why: String) {
        let mut pause = lock(&self.pause);
        if pause
            .until
            .as_ref()
            .is_none_or(|(until, _)| *until <= since)
        {
            tracing::warn!(error = why, "tokens of agents can't be reviewed");
            pause.until = Some((Instant::now() + pause.delays.next(), why));
        }
    }

    fn why(&self) -> Option<String> {
        let pause = lock(&self.pause);
        pause.until.as_ref().map(|(_, why)| why.clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
