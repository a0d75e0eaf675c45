//! Native tunnels, of every kind that our protocol runs over: introduce the agent to a server that was
//! reached, and serve the streams that it opens.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::future::LocalBoxFuture;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tunnel_proto::close::CloseReason;
use tunnel_proto::control::VERSION;
use tunnel_proto::session::{
    AgentEvent, AgentSession, HOLDS_SESSIONS, Hello, InstanceId, SERVES_WHILE_DRAINING,
    SessionError, Timers,
};

use super::arrivals::Arrivals;
use super::dial_target::DialTarget;
use super::handover::Stage;
use super::plan::{ServerEndpoint, ServerInfo};
use super::renew::Request;
use super::server_stream::{self, Carrier};
use super::sessions::ServerProcess;
use super::stats::TunnelStats;
use super::tunnel::{BoxError, EstablishedTunnel, GOODBYE, LOOK_INTERVAL, ServerTunnel};
use super::tunnel_info::{TunnelEnd, TunnelInfo};
use super::worker::Worker;
use cpc_host::concurrency::Permit;
use cpc_host::lifecycle::Phase;
use cpc_identity::Identity;
use cpc_identity::identity::IdentityError;
use cpc_identity::revoked::Peer;
use cpc_observe::audit::events as audit;
use cpc_session::Notices;
use cpc_transport::control_stream::{ControlEnd, ControlStream, Shared};
use cpc_transport::tunnel::{Connection, Probe, Tunnel as _, TunnelError, TunnelSend};

/// Timeout of the control stream, which is opened right behind the handshake.
const STREAM_TIMEOUT: Duration = Duration::from_secs(3);

/// Drain time announced for a tunnel that ends with its last stream.
const RETIREMENT: Duration = Duration::from_secs(24 * 3600);

/// Drain time announced for a handover.
const SUCCESSION: Duration = Duration::from_secs(5);

/// Polling interval of a tunnel whose connections are about to be handed over.
const READY_LOOK: Duration = Duration::from_millis(2);

/// Polling interval of an ending tunnel for the acknowledgement of its streams' ends.
const ARRIVAL_LOOK: Duration = Duration::from_millis(10);

