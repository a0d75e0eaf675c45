//! Acceptance of tunnels: handshakes, their bounds, and the identities of agents.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};
use tracing::Instrument;
use tunnel_proto::close::CloseReason;
use tunnel_proto::session::{ServerSession, Timers};

use super::{QuicLink, session};
use crate::handshakes::HandshakeFailure;
use crate::limits::Limit;
use crate::loads::{LoadPermit, ReservedLoad};
use crate::routes::{LinkInfo, Path, Probe, Trust};
use crate::shard::Shard;
use cpc_config::TunnelKind;
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_host::lifecycle::Phase;
use cpc_host::report::report;
use cpc_host::source_limiter::{HandshakePermit, Overload, Verdict};
use cpc_identity::revoked::Peer;
use cpc_observe::audit::events::{self as audit, Listener};
use cpc_transport::control_stream::{ControlStream, Shared};
use cpc_transport::quic::{
    Connection, ConnectionError, Endpoint, Incoming, Recv, Send, error_code, link_reason,
    peer_identity,
};

/// Timeout for a peer to show its certificate and open its control stream.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for which a newcomer that was sent to another shard counts there: it comes within a round trip.
const ON_ITS_WAY: Duration = Duration::from_secs(1);

/// Maximum number of newcomers that count on other shards at once: first packets from forged addresses
/// are among them.
const MAX_ON_THEIR_WAY: usize = 1024;

/// Accepts tunnels without end.
pub(crate) async fn accept(shard: Rc<Shard>, endpoint: Endpoint) {
    let moving = ConcurrencyLimit::new(MAX_ON_THEIR_WAY);
    while let Some(incoming) = endpoint.accept().await {
        if *shard.phase.borrow() == Phase::Ended {
            // Agents look elsewhere, and here again for our successor.
            incoming.refuse();
            continue;
        }
        let remote = incoming.remote_address();
        match shard.handshakes.judge(remote.ip(), !incoming.may_retry()) {
            Verdict::Enter(place) => match elsewhere(&shard, &incoming, &moving) {
                Some(moved) => send_on(&shard, incoming, moved, Some(place)),
                None => {
                    place.charge(Instant::now());
                    let counted = shard.loads.enter(shard.index);
                    tokio::task::spawn_local(serve(shard.clone(), incoming, (place, counted)));
                }
            },
            // By a Retry (RFC 9000 section 8.1.2).
            Verdict::Prove => {
                shard.metrics.handshakes_retried.inc();
                match elsewhere(&shard, &incoming, &moving) {
                    Some(moved) => send_on(&shard, incoming, moved, None),
                    None => incoming.retry(number(shard.index)),
                }
            }
            Verdict::Refuse(why) => {
                if why == Overload::Full {
                    shard.metrics.limits.refuse(Limit::Handshakes.label());
                }
                shard.handshakes.failed(why.into());
                tracing::warn!(%remote, %why, "handshake refused");
                incoming.refuse();
            }
        }
    }
}

/// Counts a newcomer on another shard, where that has fewer tunnels than this one.
fn elsewhere(
    shard: &Shard,
    incoming: &Incoming,
    moving: &ConcurrencyLimit,
) -> Option<ReservedLoad> {
    let movable = incoming.may_retry() && !incoming.is_placed();
    let from = movable.then_some(shard.index)?;
    shard.loads.move_from(from, moving)
}

/// Sends a newcomer to another shard by a Retry. The next one counts it until it has come.
fn send_on(shard: &Shard, incoming: Incoming, moved: ReservedLoad, place: Option<HandshakePermit>) {
    shard.metrics.handshakes_moved.inc();
    incoming.retry(number(moved.shard()));
    tokio::task::spawn_local(async move {
        sleep(ON_ITS_WAY).await;
        drop((moved, place));
    });
}

/// Returns the number of a shard in connection ids.
fn number(shard: usize) -> u8 {
    // Below the bound on shards.
    shard as u8
}

