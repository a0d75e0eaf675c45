//! The decisions of a session with one agent. Sans-IO: events and the results of actions in, one action out;
//! the driver beside it (`session.rs`) executes it.
//!
//! ```text
//! Hello -> (FindProcess, while this server drains) -> Admit -> Register -> Welcome -> serving
//! ```
//!
//! Invariants: an agent is welcomed once at most, after it was admitted and its routes are in force;
//! nothing follows a refusal.

use std::mem::replace;
use std::time::{Duration, Instant};

use tunnel_proto::certificate::Answer;
use tunnel_proto::close::CloseReason;
use tunnel_proto::route::Claim;
use tunnel_proto::session::{Hello, InstanceId, ServerEvent};

use crate::registry::Verdict;
use cpc_host::lifecycle::Phase;

/// Minimum interval of certificate requests; an agent that asks faster gets none.
const REQUEST_INTERVAL: Duration = Duration::from_secs(10);

/// Answer to a certificate request of a server without `join`.
pub(super) const NO_ISSUER: &str = "this server issues no certificates: it has no `join`";

/// Event of a session, for its lifecycle.
#[derive(Debug)]
pub(super) enum Input {
    /// An event of the agent.
    Agent(ServerEvent),
    /// The phase of this process has changed.
    PhaseChanged,
    /// Another session takes the place of this one.
    Replaced,
    /// The agent must give a life sign at once.
    Challenged,
    /// Result of [`Action::FindProcess`]: whether there is a session of the process.
    ProcessFound(bool),
    /// Result of [`Action::Admit`]: the text of the limit that refuses.
    Admitted(Result<(), String>),
    /// Result of [`Action::Register`]; `None` if this process is ending.
    Registered(Option<Verdict>),
    /// Result of [`Action::Judge`]; `None` if the session is gone.
    Judged(Option<Verdict>),
    /// Result of [`Action::Issue`].
    Issued(Answer),
}

/// Next step of the driver.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Wait for the next event.
    Wait,
    /// Look for another session of the agent's process.
    FindProcess(InstanceId),
    /// Take a place among the tunnels.
    Admit,
    /// Register the agent.
    Register(Registration),
    /// Send Welcome.
    Welcome(Verdict, Greeting),
    /// Have an offer judged that replaces the last one.
    Judge(Vec<Claim>),
    /// Send the verdict on an offer.
    SendVerdict(Verdict),
    /// Note whether the agent is silent.
    SetSilent(bool),
    /// Note that the agent drains; `takes_dials` tells whether it takes dials meanwhile, as far as it can.
    SetDraining {
        reason: CloseReason,
        takes_dials: bool,
    },
    /// Tell the agent that this server drains for that long.
    Drain(Duration),
    /// Request a life sign.
    Challenge,
    /// Have a certificate issued for this request.
    Issue(Vec<u8>),
    /// Send the answer to a certificate request.
    SendCertificate(Answer),
    /// End the session.
    Refuse(CloseReason, String),
}

/// Registration of an agent.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Registration {
    /// Process of the agent, and an earlier one that has ended.
    pub process: (InstanceId, Option<InstanceId>),
    /// Number of processes that had the id of the agent's process before.
    pub incarnation: u64,
    /// Offered claims.
    pub offer: Vec<Claim>,
    /// Whether the agent takes dials while it drains.
    pub serves_while_draining: bool,
    /// Whether connections over the agent can outlive their tunnel.
    pub holds_sessions: bool,
}

/// Facts about a welcome agent, for the log.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    /// Process of the agent.
    pub instance: InstanceId,
    /// Release of its software.
    pub version: String,
    /// Number of offered claims.
    pub offered: usize,
}

/// The time of an input, and the phase of this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    /// Time of the input.
    pub now: Instant,
    /// Phase of this process.
    pub phase: Phase,
}

/// One session, from Hello to its end.
#[derive(Debug)]
pub(super) struct Lifecycle {
    state: State,
    /// Whether this server issues certificates.
    issues: bool,
    /// Time of the last certificate request.
    requested: Option<Instant>,
    is_draining: bool,
}

#[derive(Debug)]
enum State {
    AwaitingHello,
    Finding(Hello),
    Admitting(Hello),
    Registering(Greeting),
    Serving,
    Over,
}

impl Lifecycle {
    /// Creates the session of a fresh tunnel, on a server that `issues` certificates or does not.
    pub(super) fn new(issues: bool) -> Self {
        Self {
            state: State::AwaitingHello,
            issues,
            requested: None,
            is_draining: false,
        }
    }