/// Reason why an agent was not welcomed by a server that it reached.
#[derive(Debug, thiserror::Error)]
enum IntroductionError {
    /// The tunnel was lost.
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    /// The server permits no control stream.
    #[error("the server allows no control stream")]
    NoStream,
    /// The identity in the server's certificate is invalid, although the verifier accepted it.
    #[error("the server's certificate has no identity: {0}")]
    Identity(IdentityError),
    /// The server claims another id than its certificate has.
    #[error("the server {identity} claims to be {claimed}: refused")]
    Impostor {
        /// Identity in the certificate.
        identity: Identity,
        /// Claimed id.
        claimed: String,
    },
    /// The session failed.
    #[error(transparent)]
    Control(#[from] ControlEnd),
    /// Our own first message can't be sent.
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl From<IdentityError> for IntroductionError {
    fn from(why: IdentityError) -> Self {
        Self::Identity(why)
    }
}

/// A server that was reached: it has shown its certificate.
pub(super) struct Reached {
    /// Connection to the server.
    pub connection: Connection,
    /// Completes when the last packets of the connection have left, after its end.
    pub departure: LocalBoxFuture<'static, ()>,
}

/// An established tunnel.
#[derive(Debug)]
struct Tunnel {
    info: TunnelInfo,
    /// Process of the server.
    server_instance: InstanceId,
    connection: Connection,
    session: Rc<Shared<AgentSession>>,
    carrier: Rc<Carrier>,
    arrivals: Arrivals,
}

/// An established tunnel that is not served yet, with the server's report.
struct Established {
    worker: Rc<Worker>,
    tunnel: Rc<Tunnel>,
    /// Number of servers.
    server_count: u32,
    control: ControlStream<AgentSession>,
    departure: LocalBoxFuture<'static, ()>,
    /// Counts the tunnel until all its connections outlive it.
    unready: Option<Permit>,
}

/// Introduces the agent to a server, if that is wanted. Returns `None` if it is not.
///
/// # Errors
/// The server does not welcome the agent, or the tunnel is lost.
pub(super) async fn establish(
    worker: &Rc<Worker>,
    target: &mut DialTarget,
    reached: Reached,
) -> Result<Option<Box<dyn EstablishedTunnel>>, BoxError> {
    let identity = reached.connection.peer_identity();
    let identity = identity.map_err(IntroductionError::from)?;
    if !target.is_wanted(identity.name.clone()).await {
        reached.decline(CloseReason::DuplicateServer).await;
        return Ok(None);
    }
    let endpoint = target.endpoint();
    let established = introduce(worker, endpoint, identity, reached).await?;
    Ok(Some(Box::new(established)))
}

/// Sends Hello and waits for Welcome.
async fn introduce(
    worker: &Rc<Worker>,
    endpoint: ServerEndpoint,
    identity: Identity,
    reached: Reached,
) -> Result<Established, IntroductionError> {
    let Reached {
        connection,
        departure,
    } = reached;
    // The server may use the tunnel as soon as it has the Hello.
    let unready = worker.handover.tunnel();
    let mut stream = timeout(STREAM_TIMEOUT, connection.open())
        .await
        .map_err(|_| IntroductionError::NoStream)??;
    // Before the streams of dials: a heartbeat must not wait for them.
    stream.0.go_first();
    let hello = Hello {
        version: VERSION,
        agent_id: worker.node.to_string(),
        instance_id: worker.instance,
        node: worker.node.to_string(),
        software_version: env!("CARGO_PKG_VERSION").into(),
        features: features(worker),
        offer: worker.offer(),
        predecessor: worker.predecessor,
        incarnation: worker.incarnation,
    };
    let session = Shared::new(AgentSession::new(hello, Timers::default(), Instant::now())?);
    let mut control = ControlStream::new(session.clone(), stream);
    let welcome = loop {
        if let AgentEvent::Welcomed(welcome) = control.next().await? {
            break welcome;
        }
    };
    if *identity.name != *welcome.server_id {
        let claimed = welcome.server_id;
        return Err(IntroductionError::Impostor { identity, claimed });
    }
    let info = TunnelInfo {
        server_id: welcome.server_id.as_str().into(),
        endpoint,
        stats: Arc::new(TunnelStats::new(&welcome.accepted, welcome.refused)),
    };
    let leaf = connection.peer_certificate();
    let peer = leaf.map(|leaf| Peer::of(&leaf)).unwrap_or_default();
    let server = ServerProcess {
        identity: identity.uri(),
        instance: welcome.instance_id,
        incarnation: welcome.incarnation,
        peer,
    };
    let server = Arc::new(server);
    worker.sessions.succeed(worker, &server, &info.stats);
    let probe = connection.probe();
    let carrier = Rc::new(Carrier {
        server_id: info.server_id.clone(),
        server,
        stats: info.stats.clone(),
        session: session.clone(),
        notices: Notices::new(move || probe.path().rtt),
        connection: connection.clone(),
    });
    let tunnel = Rc::new(Tunnel {
        info,
        server_instance: welcome.instance_id,
        connection,
        session,
        carrier,
        arrivals: Arrivals::default(),
    });
    Ok(Established {
        worker: worker.clone(),
        tunnel,
        server_count: welcome.server_count,
        control,
        departure,
        unready,
    })
}

/// Returns our abilities beyond the version's.
fn features(worker: &Worker) -> Vec<String> {
    let serves = Some(SERVES_WHILE_DRAINING);
    let holds = worker.sessions.are_held().then_some(HOLDS_SESSIONS);
    serves.into_iter().chain(holds).map(Into::into).collect()
}

impl Reached {
    async fn decline(self, reason: CloseReason) {
        self.connection.close(reason, reason.label());
        let _ = timeout(GOODBYE, self.departure).await;
    }
}

impl ServerTunnel for Tunnel {
    fn info(&self) -> &TunnelInfo {
        &self.info
    }

    fn probe(&self) -> Option<Probe> {
        Some(self.connection.probe())
    }

    /// Waits a little for the acknowledgement of streams' ends, and ends the tunnel: see [`farewell`].
    fn close(&self, reason: CloseReason) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            let heard = async {
                while self.connection.has_unacknowledged() {
                    sleep(ARRIVAL_LOOK).await;
                }
            };
            if reason == CloseReason::Draining {
                let _ = timeout(GOODBYE / 2, heard).await;
            }
            self.end(farewell(reason, self.connection.has_unacknowledged()));
        })
    }

    fn retire(self: Rc<Self>) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            let told = self.leave(RETIREMENT, CloseReason::Replaced);
            while told.is_ok() && self.is_in_use() {
                sleep(LOOK_INTERVAL).await;
            }
            self.end(CloseReason::Replaced);
        })
    }
}

