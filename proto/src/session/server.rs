//! The server's end of a session.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::SessionError;
use super::control_channel::{ControlChannel, from_drain};
use super::liveness::Timers;
use super::message::{Hello, Refusal, Welcome, from_routes, message_name, verdict};
use crate::certificate::{Answer, from_request};
use crate::close::CloseReason;
use crate::control::envelope::Message;
use crate::control::{NoMoreStreams, Statistics};
use crate::route::Claim;

/// Event for a server's driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerEvent {
    /// The agent introduced itself. Once, before any other event; to be answered with
    /// [`welcome`](ServerSession::welcome) or [`refuse`](ServerSession::refuse).
    Hello(Hello),
    /// The agent offers these in place of its last offer; to be answered with
    /// [`verdict`](ServerSession::verdict).
    Offer(Vec<Claim>),
    /// Statistics of the agent.
    Statistics(Statistics),
    /// The agent requests another certificate, with this PKCS #10; answer with
    /// [`certificate`](ServerSession::certificate).
    CertificateRequest(Vec<u8>),
    /// The agent has been silent for too long.
    Silent,
    /// The silent agent has sent again.
    Alive,
    /// The agent is about to leave: dials should go elsewhere where they can.
    Draining {
        /// Time at which the agent closes the remaining streams.
        deadline: Instant,
        /// Reason of the drain.
        reason: CloseReason,
    },
}

/// The server's end of a session; see the [module](super) for how to drive it.
#[derive(Debug)]
pub struct ServerSession {
    phase: Phase,
    channel: ControlChannel,
    events: VecDeque<ServerEvent>,
}

#[derive(Debug)]
enum Phase {
    AwaitingHello {
        until: Instant,
    },
    /// The driver has the Hello.
    Deciding,
    Established,
    Closed,
}

