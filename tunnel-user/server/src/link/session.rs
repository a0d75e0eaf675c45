//! The session with one agent: the control task judges its messages, and dials see the result.

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::task::coop;
use tunnel_proto::certificate::Answer;
use tunnel_proto::close::CloseReason;
use tunnel_proto::control::VERSION;
use tunnel_proto::session::{
    Hello, Refusal, ServerEvent, ServerSession, SessionError, Timers, Welcome,
};

use super::Link;
use super::tunnel::TunnelLink;
use crate::shard::Shard;
use cpc_host::lifecycle::Phase;
use cpc_identity::Identity;
use cpc_observe::audit::events as audit;
use cpc_transport::control_stream::{ControlEnd, ControlStream};
use cpc_transport::tunnel::Tunnel;

/// Maximum number of refused claims in one log line.
const SHOWN_CLAIMS: usize = 16;

/// Time for an agent to answer a challenge with a life sign.
const CHALLENGE: Duration = Duration::from_secs(1);

/// Minimum interval of certificate requests; an agent that asks faster is not heard.
const ASKED_AFTER: Duration = Duration::from_secs(10);

/// Drives the session until it ends.
pub(super) async fn run(
    shard: &Rc<Shard>,
    link: &Rc<TunnelLink>,
    control: &mut ControlStream<ServerSession>,
) -> ControlEnd {
    let mut phase = shard.phase.clone();
    loop {
        // One that says much gives way to its neighbours on the shard.
        coop::consume_budget().await;
        let event = tokio::select! {
            event = control.next() => match event {
                Ok(event) => event,
                Err(end) => return end,
            },
            Ok(()) = phase.changed() => {
                if let Phase::Draining(deadline) = *phase.borrow_and_update() {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if let Err(e) = link.session.with(|s| s.drain(left, CloseReason::Shutdown)) {
                        return e.into();
                    }
                }
                continue;
            }
            () = link.info.replaced.notified() => {
                let text = "another session took its place";
                return link.session.with(|s| s.refuse(CloseReason::Replaced, text)).into();
            }
            () = link.info.challenged.notified() => {
                link.session.with(|s| s.challenge(CHALLENGE, Instant::now()));
                continue;
            }
        };
        if let Err(e) = handle(shard, link, event).await {
            return e.into();
        }
    }
}

async fn handle(
    shard: &Rc<Shard>,
    link: &Rc<TunnelLink>,
    event: ServerEvent,
) -> Result<(), SessionError> {
    let info = &link.info;
    match event {
        ServerEvent::Hello(hello) => return welcome(shard, link, hello).await,
        ServerEvent::Offer(offer) => {
            if let Some(verdict) = shard.control.offer(info.id, offer).await {
                if verdict.is_new {
                    report(shard, &link.info.identity, &verdict.refused);
                }
                link.session
                    .with(|s| s.verdict(verdict.accepted, verdict.refused))?;
            }
        }
        ServerEvent::Silent => {
            tracing::warn!(agent = %info.identity, "agent is silent, no new dials go to it");
            info.silent.store(true, Ordering::Relaxed);
            info.silenced.notify_waiters();
            shard.control.changed(info.id).await;
        }
        ServerEvent::Alive => {
            tracing::info!(agent = %info.identity, "agent is heard again");
            info.silent.store(false, Ordering::Relaxed);
            shard.control.changed(info.id).await;
        }
        ServerEvent::Draining { reason, .. } => {
            // An agent may say so again and again.
            if !info.draining.swap(true, Ordering::Relaxed) {
                if reason == CloseReason::Replaced {
                    // By another tunnel of the same process, which takes its dials.
                    let serves = &info.serves_while_draining;
                    serves.store(false, Ordering::Relaxed);
                }
                tracing::info!(agent = %info.identity, reason = reason.label(), "agent is draining");
                shard.control.changed(info.id).await;
            }
        }
        ServerEvent::Statistics(_) => {}
        ServerEvent::CertificateRequest(csr) => {
            let answer = certificate(shard, link, csr).await;
            link.session.with(|s| s.certificate(&answer))?;
        }
    }
    Ok(())
}