impl EstablishedTunnel for Established {
    fn tunnel(&self) -> Rc<dyn ServerTunnel> {
        self.tunnel.clone()
    }

    fn server(&self) -> ServerInfo {
        ServerInfo {
            server: self.tunnel.info.server_id.clone(),
            instance: Some(self.tunnel.server_instance),
            server_count: self.server_count,
        }
    }

    fn decline(self: Box<Self>, reason: CloseReason) -> LocalBoxFuture<'static, ()> {
        Box::pin(async move {
            self.tunnel.end(reason);
            let _ = timeout(GOODBYE, self.departure).await;
        })
    }

    fn serve(self: Box<Self>, changed: Box<dyn Fn()>) -> LocalBoxFuture<'static, TunnelEnd> {
        Box::pin(async move {
            let (worker, tunnel) = (self.worker.clone(), self.tunnel.clone());
            tokio::select! {
                end = self.run(&changed) => TunnelEnd::new(end.reason(), end),
                end = tunnel.revoked(&worker) => end,
            }
        })
    }
}

impl Established {
    /// Serves the tunnel until it ends.
    async fn run(mut self, changed: &dyn Fn()) -> ControlEnd {
        let (worker, tunnel) = (self.worker.clone(), self.tunnel.clone());
        let mut serve = worker.serve.clone();
        let mut phase = worker.phase();
        let mut stage = worker.handover.subscribe();
        // A handover may have begun meanwhile.
        stage.mark_changed();
        let mut unready = self.unready.take();
        // A certificate that was asked for on this tunnel.
        let mut asked = None;
        let end = loop {
            tokio::select! {
                event = self.control.next() => match event {
                    Ok(AgentEvent::Certificate(answer)) => {
                        if let Some(asked) = asked.take() {
                            // The requester may have given up.
                            let answer = (tunnel.info.server_id.clone(), answer);
                            let _ = oneshot::Sender::send(asked, answer);
                        }
                    }
                    Ok(event) => tunnel.note(event, changed),
                    Err(end) => break end,
                },
                stream = tunnel.connection.accept() => match stream {
                    Ok(stream) => {
                        tunnel.session.note_traffic(Instant::now());
                        tunnel.arrivals.arrived();
                        let carrier = tunnel.carrier.clone();
                        let served = server_stream::serve(worker.clone(), carrier, stream);
                        tokio::task::spawn_local(served);
                    }
                    Err(error) => break error.into(),
                },
                moved = tunnel.info.stats.moved() => tunnel.carrier.move_away(&worker, &moved),
                request = worker.renewals.next() => {
                    let Request { csr, answer } = request;
                    asked = Some(answer);
                    if let Err(error) = tunnel.session.with(|s| s.request_certificate(csr)) {
                        break error.into();
                    }
                }
                Ok(()) = serve.changed() => {
                    serve.mark_unchanged();
                    if let Err(error) = tunnel.session.with(|s| s.offer(worker.offer())) {
                        break error.into();
                    }
                }
                Ok(()) = stage.changed() => match *stage.borrow_and_update() {
                    Stage::Serving => {}
                    Stage::Pausing => {
                        let reason = CloseReason::HandedOver;
                        if let Err(error) = tunnel.leave(SUCCESSION, reason) {
                            break error.into();
                        }
                    }
                    Stage::Left => tunnel.end(CloseReason::HandedOver),
                },
                () = sleep(READY_LOOK), if unready.is_some() && worker.handover.is_pausing() => {
                    // In this order: dials become sessions.
                    if tunnel.arrivals.are_over(Instant::now())
                        && !worker.handover.has_dials()
                        && tunnel.carrier.notices.unsafe_ones() == 0
                    {
                        unready = None;
                    }
                }
                Ok(()) = phase.changed() => {
                    let phase = *phase.borrow_and_update();
                    if let Phase::Draining(deadline) = phase {
                        let left = deadline.saturating_duration_since(Instant::now());
                        let drained = tunnel.session.with(|s| s.drain(left, CloseReason::Shutdown));
                        if let Err(error) = drained {
                            break error.into();
                        }
                    }
                }
            }
        };
        if let ControlEnd::Session(_) | ControlEnd::Closed = &end {
            tunnel.connection.close(end.reason(), &end.to_string());
        }
        tunnel.carrier.park_orphans(&worker, end.reason());
        let _ = timeout(GOODBYE, self.departure).await;
        end
    }
}

