//! The agent's end of a session.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::SessionError;
use super::control_channel::{ControlChannel, from_drain};
use super::liveness::Timers;
use super::message::{Hello, Refusal, Welcome, from_verdict, message_name};
use crate::certificate::{Answer, from_answer};
use crate::close::CloseReason;
use crate::control::envelope::Message;
use crate::control::{CertificateRequest, Routes, Statistics};
use crate::route::{Claim, to_offer};

/// Event for an agent's driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentEvent {
    /// The server took the agent in. Once, before any other event.
    Welcomed(Welcome),
    /// Answer to an [`offer`](AgentSession::offer); answers come in the order of the offers.
    Verdict {
        /// The part of the offer that connections will be sent for.
        accepted: Vec<Claim>,
        /// Refused claims with the cause; see [`Welcome::refused`].
        refused: Vec<Refusal>,
    },
    /// Answer to a [`request_certificate`](AgentSession::request_certificate); answers come in the
    /// order of the requests.
    Certificate(Answer),
    /// The server has been silent for too long.
    Silent,
    /// The silent server has sent again.
    Alive,
    /// The server is about to leave.
    Draining {
        /// Time at which the server closes the remaining streams.
        deadline: Instant,
        /// Reason of the drain.
        reason: CloseReason,
    },
    /// The server opens no more streams, after this number of them.
    NoMoreStreams(u64),
}

/// The agent's end of a session; see the [module](super) for how to drive it.
#[derive(Debug)]
pub struct AgentSession {
    phase: Phase,
    channel: ControlChannel,
    events: VecDeque<AgentEvent>,
}

#[derive(Debug)]
enum Phase {
    AwaitingWelcome { until: Instant },
    Established,
    Closed,
}

impl AgentSession {
    /// Creates a session that begins with `hello`.
    ///
    /// # Errors
    /// [`SessionError::Unsendable`] if the offer does not fit into a message.
    pub fn new(hello: Hello, timers: Timers, now: Instant) -> Result<Self, SessionError> {
        let mut channel = ControlChannel::new(timers, now);
        channel.introduce(Message::Hello((&hello).into()))?;
        let phase = Phase::AwaitingWelcome {
            until: now + timers.hello_timeout,
        };
        Ok(Self {
            phase,
            channel,
            events: VecDeque::new(),
        })
    }

    /// Takes bytes off the control stream.
    ///
    /// # Errors
    /// [`SessionError`]: the session is over, further bytes are ignored.
    pub fn handle_bytes(&mut self, bytes: &[u8], now: Instant) -> Result<(), SessionError> {
        let result = self.read(bytes, now);
        self.close_on_error(result)
    }