/// Asks the issuer, for which a request is more work than for the agent.
async fn certificate(shard: &Shard, link: &TunnelLink, csr: Vec<u8>) -> Answer {
    let Some(issuer) = &shard.issuer else {
        return Err("this server issues no certificates: it has no `join`".into());
    };
    let last = link.asked.replace(Some(Instant::now()));
    if last.is_some_and(|last| last.elapsed() < ASKED_AFTER) {
        return Err("asked again too soon".into());
    }
    let leaf = link.connection.peer_certificate();
    issuer.renew(link.info.identity.clone(), leaf, csr).await
}

async fn welcome(
    shard: &Rc<Shard>,
    link: &Rc<TunnelLink>,
    hello: Hello,
) -> Result<(), SessionError> {
    // An agent that we have told that we drain looks for our successor. One that was started again
    // meanwhile has nobody else.
    let draining = *shard.phase.borrow() != Phase::Running;
    let identity = &link.info.identity;
    if draining && shard.control.holds(identity, hello.instance_id).await {
        let text = "the server is draining";
        return Err(link.session.with(|s| s.refuse(CloseReason::Shutdown, text)));
    }
    match shard.admit_tunnel(&link.info.identity.trust_domain) {
        Ok(place) => drop(link.place.replace(Some(place))),
        Err(limit) => {
            let text = limit.text(&shard.limits);
            return Err(link
                .session
                .with(|s| s.refuse(CloseReason::Overloaded, text)));
        }
    }
    // Before the routes are in force: a dial may come at once.
    shard
        .links
        .borrow_mut()
        .insert(link.info.id, Link::Tunnel(link.clone()));
    let offered = hello.offer.len();
    let serves = hello.serves_while_draining();
    let serves_while_draining = &link.info.serves_while_draining;
    serves_while_draining.store(serves, Ordering::Relaxed);
    let process = (hello.instance_id, hello.predecessor);
    let connect = shard
        .control
        .connect(link.info.clone(), process, hello.offer);
    let Some(verdict) = connect.await else {
        return Err(link
            .session
            .with(|s| s.refuse(CloseReason::Shutdown, "the server is ending")));
    };
    report(shard, &link.info.identity, &verdict.refused);
    tracing::info!(
        agent = %link.info.identity, remote = %link.connection.remote(), instance = %hello.instance_id,
        version = %hello.software_version, offered, accepted = verdict.accepted.len(),
        "agent connected"
    );
    let (info, remote) = (&link.info, link.connection.remote());
    audit::agent_connected(
        &info.identity,
        remote,
        info.kind.label(),
        verdict.accepted.len(),
    );
    let welcome = Welcome {
        version: VERSION,
        server_id: shard.server_id.to_string(),
        server_count: shard.server_count,
        instance_id: shard.instance,
        accepted: verdict.accepted,
        refused: verdict.refused,
        heartbeat: Timers::default().heartbeat,
    };
    link.session.with(|s| s.welcome(welcome, Instant::now()))
}

/// Counts refused claims and logs them in one line: an agent may offer a thousand.
pub(super) fn report(shard: &Shard, identity: &Identity, refused: &[Refusal]) {
    let Some(first) = refused.first() else {
        return;
    };
    shard.metrics.claims_refused.inc_by(refused.len() as u64);
    audit::claims_refused(identity, refused);
    let claims: Vec<_> = refused
        .iter()
        .take(SHOWN_CLAIMS)
        .map(|r| r.claim.as_str())
        .collect();
    tracing::warn!(
        agent = %identity, refused = refused.len(), claims = claims.join(" "), why = %first.why,
        "claims refused; `cpc status` shows all"
    );
}
