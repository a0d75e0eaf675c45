//! Review of tokens by the API server (`TokenReview`), with a short-lived cache.
//!
//! Invariants: a token admits its holder for at most [`GRANT_TTL`] after its review, and never past
//! its own expiry. One token has one review at a time, however many requests need it, and the number of
//! concurrent reviews is bounded. Tokens are stored as digests.

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
use verdicts::{CachedVerdict, Lookup, Verdicts};

/// Time for which a granted token needs no further review.
pub const GRANT_TTL: Duration = Duration::from_secs(60);

/// Time for which a refused token gets no further review.
const REFUSAL_TTL: Duration = Duration::from_secs(10);

/// Timeout of a review with all its retries. An agent waits no longer than that.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum number of concurrent reviews at the API server.
const MAX_REVIEWS: usize = 16;

/// The service account of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Namespace of the account.
    pub namespace: String,
    /// Name of the account.
    pub name: String,
    /// Node of the pod that the token was issued to, where the API server knows it.
    pub node: Option<String>,
    /// Unique id of the token, where the API server names it.
    pub credential: Option<String>,
}

/// Reason why a token is refused. The texts are those of proxy-server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// The API server was not reached, or does not allow us to review.
    #[error("Failed to authenticate request. err:{0}")]
    Unavailable(String),
    /// The API server could not check the token, for the given reason.
    #[error("lookup failed: {0}")]
    Lookup(String),
    /// The token is not, or no longer, one of this cluster.
    #[error("lookup failed: service account jwt not valid")]
    NotValid,
    /// The token has another audience.
    #[error("lookup failed: the token is not for audience {0:?}")]
    Audience(String),
    /// The user name lacks the format of service accounts.
    #[error("lookup failed: unexpected username format")]
    Format,
    /// The user is of another kind.
    #[error("lookup failed: username returned is not a service account")]
    NotServiceAccount,
    /// The service account is in another namespace.
    #[error("lookup failed: incoming request from {found:?} namespace. Expected {expected:?}")]
    Namespace {
        /// Namespace of the account.
        found: String,
        /// Expected namespace.
        expected: String,
    },
    /// The service account is another one.
    #[error(
        "lookup failed: incoming request from {found:?} service account. Expected {expected:?}"
    )]
    ServiceAccount {
        /// Name of the account.
        found: String,
        /// Expected name.
        expected: String,
    },
}

/// Outcome of a review.
type Verdict = Result<ServiceAccount, ReviewError>;

/// Reviewer of tokens. Clones share the cache, and may be used on any runtime.
#[derive(Clone)]
pub struct TokenReviewer(Arc<Inner>);

struct Inner {
    reviews: Api<TokenReview>,
    rules: TokenRules,
    verdicts: Mutex<Verdicts>,
    permits: Semaphore,
    pause: Mutex<Pause>,
    home: Handle,
}

/// Pause of the reviews after a failure of the API server.
#[derive(Default)]
struct Pause {
    delays: Delays,
    /// End of the pause, and its cause.
    until: Option<(Instant, String)>,
}

impl TokenReviewer {
    /// Creates a reviewer over `client`, on the current runtime.
    pub fn new(client: Client, rules: TokenRules) -> Self {
        Self(Arc::new(Inner {
            reviews: Api::all(client),
            rules,
            verdicts: Mutex::default(),
            permits: Semaphore::new(MAX_REVIEWS),
            pause: Mutex::default(),
            home: Handle::current(),
        }))
    }

    /// Reviews `token`.
    ///
    /// # Errors
    /// [`ReviewError`], after about 10 s at most.
    pub async fn review(&self, token: &str) -> Verdict {
        let lookup = lock(&self.0.verdicts).look_up(token, Instant::now());
        let mut slot = match lookup {
            Lookup::Cached(slot) => slot,
            Lookup::Missing { settle, slot } => {
                // A task of its own: the first caller may go away while others wait.
                let task = self.0.clone().settle(token.to_owned(), settle);
                self.0.home.spawn(task);
                slot
            }
            Lookup::Full => {
                let why = "too many tokens are under review".into();
                return Err(ReviewError::Unavailable(why));
            }
        };
        let settled = slot.wait_for(Option::is_some).await;
        match settled.ok().as_deref() {
            Some(Some(cached)) => cached.verdict.clone(),
            _ => Err(ReviewError::Unavailable("the review was cancelled".into())),
        }
    }
}

impl Inner {
    async fn settle(self: Arc<Self>, token: String, settle: watch::Sender<Option<CachedVerdict>>) {
        let verdict = match self.ask(&token).await {
            Ok(status) => judge(status, &self.rules),
            Err(error) => Err(error),
        };
        let keep = match &verdict {
            Ok(_) => left(&token).map_or(GRANT_TTL, |left| left.min(GRANT_TTL)),
            Err(ReviewError::Unavailable(_)) => Duration::ZERO,
            Err(_) => REFUSAL_TTL,
        };
        let until = Instant::now() + keep;
        settle.send_replace(Some(CachedVerdict { verdict, until }));
    }

    /// Retries the request until the API server answers.
    async fn ask(&self, token: &str) -> Result<TokenReviewStatus, ReviewError> {
        let deadline = Instant::now() + REVIEW_TIMEOUT;
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![self.rules.audience.clone()]),
                token: token.to_owned(),
            },
            ..TokenReview::default()
        };
        let answered = timeout_at(deadline, async {
            // The semaphore is never closed.
            let _permit = self.permits.acquire().await.ok();
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

    /// Waits for the end of a pause.
    ///
    /// # Errors
    /// The pause outlasts `deadline`.
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

    /// Notes the failure of a request that began at `since`. Concurrent failures count once.
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