    /// Takes an input, and decides what to do about it.
    pub(super) fn handle(&mut self, input: Input, at: Moment) -> Action {
        if let State::Over = self.state {
            return Action::Wait;
        }
        match input {
            Input::Agent(event) => self.handle_agent(event, at),
            Input::PhaseChanged => match at.phase {
                Phase::Draining(deadline) => {
                    Action::Drain(deadline.saturating_duration_since(at.now))
                }
                Phase::Running | Phase::Ended => Action::Wait,
            },
            Input::Replaced => self.refuse(CloseReason::Replaced, "another session took its place"),
            Input::Challenged => Action::Challenge,
            Input::ProcessFound(found) => self.found(found),
            Input::Admitted(admitted) => self.admitted(admitted),
            Input::Registered(verdict) => self.registered(verdict),
            Input::Judged(Some(verdict)) => Action::SendVerdict(verdict),
            Input::Judged(None) => Action::Wait,
            Input::Issued(answer) => Action::SendCertificate(answer),
        }
    }

    fn handle_agent(&mut self, event: ServerEvent, at: Moment) -> Action {
        match event {
            ServerEvent::Hello(hello) => self.greeted(hello, at.phase),
            ServerEvent::Offer(offer) => Action::Judge(offer),
            ServerEvent::Silent => Action::SetSilent(true),
            ServerEvent::Alive => Action::SetSilent(false),
            ServerEvent::Draining { reason, .. } => {
                // An agent may say so repeatedly.
                if replace(&mut self.is_draining, true) {
                    return Action::Wait;
                }
                Action::SetDraining {
                    reason,
                    // Another tunnel of the same process takes the dials of a replaced one, or its successor.
                    takes_dials: !matches!(reason, CloseReason::Replaced | CloseReason::HandedOver),
                }
            }
            ServerEvent::Statistics(_) => Action::Wait,
            ServerEvent::CertificateRequest(csr) => self.certificate(csr, at.now),
        }
    }

    /// An agent that knows that this server drains looks for its successor. One that was started again
    /// meanwhile has no other server.
    fn greeted(&mut self, hello: Hello, phase: Phase) -> Action {
        let State::AwaitingHello = self.state else {
            return Action::Wait;
        };
        if phase == Phase::Running {
            self.state = State::Admitting(hello);
            return Action::Admit;
        }
        let instance = hello.instance_id;
        self.state = State::Finding(hello);
        Action::FindProcess(instance)
    }

    fn found(&mut self, found: bool) -> Action {
        match replace(&mut self.state, State::Over) {
            State::Finding(_) if found => {
                self.refuse(CloseReason::Shutdown, "the server is draining")
            }
            State::Finding(hello) => {
                self.state = State::Admitting(hello);
                Action::Admit
            }
            state => self.stay(state),
        }
    }

    fn admitted(&mut self, admitted: Result<(), String>) -> Action {
        let hello = match replace(&mut self.state, State::Over) {
            State::Admitting(hello) => hello,
            state => return self.stay(state),
        };
        if let Err(limit) = admitted {
            return self.refuse(CloseReason::Overloaded, limit);
        }
        let serves_while_draining = hello.serves_while_draining();
        let holds_sessions = hello.holds_sessions();
        self.state = State::Registering(Greeting {
            instance: hello.instance_id,
            version: hello.software_version,
            offered: hello.offer.len(),
        });
        Action::Register(Registration {
            process: (hello.instance_id, hello.predecessor),
            incarnation: hello.incarnation,
            offer: hello.offer,
            serves_while_draining,
            holds_sessions,
        })
    }

    fn registered(&mut self, verdict: Option<Verdict>) -> Action {
        match (replace(&mut self.state, State::Over), verdict) {
            (State::Registering(greeting), Some(verdict)) => {
                self.state = State::Serving;
                Action::Welcome(verdict, greeting)
            }
            (State::Registering(_), None) => {
                self.refuse(CloseReason::Shutdown, "the server is ending")
            }
            (state, _) => self.stay(state),
        }
    }

    /// A request is more work for the issuer than for the agent.
    fn certificate(&mut self, csr: Vec<u8>, now: Instant) -> Action {
        if !self.issues {
            return Action::SendCertificate(Err(NO_ISSUER.into()));
        }
        let last = self.requested.replace(now);
        let is_early = |last: Instant| now.saturating_duration_since(last) < REQUEST_INTERVAL;
        if last.is_some_and(is_early) {
            return Action::SendCertificate(Err("asked again too soon".into()));
        }
        Action::Issue(csr)
    }

    fn refuse(&mut self, reason: CloseReason, text: impl Into<String>) -> Action {
        self.state = State::Over;
        Action::Refuse(reason, text.into())
    }

    fn stay(&mut self, state: State) -> Action {
        self.state = state;
        Action::Wait
    }
}

#[cfg(test)]
mod tests;
