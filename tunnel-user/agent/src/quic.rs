//! One tunnel over QUIC: dial a server, send Hello, serve the streams that it opens.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;
use tunnel_proto::control::VERSION;
use tunnel_proto::session::{
    AgentEvent, AgentSession, Hello, InstanceId, SERVES_WHILE_DRAINING, SessionError, Timers,
};

use super::dialer;
use super::plan::ServerEndpoint;
use super::renew::Request;
use super::stats::TunnelStats;
use super::tunnel::{GOODBYE, LOOK_INTERVAL, TunnelInfo};
use super::worker::Worker;
use cpc_config::TunnelKind;
use cpc_host::host;
use cpc_host::lifecycle::Phase;
use cpc_identity::identity::IdentityError;
use cpc_identity::revoked::Peer;
use cpc_identity::{Identity, Material};
use cpc_transport::control_stream::{ControlEnd, ControlStream, Shared};
use cpc_transport::quic::config::{self, EndpointError, Setup};
use cpc_transport::quic::steering::Spread;
use cpc_transport::quic::{ConnectError, ConnectionError, Endpoint};
use cpc_transport::tunnel::{Connection, Probe, Tunnel as _, TunnelError, TunnelSend};

/// Timeout of a server's handshake, which is retried later.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// Drain time announced for a tunnel that ends with its last stream.
const RETIREMENT: Duration = Duration::from_secs(24 * 3600);

/// Polling interval of an ending tunnel for the acknowledgement of its streams' ends.
const ARRIVAL_LOOK: Duration = Duration::from_millis(10);

/// Reason why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// The socket can't be opened.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// quinn-proto refuses to dial.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The handshake failed.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The tunnel was lost.
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    /// The handshake timed out.
    #[error("no answer within {} s; is UDP let through?", HANDSHAKE_TIMEOUT.as_secs())]
    Timeout,
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

impl From<IdentityError> for DialError {
    fn from(why: IdentityError) -> Self {
        Self::Identity(why)
    }
}

/// An established tunnel.
#[derive(Debug)]
pub(super) struct Tunnel {
    /// Description of the tunnel.
    pub info: TunnelInfo,
    /// Process of the server.
    pub server_instance: InstanceId,
    connection: Connection,
    endpoint: Endpoint,
    session: Rc<Shared<AgentSession>>,
}

/// An established tunnel that is not served yet, with the server's report.
#[derive(Debug)]
pub(super) struct Dialled {
    /// The tunnel.
    pub tunnel: Rc<Tunnel>,
    /// Number of servers.
    pub server_count: u32,
    control: ControlStream<AgentSession>,
}

/// A server that has shown its certificate.
#[derive(Debug)]
pub(super) struct Reached {
    /// Identity in the certificate.
    pub identity: Identity,
    address: SocketAddr,
    connection: Connection,
    endpoint: Endpoint,
}

/// Dials `address`. `spread` selects one of the server's shards.
///
/// # Errors
/// [`DialError`].
pub(super) async fn reach(
    material: &Arc<Material>,
    setup: &Setup,
    address: SocketAddr,
    spread: (Spread, u8),
) -> Result<Reached, DialError> {
    let (opened, config) = config::client(address, material, spread, setup)?;
    host::warn_once(&opened.complaints);
    let endpoint = opened.endpoint;
    // Never checked: a server is known by its identity.
    let connecting = endpoint.connect(config, address, "cpc.invalid")?;
    let connected = timeout(HANDSHAKE_TIMEOUT, connecting).await;
    let connection = Connection::from(connected.map_err(|_| DialError::Timeout)??);
    Ok(Reached {
        identity: connection.peer_identity()?,
        address,
        connection,
        endpoint,
    })
}

impl Reached {
    /// Ends an unwanted connection.
    pub(super) async fn decline(self, reason: CloseReason) {
        decline(&self.connection, &self.endpoint, reason).await;
    }

