//! An accepted tunnel of any kind, from its handshake to its end: the identity of the agent, the session,
//! and what remains to do afterwards.

use std::cell::{OnceCell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::Instrument;
use tunnel_proto::close::CloseReason;
use tunnel_proto::session::{ServerSession, Timers};

use super::registration::unregister;
use super::session;
use super::tunnel::{Opened, TunnelLink};
use crate::handshakes::HandshakeFailure;
use crate::loads::LoadPermit;
use crate::resumption::settle;
use crate::routes::{LinkInfo, Trust};
use crate::shard::Shard;
use cpc_host::report::report;
use cpc_host::source_limiter::HandshakePermit;
use cpc_identity::revoked::Peer;
use cpc_observe::audit::events::{self as audit, Listener};
use cpc_session::Bounds;
use cpc_transport::control_stream::{ControlStream, Shared};
use cpc_transport::tunnel::{Connection, Recv, Send, Tunnel, TunnelError, TunnelSend};

/// Timeout for a peer to show its certificate and open its control stream.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves one agent at `remote` from its handshake, which `accepting` does, to its last packet. Until its session
/// ends it is `counted` on this shard.
pub(super) async fn serve(
    shard: Rc<Shard>,
    remote: SocketAddr,
    accepting: impl Future<Output = Result<Connection, TunnelError>>,
    (under_way, counted): (HandshakePermit, LoadPermit),
) {
    let Some((connection, stream)) = handshake(&shard, remote, accepting).await else {
        return;
    };
    drop(under_way);
    let identity = match connection.peer_identity() {
        Ok(identity) => identity,
        Err(error) => {
            shard.handshakes.failed(HandshakeFailure::Identity);
            tracing::warn!(%remote, error = report(&error), "agent refused");
            audit::peer_refused(Listener::Tunnel, remote, &error);
            connection.close(CloseReason::IdentityRefused, &error.to_string());
            return;
        }
    };
    let tenant = shard.tenants.of(&identity.trust_domain);
    connection.charge_to(&tenant.budget);
    let session = Shared::new(ServerSession::new(Timers::default(), Instant::now()));
    let mut control = ControlStream::new(session.clone(), stream);
    let info = LinkInfo::new(
        (shard.next_link(), shard.index),
        connection.kind(),
        (identity, Trust::Granted),
        connection.probe(),
    );
    let leaf = connection.peer_certificate();
    let peer = leaf.map(|leaf| Peer::of(&leaf)).unwrap_or_default();
    let peer = peer.known_as(&info.identity);
    let link = Rc::new(TunnelLink {
        peer,
        connection: connection.clone(),
        session,
        info,
        notices: OnceCell::new(),
        bounds: Arc::new(Bounds {
            bytes: shard.limits.session_bytes,
            window: shard.limits.stream_window.into(),
            budget: { &tenant.budget }.part(shard.limits.stalled_bytes_per_tunnel()),
            held: shard.metrics.sessions.held.clone(),
        }),
        place: RefCell::default(),
        opened: Opened::default(),
    });

    let span = tracing::debug_span!("session", agent = %link.info.identity);
    let (reason, why) = tokio::select! {
        end = session::run(&shard, &link, &mut control).instrument(span) => {
            (end.reason(), end.to_string())
        }
        revoked = shard.revocations.on_revocation(&link.peer) => {
            audit::cut("tunnel", connection.remote(), &revoked);
            (CloseReason::IdentityRefused, revoked.to_string())
        }
    };
    link.place.take();
    // At once: the next process of the agent may be about to come.
    drop(counted);
    if let Some(process) = link.info.process.get() {
        process.left(link.info.id);
    }
    unregister(&shard, &link.info).await;
    tracing::info!(
        agent = %link.info.identity, remote = %connection.remote(),
        reason = reason.label(), %why, "agent disconnected"
    );
    audit::agent_disconnected(&link.info.identity, reason);
    // The reason travels with the close. Without effect on a connection that is gone.
    connection.close(reason, &why);
    if let Some(notices) = link.notices.get() {
        notices.lose(reason);
        let reason = notices.lost().unwrap_or(reason);
        for state in notices.detach_orphans(reason) {
            settle(&shard, &link.info, reason, Box::new(state));
        }
    }
}

async fn handshake(
    shard: &Shard,
    remote: SocketAddr,
    accepting: impl Future<Output = Result<Connection, TunnelError>>,
) -> Option<(Connection, (Send, Recv))> {
    let accepted = async {
        let connection = accepting.await?;
        let mut stream = connection.accept().await?;
        // Before the streams of dials: a heartbeat must not wait for them.
        stream.0.go_first();
        Ok((connection, stream))
    };
    match timeout(HANDSHAKE_TIMEOUT, accepted).await {
        Ok(Ok(accepted)) => return Some(accepted),
        Ok(Err(error)) => failed(shard, remote, &error),
        Err(_) => {
            shard.handshakes.failed(HandshakeFailure::Timeout);
            let seconds = HANDSHAKE_TIMEOUT.as_secs();
            tracing::warn!(%remote, seconds, "handshake not finished in time");
            audit::peer_refused(
                Listener::Tunnel,
                remote,
                &io::Error::from(io::ErrorKind::TimedOut),
            );
        }
    }
    None
}

/// Counts and logs a failed handshake.
fn failed(shard: &Shard, remote: SocketAddr, error: &TunnelError) {
    if error.reason() == CloseReason::DuplicateServer {
        // It holds a tunnel to us already, and looks for our peers behind the same address.
        tracing::debug!(%remote, "declined by the agent");
    } else if let Some(why) = error.peer_text() {
        // An agent that found our certificate wanting, or changed its mind.
        shard.handshakes.failed(HandshakeFailure::Peer);
        tracing::info!(%remote, %why, "handshake given up by the peer");
    } else {
        shard.handshakes.failed(HandshakeFailure::Tls);
        tracing::warn!(%remote, error = report(error), "handshake failed");
        audit::peer_refused(Listener::Tunnel, remote, error);
    }
}
