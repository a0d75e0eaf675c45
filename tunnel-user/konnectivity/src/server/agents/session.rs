//! The session with one agent: drives its state machine, and reports the agent's state to the control
//! task.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::coop;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::Instrument;
use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::metadata::{HALVES, SERVER_COUNT, SERVER_ID};
use tunnel_proto::konnectivity::server_end::{ServerEnd, StreamError};
use tunnel_proto::session::InstanceId;

use super::link::{AgentNews, KonnectivityLink};
use super::path::probe;
use super::peer::{Context, Peer};
use super::server_ids::{NoPlace, Taken};
use super::who::{Introduction, MAX_SHOWN, Refusal};
use crate::grpc::server::Call;
use crate::grpc::{Code, PacketReceiver, Status, StreamEnd};
use crate::metrics::Service;
use cpc_config::TunnelKind;
use cpc_host::lifecycle::Phase;
use cpc_identity::{Identity, revoked};
use cpc_observe::audit::events::{self as audit, Listener};
use cpc_server::extension::HandshakeFailure;
use cpc_server::routes::LinkInfo;

/// Timeout of an agent's first answer.
const FIRST_ANSWER: Duration = Duration::from_secs(10);

/// Time for the last packets to an agent.
const GOODBYE: Duration = Duration::from_millis(500);

