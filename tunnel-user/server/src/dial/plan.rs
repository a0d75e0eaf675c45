//! Decides which candidates a dial asks, and in which order. Sans-IO: time is an argument; look-ups,
//! streams and timers belong to the driver beside it (`dial.rs`).
//!
//! Invariant: a request never runs twice. A candidate may have run a request once it was sent a byte
//! of the client's, unless it answers that it did not dial. Only without that byte, or with that
//! answer, is another candidate asked ([`Failure::may_retry`]).

use std::fmt::Debug;
use std::time::{Duration, Instant};

use tunnel_proto::close::{CloseClass, CloseReason};

use crate::routes::MAX_CANDIDATES;

/// The part of its time that a dial waits for one candidate while another is there: a third.
const PATIENCE: u32 = 3;

/// A link that a dial may ask.
pub(super) trait Candidate: Clone {
    /// Identifier of a link.
    type Id: Copy + PartialEq + Debug;

    /// Identifies this link.
    fn id(&self) -> Self::Id;
}

/// The next step of a dial.
#[derive(Debug)]
pub(super) enum Action<C, E> {
    /// Look candidates up; [`Plan::found`] takes the result.
    LookUp,
    /// Ask a candidate; [`Plan::connected`] or [`Plan::failed`] takes the result.
    Ask(Ask<C>),
    /// End the dial with its last error. `None`: the look-up found nothing, or the dial has ended before.
    GiveUp(Option<E>),
}

/// One request to one candidate.
#[derive(Debug)]
pub(super) struct Ask<C> {
    /// The link.
    pub candidate: C,
    /// The number of requests of this dial before this one.
    pub attempt: u8,
    /// The time until the dial's deadline.
    pub time_left: Duration,
    /// The time after which the candidate is suspected; only where another one is there.
    pub patience: Option<Duration>,
}

/// Reason why a candidate did not connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// A limit of the link kept the request back.
    NotAsked,
    /// The candidate refused it.
    Refused(CloseReason),
    /// The stream could not be opened, or ended before an answer.
    Lost(CloseReason),
    /// The driver gave up a stream without an answer, as [`Plan::may_abandon`] allows.
    Abandoned,
    /// The dial's deadline passed.
    DeadlineOver,
    /// The client went away.
    ClientGone,
    /// The circuit breaker lets no dial of the destination through.
    CircuitOpen,
}

impl Failure {
    /// Whether another candidate may be asked. `sent`: the stream carried a byte of the client's.
    fn may_retry(self, sent: bool) -> bool {
        match self {
            Self::NotAsked | Self::Abandoned => !sent,
            Self::Refused(reason) => reason.class() == CloseClass::NotDialled,
            // An agent serves no stream of a tunnel that it declines, and one that ends while it has
            // nothing to serve has dialled nothing that it did not answer.
            Self::Lost(CloseReason::DuplicateServer | CloseReason::Draining) => true,
            Self::Lost(_) => !sent,
            Self::DeadlineOver | Self::ClientGone | Self::CircuitOpen => false,
        }
    }
}

/// The links that a dial can still ask in place of the current one.
#[derive(Debug)]
pub(super) struct Alternatives<I> {
    tried: Vec<I>,
}

impl<I: PartialEq> Alternatives<I> {
    /// Whether a link is one of them.
    pub(super) fn contains(&self, link: &I) -> bool {
        !self.tried.contains(link)
    }
}

/// The decisions of one dial.
#[derive(Debug)]
pub(super) struct Plan<C: Candidate, E> {
    deadline: Instant,
    state: State<C>,
    /// Every candidate that was chosen, the current one included.
    tried: Vec<C::Id>,
    /// Requests that have failed; [`MAX_CANDIDATES`] at most.
    attempt: u8,
    last_error: Option<E>,
}

#[derive(Debug)]
enum State<C> {
    LookUp,
    Ask {
        candidate: C,
        /// The look-up found another one.
        has_alternative: bool,
        /// The stream carried a byte of the client's.
        sent: bool,
    },
    Over,
}

impl<C: Candidate, E> Plan<C, E> {
    /// A dial that ends at `deadline`.
    pub(super) fn new(deadline: Instant) -> Self {
        Self {
            deadline,
            state: State::LookUp,
            tried: Vec::new(),
            attempt: 0,
            last_error: None,
        }
    }

    /// The end of the dial's time.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Decides on the next step. Until an event changes the plan the step stays the same, so that a
    /// dial can move to another shard before it asks.
    pub(super) fn next(&mut self, now: Instant) -> Action<C, E> {
        match &self.state {
            State::LookUp => Action::LookUp,
            State::Ask {
                candidate,
                has_alternative,
                ..
            } => {
                let time_left = self.deadline.saturating_duration_since(now);
                Action::Ask(Ask {
                    candidate: candidate.clone(),
                    attempt: self.attempt,
                    time_left,
                    patience: has_alternative.then_some(time_left / PATIENCE),
                })
            }
            State::Over => Action::GiveUp(self.last_error.take()),
        }
    }

    /// Takes the result of a look-up, the best candidate first. An earlier failure of this dial says
    /// more than a look-up that finds nothing.
    pub(super) fn found(&mut self, found: Result<Vec<C>, E>) {
        let State::LookUp = self.state else {
            return;
        };
        let found = found.unwrap_or_else(|error| {
            self.last_error.get_or_insert(error);
            Vec::new()
        });
        let mut untried = found.into_iter().filter(|c| !self.tried.contains(&c.id()));
        self.state = match untried.next() {
            Some(candidate) => {
                let id = candidate.id();
                let has_alternative = untried.any(|other| other.id() != id);
                self.tried.push(id);
                State::Ask {
                    candidate,
                    has_alternative,
                    sent: false,
                }
            }
            None => State::Over,
        };
    }

    /// Notes that the stream is about to carry the first byte of the client's.
    pub(super) fn first_byte(&mut self) {
        if let State::Ask { sent, .. } = &mut self.state {
            *sent = true;
        }
    }

    /// Whether a stream without an answer may be given up in favour of another candidate.
    pub(super) fn may_abandon(&self) -> bool {
        matches!(self.state, State::Ask { sent: false, .. }) && self.is_below_limit()
    }

    /// The links that could replace the current one; `None` at [`MAX_CANDIDATES`].
    pub(super) fn alternatives(&self) -> Option<Alternatives<C::Id>> {
        self.is_below_limit().then(|| Alternatives {
            tried: self.tried.clone(),
        })
    }

    /// Ends the plan: the candidate has connected.
    pub(super) fn connected(&mut self) {
        if let State::Ask { .. } = self.state {
            self.state = State::Over;
            self.last_error = None;
        }
    }

    /// Takes the failure of a candidate. Returns the error if another candidate may be asked.
    pub(super) fn failed(&mut self, failure: Failure, error: E) -> Option<&E> {
        let State::Ask { sent, .. } = self.state else {
            return None;
        };
        if failure != Failure::NotAsked {
            self.attempt += 1;
        }
        let goes_on = failure.may_retry(sent) && self.is_below_limit();
        // A look-up for each attempt: a successor of the candidate may be there by now.
        self.state = if goes_on { State::LookUp } else { State::Over };
        let error = self.last_error.insert(error);
        goes_on.then_some(error)
    }

    fn is_below_limit(&self) -> bool {
        self.tried.len() < MAX_CANDIDATES
    }
}

#[cfg(test)]
mod tests;