impl ServerSession {
    /// Creates a session that waits for the agent's Hello.
    #[must_use]
    pub fn new(timers: Timers, now: Instant) -> Self {
        Self {
            phase: Phase::AwaitingHello {
                until: now + timers.hello_timeout,
            },
            channel: ControlChannel::new(timers, now),
            events: VecDeque::new(),
        }
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
            Phase::AwaitingHello { until } if now >= until => Err(SessionError::HandshakeTimeout),
            Phase::AwaitingHello { .. } | Phase::Deciding | Phase::Closed => Ok(()),
            Phase::Established => self.channel.handle_timeout(now).map(|silent| {
                if silent {
                    self.events.push_back(ServerEvent::Silent);
                }
            }),
        };
        self.close_on_error(result)
    }

    /// Returns the next time at which to call [`handle_timeout`](Self::handle_timeout).
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        match self.phase {
            Phase::AwaitingHello { until } => Some(until),
            Phase::Established => Some(self.channel.liveness().timeout()),
            Phase::Deciding | Phase::Closed => None,
        }
    }

    /// Returns the next bytes for the control stream.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        self.channel.poll_transmit()
    }

    /// Returns the next event.
    pub fn poll_event(&mut self) -> Option<ServerEvent> {
        self.events.pop_front()
    }

    /// Takes the agent in. Does nothing unless a Hello waits for its answer.
    ///
    /// # Errors
    /// [`SessionError::Unsendable`] if the accepted claims do not fit into a message; the Hello
    /// still waits.
    pub fn welcome(&mut self, welcome: Welcome, now: Instant) -> Result<(), SessionError> {
        if matches!(self.phase, Phase::Deciding) {
            self.channel
                .introduce(Message::Welcome((&welcome).into()))?;
            self.channel.establish(Duration::ZERO, now);
            self.phase = Phase::Established;
        }
        Ok(())
    }

    /// Ends the session, and gives the error to close the connection with.
    pub fn refuse(&mut self, reason: CloseReason, text: impl Into<String>) -> SessionError {
        self.phase = Phase::Closed;
        SessionError::Refused {
            reason,
            text: text.into(),
        }
    }

    /// Answers the oldest unanswered [`ServerEvent::Offer`].
    ///
    /// # Errors
    /// [`SessionError::Unsendable`] if the accepted claims do not fit into a message; the session
    /// goes on. [`SessionError::Backlog`].
    pub fn verdict(
        &mut self,
        accepted: Vec<Claim>,
        refused: Vec<Refusal>,
    ) -> Result<(), SessionError> {
        self.channel
            .send(Message::RoutesVerdict(verdict(&accepted, &refused)))
    }

    /// Answers the oldest unanswered [`ServerEvent::CertificateRequest`].
    ///
    /// # Errors
    /// [`SessionError::Unsendable`] if the certificates do not fit into a message; the session goes
    /// on. [`SessionError::Backlog`].
    pub fn certificate(&mut self, answer: &Answer) -> Result<(), SessionError> {
        self.channel.send(Message::CertificateAnswer(answer.into()))
    }

    /// Announces to the agent that the server drains: open streams may go on for `deadline`. Before
    /// the Welcome the message waits for it.
    ///
    /// # Errors
    /// [`SessionError::Backlog`].
    pub fn drain(&mut self, deadline: Duration, reason: CloseReason) -> Result<(), SessionError> {
        self.channel.drain(deadline, reason)
    }

    /// Tells the agent that the server opens no more streams, after `opened` ones.
    ///
    /// # Errors
    /// [`SessionError::Backlog`].
    pub fn no_more_streams(&mut self, opened: u64) -> Result<(), SessionError> {
        self.channel
            .send(Message::NoMoreStreams(NoMoreStreams { opened }))
    }

    /// Notes a new stream or moved bytes: for a while the session detects silence sooner.
    pub fn note_traffic(&mut self, now: Instant) {
        self.channel.note_traffic(now);
    }

    /// Requests a life sign of the agent at once. [`ServerEvent::Silent`] follows unless one comes
    /// within `limit`, or within three round trips where these take longer. Without effect before
    /// the Welcome.
    pub fn challenge(&mut self, limit: Duration, now: Instant) {
        if matches!(self.phase, Phase::Established) {
            self.channel.challenge(limit, now);
        }
    }

    /// Returns the smoothed round-trip time of Pings; `None` before the first answer.
    #[must_use]
    pub fn rtt(&self) -> Option<Duration> {
        self.channel.liveness().rtt()
    }

    /// Returns the time of the agent's last life sign.
    #[must_use]
    pub fn last_heard(&self) -> Instant {
        self.channel.liveness().last_heard()
    }

    fn read(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), SessionError> {
        if bytes.is_empty() || matches!(self.phase, Phase::Closed) {
            return Ok(());
        }
        if self.channel.heard(now) {
            self.events.push_back(ServerEvent::Alive);
        }
        while let Some(message) = self.channel.receive(&mut bytes)? {
            self.handle_message(message, now)?;
        }
        Ok(())
    }

    fn handle_message(&mut self, message: Message, now: Instant) -> Result<(), SessionError> {
        match (&self.phase, message) {
            (Phase::AwaitingHello { .. }, Message::Hello(hello)) => {
                let hello = Hello::try_from(hello)?;
                self.phase = Phase::Deciding;
                self.events.push_back(ServerEvent::Hello(hello));
            }
            (Phase::Established, Message::Routes(routes)) => {
                self.events
                    .push_back(ServerEvent::Offer(from_routes(routes)?));
            }
            (Phase::Established, Message::Statistics(statistics)) => {
                self.events.push_back(ServerEvent::Statistics(statistics));
            }
            (Phase::Established, Message::CertificateRequest(request)) => {
                let csr = from_request(request).map_err(|error| SessionError::Invalid {
                    message: "CertificateRequest",
                    error,
                })?;
                self.events.push_back(ServerEvent::CertificateRequest(csr));
            }
            (Phase::Established, Message::Ping(ping)) => self.channel.handle_ping(ping)?,
            (Phase::Established, Message::Pong(pong)) => self.channel.handle_pong(pong, now),
            (Phase::Established, Message::Drain(drain)) => {
                let (deadline, reason) = from_drain(drain, now);
                self.events
                    .push_back(ServerEvent::Draining { deadline, reason });
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