    /// Sends Hello and waits for Welcome.
    ///
    /// # Errors
    /// [`DialError`].
    pub(super) async fn introduce(self, worker: &Worker) -> Result<Dialled, DialError> {
        let Self {
            identity,
            address,
            connection,
            endpoint,
        } = self;
        let mut stream = timeout(HANDSHAKE_TIMEOUT, connection.open())
            .await
            .map_err(|_| DialError::NoStream)??;
        // Before the streams of dials: a heartbeat must not wait for them.
        stream.0.go_first();
        let hello = Hello {
            version: VERSION,
            agent_id: worker.node.to_string(),
            instance_id: worker.instance,
            node: worker.node.to_string(),
            software_version: env!("CARGO_PKG_VERSION").into(),
            features: vec![SERVES_WHILE_DRAINING.into()],
            offer: worker.offer(),
            predecessor: worker.predecessor,
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
            return Err(DialError::Impostor { identity, claimed });
        }
        let server_count = welcome.server_count;
        let tunnel = Rc::new(Tunnel {
            info: TunnelInfo {
                server_id: welcome.server_id.as_str().into(),
                endpoint: ServerEndpoint {
                    address,
                    kind: TunnelKind::Quic,
                },
                stats: Arc::new(TunnelStats::new(&welcome.accepted, welcome.refused)),
            },
            server_instance: welcome.instance_id,
            connection,
            endpoint,
            session,
        });
        Ok(Dialled {
            tunnel,
            server_count,
            control,
        })
    }
}

async fn decline(connection: &Connection, endpoint: &Endpoint, reason: CloseReason) {
    connection.close(reason, reason.label());
    let _ = timeout(GOODBYE, endpoint.wait_idle()).await;
}

impl Tunnel {
    /// Returns the server, for the list of revoked peers.
    pub(super) fn peer(&self) -> Peer {
        let leaf = self.connection.peer_certificate();
        leaf.map(|leaf| Peer::of(&leaf)).unwrap_or_default()
    }

    /// Returns the path to the server.
    pub(super) fn probe(&self) -> Probe {
        self.connection.probe()
    }

    /// Ends the tunnel when its last stream has ended: another one replaced it while it was silent.
    pub(super) async fn retire(self: Rc<Self>) {
        let told = self
            .session
            .with(|s| s.drain(RETIREMENT, CloseReason::Replaced));
        while told.is_ok() && self.info.stats.streams.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        self.close(CloseReason::Replaced);
    }

    /// Waits a little for the acknowledgement of streams' ends, and ends the tunnel: see [`farewell`].
    pub(super) async fn close_when_heard(&self, reason: CloseReason) {
        let heard = async {
            while self.connection.has_unacknowledged() {
                tokio::time::sleep(ARRIVAL_LOOK).await;
            }
        };
        if reason == CloseReason::Draining {
            let _ = timeout(GOODBYE / 2, heard).await;
        }
        self.close(farewell(reason, self.connection.has_unacknowledged()));
    }

    /// Ends the tunnel and everything on it.
    pub(super) fn close(&self, reason: CloseReason) {
        self.connection.close(reason, reason.label());
    }
}

impl Dialled {
    /// Ends an unwanted tunnel, and tells the server.
    pub(super) async fn decline(self, reason: CloseReason) {
        decline(&self.tunnel.connection, &self.tunnel.endpoint, reason).await;
    }

    /// Serves the tunnel until it ends, and returns the reason. Calls `changed` when the server falls
    /// silent, is heard again, or drains.
    pub(super) async fn serve(mut self, worker: Rc<Worker>, changed: impl Fn()) -> ControlEnd {
        let tunnel = self.tunnel.clone();
        let mut serve = worker.serve.clone();
        let mut phase = worker.phase.clone();
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
                    Ok(event) => tunnel.note(event, &changed),
                    Err(end) => break end,
                },
                stream = tunnel.connection.accept() => match stream {
                    Ok(stream) => {
                        tunnel.session.note_traffic(Instant::now());
                        let who = (tunnel.info.server_id.clone(), tunnel.info.stats.clone());
                        let served = dialer::serve(worker.clone(), who, stream);
                        tokio::task::spawn_local(served);
                    }
                    Err(error) => break error.into(),
                },
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
        let _ = timeout(GOODBYE, tunnel.endpoint.wait_idle()).await;
        end
    }
}

impl Tunnel {
    fn note(&self, event: AgentEvent, changed: &impl Fn()) {
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