impl Tunnel {
    /// Tells the server that the agent leaves the tunnel, so that it opens no more streams.
    ///
    /// # Errors
    /// [`SessionError`].
    fn leave(&self, time: Duration, reason: CloseReason) -> Result<(), SessionError> {
        let rtt = self.connection.probe().path().rtt;
        self.arrivals.asked(Instant::now(), rtt);
        self.session.with(|s| s.drain(time, reason))
    }

    /// Returns `true` while streams are open, or still to come.
    fn is_in_use(&self) -> bool {
        let streams = &self.info.stats.streams;
        !self.arrivals.are_over(Instant::now()) || streams.load(Ordering::Relaxed) > 0
    }

    /// Ends the tunnel and everything on it.
    fn end(&self, reason: CloseReason) {
        self.connection.close(reason, reason.label());
    }

    /// Ends the tunnel when its server is revoked.
    async fn revoked(&self, worker: &Worker) -> TunnelEnd {
        let Some(material) = &worker.material else {
            return std::future::pending().await;
        };
        let leaf = self.connection.peer_certificate();
        let peer = leaf.map(|leaf| Peer::of(&leaf)).unwrap_or_default();
        let revoked = material.revocations().on_revocation(&peer).await;
        audit::cut("tunnel", self.info.endpoint.address, &revoked);
        let reason = CloseReason::IdentityRefused;
        self.end(reason);
        TunnelEnd::new(reason, revoked)
    }

    fn note(&self, event: AgentEvent, changed: &dyn Fn()) {
        let TunnelInfo {
            server_id, stats, ..
        } = &self.info;
        match event {
            AgentEvent::Silent => {
                tracing::warn!(server = %server_id, "server is silent");
                stats.silent.store(true, Ordering::Relaxed);
                changed();
            }
            AgentEvent::Alive => {
                tracing::info!(server = %server_id, "server is heard again");
                stats.silent.store(false, Ordering::Relaxed);
                changed();
            }
            AgentEvent::Draining { reason, .. } => {
                // A server may say so again and again.
                if !stats.draining.swap(true, Ordering::Relaxed) {
                    tracing::info!(server = %server_id, reason = reason.label(), "server is draining");
                    changed();
                }
            }
            AgentEvent::NoMoreStreams(opened) => self.arrivals.announced(opened),
            AgentEvent::Verdict { accepted, refused } => stats.set_verdict(&accepted, refused),
            AgentEvent::Welcomed(_) | AgentEvent::Certificate(_) => {}
        }
    }
}

/// Returns the reason with which a tunnel ends. With [`CloseReason::Draining`] the server takes each
/// dial without an answer for one that was not served, and asks another agent. That is wrong while an
/// answer or a reset may be lost with the tunnel.
fn farewell(reason: CloseReason, has_unacknowledged: bool) -> CloseReason {
    match reason {
        CloseReason::Draining if has_unacknowledged => CloseReason::Shutdown,
        reason => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dial_whose_answer_may_be_lost_is_not_called_unserved() {
        assert_eq!(farewell(CloseReason::Draining, true), CloseReason::Shutdown);
        assert_eq!(
            farewell(CloseReason::Draining, false),
            CloseReason::Draining
        );
        assert_eq!(farewell(CloseReason::Replaced, true), CloseReason::Replaced);
    }
}