/// Serves one agent from its first packet to its last, while it is `counted` on this shard.
async fn serve(
    shard: Rc<Shard>,
    incoming: Incoming,
    (under_way, _counted): (HandshakePermit, LoadPermit),
) {
    let remote = incoming.remote_address();
    let Some((connection, stream)) = handshake(&shard, incoming).await else {
        return;
    };
    drop(under_way);
    let identity = match peer_identity(&connection) {
        Ok(identity) => identity,
        Err(error) => {
            shard.handshakes.failed(HandshakeFailure::Identity);
            tracing::warn!(%remote, error = report(&error), "agent refused");
            audit::peer_refused(Listener::Tunnel, remote, &error);
            let reason = error_code(CloseReason::IdentityRefused);
            connection.close(reason, error.to_string().as_bytes());
            return;
        }
    };
    let tenant = shard.tenants.of(&identity.trust_domain);
    connection.charge_to(&tenant.budget);
    let session = Shared::new(ServerSession::new(Timers::default(), Instant::now()));
    let mut control = ControlStream::new(session.clone(), stream);
    let path = connection.path();
    let probe = Probe(Box::new(move || Path {
        remote: path.remote(),
        rtt: path.rtt(),
        mtu: Some(path.mtu()),
        since_packet: path.since_packet(),
        since_data: path.since_packet(),
    }));
    let info = LinkInfo::new(
        (shard.next_link(), shard.index),
        TunnelKind::Quic,
        (identity, Trust::Granted),
        probe,
    );
    let link = Rc::new(QuicLink {
        connection: connection.clone(),
        session,
        info,
        place: RefCell::default(),
        asked: Cell::default(),
    });

    let span = tracing::debug_span!("session", agent = %link.info.identity);
    let leaf = connection.peer_certificate();
    let peer = leaf.map(|leaf| Peer::of(&leaf)).unwrap_or_default();
    let peer = peer.known_as(&link.info.identity);
    let (reason, why) = tokio::select! {
        end = session::run(&shard, &link, &mut control).instrument(span) => {
            (session::reason_of(&end), end.to_string())
        }
        revoked = shard.revocations.on_revocation(&peer) => {
            audit::cut("tunnel", connection.remote_address(), &revoked);
            (CloseReason::IdentityRefused, revoked.to_string())
        }
    };
    shard.links.borrow_mut().remove(&link.info.id);
    link.place.take();
    shard.control.disconnect(link.info.id).await;
    tracing::info!(
        agent = %link.info.identity, remote = %connection.remote_address(),
        reason = reason.label(), %why, "agent disconnected"
    );
    audit::agent_disconnected(&link.info.identity, reason);
    // The reason travels with the close. Without effect on a connection that is gone.
    connection.close(error_code(reason), why.as_bytes());
}

async fn handshake(shard: &Shard, incoming: Incoming) -> Option<(Connection, (Send, Recv))> {
    let remote = incoming.remote_address();
    let accepted = async {
        let connection = incoming.accept().await?;
        let mut stream = connection.accept_bi().await?;
        // Before the streams of dials: a heartbeat must not wait for them.
        stream.0.go_first();
        Ok::<_, ConnectionError>((connection, stream))
    };
    match timeout(HANDSHAKE_TIMEOUT, accepted).await {
        Ok(Ok(accepted)) => return Some(accepted),
        // It holds a tunnel to us already, and looks for our peers behind the same address.
        Ok(Err(error)) if link_reason(&error) == CloseReason::DuplicateServer => {
            tracing::debug!(%remote, "declined by the agent");
        }
        Ok(Err(ConnectionError::ApplicationClosed(close))) => {
            // An agent that found our certificate wanting, or changed its mind.
            let why = String::from_utf8_lossy(&close.reason).into_owned();
            shard.handshakes.failed(HandshakeFailure::Peer);
            tracing::info!(%remote, %why, "handshake given up by the peer");
        }
        Ok(Err(error)) => {
            shard.handshakes.failed(HandshakeFailure::Tls);
            tracing::warn!(%remote, error = report(&error), "handshake failed");
            audit::peer_refused(Listener::Tunnel, remote, &error);
        }
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