    /// Does everything due by `now`.
    ///
    /// # Errors
    /// [`SessionError`]: the session is over.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        let result = match self.phase {
            Phase::AwaitingWelcome { until } if now >= until => Err(SessionError::HandshakeTimeout),
            Phase::AwaitingWelcome { .. } | Phase::Closed => Ok(()),
            Phase::Established => self.channel.handle_timeout(now).map(|silent| {
                if silent {
                    self.events.push_back(AgentEvent::Silent);
                }
            }),
        };
        self.close_on_error(result)
    }

    /// Returns the next time at which to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.phase {
            Phase::AwaitingWelcome { until } => Some(until),
            Phase::Established => Some(self.channel.liveness().timeout()),
            Phase::Closed => None,
        }
    }

    /// Returns the next bytes for the control stream.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        self.channel.poll_transmit()
    }

    /// Returns the next event.
    pub fn poll_event(&mut self) -> Option<AgentEvent> {
        self.events.pop_front()
    }

    /// Offers these claims in place of the earlier ones. Before the Welcome the offer waits for it.
    ///
    /// # Errors
    /// [`SessionError::Unsendable`] if the offer does not fit into a message; the session goes on.
    /// [`SessionError::Backlog`].
    pub fn offer(&mut self, claims: Vec<Claim>) -> Result<(), SessionError> {
        self.channel.send(Message::Routes(Routes {
            offer: Some(to_offer(&claims)),
        }))
    }

    /// Announces to the server that the agent drains: new streams should use other agents, and open
    /// ones may go on for `deadline`.
    ///
    /// # Errors
    /// [`SessionError::Backlog`].
    pub fn drain(&mut self, deadline: Duration, reason: CloseReason) -> Result<(), SessionError> {
        self.channel.drain(deadline, reason)
    }

    /// Sends statistics of the agent.
    ///
    /// # Errors
    /// [`SessionError::Backlog`].
    pub fn statistics(&mut self, statistics: Statistics) -> Result<(), SessionError> {
        self.channel.send(Message::Statistics(statistics))
    }

    /// Requests another certificate, with a PKCS #10 of at most
    /// [`MAX_CSR`](crate::certificate::MAX_CSR) bytes. A server of an earlier release does not
    /// answer.
    ///
    /// # Errors
    /// [`SessionError::Backlog`].
    pub fn request_certificate(&mut self, csr: Vec<u8>) -> Result<(), SessionError> {
        self.channel
            .send(Message::CertificateRequest(CertificateRequest { csr }))
    }

    /// Notes a new stream or moved bytes: for a while the session detects silence sooner.
    pub fn note_traffic(&mut self, now: Instant) {
        self.channel.note_traffic(now);
    }

    /// Returns the smoothed round-trip time of Pings; `None` before the first answer.
    #[must_use]
    pub fn rtt(&self) -> Option<Duration> {
        self.channel.liveness().rtt()
    }

    /// Returns the time of the server's last life sign.
    #[must_use]
    pub fn last_heard(&self) -> Instant {
        self.channel.liveness().last_heard()
    }

    fn read(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), SessionError> {
        if bytes.is_empty() || matches!(self.phase, Phase::Closed) {
            return Ok(());
        }
        if self.channel.heard(now) {
            self.events.push_back(AgentEvent::Alive);
        }
        while let Some(message) = self.channel.receive(&mut bytes)? {
            self.handle_message(message, now)?;
        }
        Ok(())
    }

    fn handle_message(&mut self, message: Message, now: Instant) -> Result<(), SessionError> {
        match (&self.phase, message) {
            (Phase::AwaitingWelcome { .. }, Message::Welcome(welcome)) => {
                let welcome = Welcome::try_from(welcome)?;
                self.channel.establish(welcome.heartbeat, now);
                self.phase = Phase::Established;
                self.events.push_back(AgentEvent::Welcomed(welcome));
            }
            (Phase::Established, Message::RoutesVerdict(verdict)) => {
                let (accepted, refused) = from_verdict(verdict)?;
                self.events
                    .push_back(AgentEvent::Verdict { accepted, refused });
            }
            (Phase::Established, Message::CertificateAnswer(answer)) => {
                let answer = from_answer(answer).map_err(|error| SessionError::Invalid {
                    message: "CertificateAnswer",
                    error,
                })?;
                self.events.push_back(AgentEvent::Certificate(answer));
            }
            (Phase::Established, Message::Ping(ping)) => self.channel.handle_ping(ping)?,
            (Phase::Established, Message::Pong(pong)) => self.channel.handle_pong(pong, now),
            (Phase::Established, Message::Drain(drain)) => {
                let (deadline, reason) = from_drain(drain, now);
                self.events
                    .push_back(AgentEvent::Draining { deadline, reason });
            }
            (Phase::Established, Message::NoMoreStreams(streams)) => {
                self.events
                    .push_back(AgentEvent::NoMoreStreams(streams.opened));
            }
            (_, message) => return Err(SessionError::OutOfTurn(message_name(&message))),
        }
        Ok(())
    }

    fn close_on_error(&mut self, result: Result<(), SessionError>) -> Result<(), SessionError> {
        if result.is_err() {
            self.phase = Phase::Closed;
        }
        result
    }
}