/// Reason why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    /// The agent ended it in order.
    #[error("the agent ended its stream")]
    Left,
    /// The stream is gone.
    #[error(transparent)]
    Stream(#[from] StreamEnd),
    /// The state machine failed.
    #[error(transparent)]
    Machine(#[from] StreamError),
    /// The agent never answered.
    #[error("the agent did not answer within {} s", FIRST_ANSWER.as_secs())]
    Unanswered,
    /// This server ended it.
    #[error("{0}")]
    Told(CloseReason),
    /// The agent is revoked.
    #[error(transparent)]
    Revoked(#[from] revoked::Revoked),
}

impl End {
    fn reason(&self) -> CloseReason {
        match self {
            Self::Left => CloseReason::LinkLost,
            Self::Stream(StreamEnd::Reset(_)) => CloseReason::LinkLost,
            Self::Stream(end) => end.reason(),
            Self::Machine(error) => error.reason(),
            Self::Unanswered => CloseReason::HandshakeTimeout,
            Self::Told(reason) => *reason,
            Self::Revoked(_) => CloseReason::IdentityRefused,
        }
    }
}

impl End {
    /// Returns the failure, where the agent had not answered once; `None` if the agent left.
    fn before_its_first_answer(&self) -> Option<HandshakeFailure> {
        match self {
            Self::Left | Self::Stream(_) => None,
            Self::Revoked(_) => Some(HandshakeFailure::Identity),
            Self::Machine(_) | Self::Unanswered | Self::Told(_) => Some(HandshakeFailure::Timeout),
        }
    }
}

/// Serves one call of an agent, from its headers to its end.
pub(super) async fn serve(agents: Rc<Context>, peer: Rc<Peer>, call: Call) {
    let _open = agents.acceptor.metrics.rpc(Service::Connect);
    let remote = peer.remote;
    let (introduction, identity) = match introduce(&agents, &peer, &call).await {
        Ok(introduced) => introduced,
        Err(refusal) => {
            agents
                .acceptor
                .handshakes
                .failed(HandshakeFailure::Identity);
            tracing::warn!(%remote, error = cpc_host::report::report(&refusal), "agent refused");
            audit::peer_refused(Listener::Konnectivity, remote, &refusal);
            return call.refuse(&Status::new(Code::UNKNOWN, refusal.to_string()));
        }
    };
    let admitted = admit(&agents, &identity, introduction.instance());
    let server_id = match admitted {
        Ok(server_id) => server_id,
        Err(status) => {
            agents
                .acceptor
                .handshakes
                .failed(HandshakeFailure::Overload);
            tracing::warn!(%remote, agent = %identity, error = status.to_string(), "agent refused");
            return call.refuse(&status);
        }
    };
    peer.is_known();
    let count = servers(&agents).to_string();
    let mut metadata = vec![(SERVER_ID, server_id.id()), (SERVER_COUNT, &*count)];
    let halves = call.metadata(HALVES).eq(["1"]);
    if halves {
        metadata.push((HALVES, "1"));
    }
    let Ok((sender, receiver)) = call.accept(&metadata) else {
        // It has gone meanwhile.
        return;
    };

    let shard = &agents.shard;
    let info = shard.new_link(
        TunnelKind::Konnectivity,
        (identity, agents.acceptor.trust),
        probe(remote, &peer.socket),
    );
    let mut session = Session {
        agents: &agents,
        link: KonnectivityLink::new(info, agents.acceptor.metrics.clone(), halves),
        introduction: &introduction,
        server_id: &server_id,
        peer: &peer,
        registered: false,
    };
    let span = tracing::debug_span!("session", agent = %session.link.info.identity);
    let outbox = session.link.outbox.clone();
    let mut sending = pin!(outbox.drive(sender));
    let known = known(&peer, &session.link.info.identity);
    let replaced = session.link.info.clone();
    let served = async {
        tokio::select! {
            end = &mut sending => (End::Stream(end), true),
            why = shard.revocations().on_revocation(&known) => {
                audit::cut("tunnel", remote, &why);
                (End::Revoked(why), false)
            }
            () = replaced.replaced.notified() => (End::Told(CloseReason::Replaced), false),
            end = session.listen(receiver) => (end, false),
        }
    };
    let (end, sent) = served.instrument(span).await;
    // What we ended looks from either side as if the stream had.
    let end = session.link.closed().map_or(end, End::Told);
    session.end(&end).await;
    if !sent {
        // The reason travels with the end.
        let _ = timeout(GOODBYE, sending).await;
    }
}

/// Determines the identity of the caller.
async fn introduce(
    agents: &Context,
    peer: &Peer,
    call: &Call,
) -> Result<(Introduction, Identity), Refusal> {
    let introduction = Introduction::read(call)?;
    let identity = introduction
        .identity(
            &agents.acceptor.proof,
            peer.certificate.as_ref(),
            &agents.acceptor.tenant,
        )
        .await?;
    agents.shard.revocations().check(&known(peer, &identity))?;
    Ok((introduction, identity))
}

/// Returns the peer, for the list of revoked peers.
fn known(peer: &Peer, identity: &Identity) -> revoked::Peer {
    let leaf = peer.certificate.as_ref();
    leaf.map(revoked::Peer::of)
        .unwrap_or_default()
        .known_as(identity)
}

/// Gives an agent its place.
///
/// # Errors
/// The status of the refusal.
fn admit(agents: &Context, identity: &Identity, instance: InstanceId) -> Result<Taken, Status> {
    let shard = &agents.shard;
    if *shard.phase().borrow() == Phase::Ended {
        return Err(Status::new(Code::UNAVAILABLE, "the server is ending"));
    }
    let full = |text: String| Status::new(Code::RESOURCE_EXHAUSTED, text);
    let taken = agents.acceptor.ids.take(identity, instance, || {
        shard.admit_agent(&identity.trust_domain)
    });
    taken.map_err(|none| match none {
        NoPlace::Agents(limit) => full(limit),
        NoPlace::Streams => full("this agent has too many streams to this server".into()),
    })
}

/// Returns the number of servers that an agent sees.
fn servers(agents: &Context) -> u64 {
    u64::from(agents.shard.server_count()) * agents.acceptor.ids.len() as u64
}

struct Session<'a> {
    agents: &'a Context,
    link: Rc<KonnectivityLink>,
    introduction: &'a Introduction,
    server_id: &'a Taken,
    peer: &'a Peer,
    registered: bool,
}

impl Session<'_> {
    /// Receives packets until the stream ends, or this server ends it.
    async fn listen(&mut self, mut receiver: PacketReceiver) -> End {
        let link = self.link.clone();
        let tenant = &link.info.identity.trust_domain;
        receiver.charge_to(self.agents.shard.budget(tenant));
        let opened = Instant::now();
        loop {
            if let Some(reason) = link.closed() {
                return End::Told(reason);
            }
            // One that says much gives way to its neighbours on the shard.
            coop::consume_budget().await;
            let wants_packets = link.look(ServerEnd::wants_packets);
            let mut due = Instant::from(link.look(ServerEnd::poll_timeout));
            if !self.registered {
                due = due.min(opened + FIRST_ANSWER);
            }
            let done = tokio::select! {
                biased;
                packet = receiver.next(), if wants_packets => match packet {
                    Ok(Some(packet)) => {
                        link.received.packet(&packet);
                        link.step(|end, now| {
                            end.handle_packet(packet, now)?;
                            // What is due does not wait for a pause between packets.
                            match end.poll_timeout() <= now {
                                true => end.handle_timeout(now),
                                false => Ok(()),
                            }
                        })
                    }
                    Ok(None) => return End::Left,
                    Err(end) => return End::Stream(end),
                },
                () = link.changed.notified() => Ok(()),
                () = sleep_until(due) => link.step(|end, now| end.handle_timeout(now)),
            };
            if let Err(error) = done {
                return error.into();
            }
            while let Some(news) = link.news() {
                if let Err(end) = self.tell(news).await {
                    return end;
                }
            }
            if !self.registered && opened.elapsed() >= FIRST_ANSWER {
                return End::Unanswered;
            }
        }
    }

    /// Reports the agent's state.
    async fn tell(&mut self, news: AgentNews) -> Result<(), End> {
        let info = &self.link.info;
        let shard = &self.agents.shard;
        match news {
            AgentNews::Alive if !self.registered => return self.register().await,
            AgentNews::Alive => {
                shard.set_silent(info, false);
            }
            AgentNews::Silent => {
                shard.set_silent(info, true);
            }
            AgentNews::Draining => {
                if !shard.set_draining(info) {
                    return Ok(());
                }
            }
        }
        if self.registered {
            shard.changed(info).await;
        }
        Ok(())
    }

    /// Registers the agent after its first answer: it can be dialled on.
    async fn register(&mut self) -> Result<(), End> {
        let Self {
            link, introduction, ..
        } = self;
        let shard = &self.agents.shard;
        let info: &Arc<LinkInfo> = &link.info;
        self.registered = true;
        let offer = introduction.identifiers.claims();
        let offered = offer.len();
        let instance = introduction.instance();
        let registered = shard.register(info, link.clone(), instance, offer);
        let Some(verdict) = registered.await else {
            return Err(End::Told(CloseReason::Shutdown));
        };
        if let Some(first) = introduction.unusable.first() {
            tracing::warn!(
                agent = %info.identity, unusable = introduction.unusable.len(), why = %first,
                "identifiers that can't be used are left out"
            );
        }
        let agent_id = introduction.agent_id.escape_debug().take(MAX_SHOWN);
        let agent_id: String = agent_id.collect();
        tracing::info!(
            agent = %info.identity, agent_id,
            remote = %self.peer.remote, server_id = self.server_id.id(), offered,
            accepted = verdict.accepted.len(), "agent of Konnectivity connected"
        );
        let (remote, accepted) = (self.peer.remote, verdict.accepted.len());
        audit::agent_connected(&info.identity, remote, info.kind.label(), accepted);
        Ok(())
    }

    /// Ends the connections on the link, and removes it everywhere.
    async fn end(&mut self, end: &End) {
        let info = &self.link.info;
        let reason = end.reason();
        self.link.close(reason);
        if !self.registered {
            return self.never_came(end);
        }
        let shard = &self.agents.shard;
        shard.unregister(info).await;
        tracing::info!(
            agent = %info.identity, remote = %self.peer.remote, server_id = self.server_id.id(),
            reason = reason.label(), why = %end, "agent disconnected"
        );
        audit::agent_disconnected(&info.identity, reason);
    }

    /// Logs that an agent was admitted and never served.
    fn never_came(&self, end: &End) {
        let (agent, remote) = (&self.link.info.identity, self.peer.remote);
        let Some(why) = end.before_its_first_answer() else {
            return tracing::debug!(%agent, %remote, why = %end, "agent never came");
        };
        self.agents.acceptor.handshakes.failed(why);
        tracing::warn!(%agent, %remote, why = %end, "agent dropped: it never answered");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_that_never_answers_is_a_failure_and_one_that_leaves_is_none() {
        for (end, failure) in [
            (End::Unanswered, Some(HandshakeFailure::Timeout)),
            (
                End::Machine(StreamError::Flood),
                Some(HandshakeFailure::Timeout),
            ),
            (
                End::Told(CloseReason::Replaced),
                Some(HandshakeFailure::Timeout),
            ),
            (End::Left, None),
            (End::Stream(StreamEnd::Closed), None),
        ] {
            assert_eq!(end.before_its_first_answer(), failure, "{end}");
        }
    }
}
