//! The session with one agent over a tunnel: executes the decisions of its [`lifecycle`] with the control
//! stream, the control task and the issuer.

mod lifecycle;

use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::task::coop;
use tokio::time::{sleep_until, timeout};
use tunnel_proto::certificate::Answer;
use tunnel_proto::close::CloseReason;
use tunnel_proto::control::VERSION;
use tunnel_proto::preface::StreamHead;
use tunnel_proto::session::{InstanceId, ServerSession, SessionError, Timers, Welcome};

use self::lifecycle::{Action, Greeting, Input, Lifecycle, Moment, NO_ISSUER, Registration};
use super::Link;
use super::registration::{register, report_refused, set_draining, set_silent};
use super::tunnel::TunnelLink;
use crate::registry::Verdict;
use crate::resumption::settle;
use crate::shard::Shard;
use cpc_datapath::stream::SendHalf;
use cpc_observe::audit::events as audit;
use cpc_session::notices::{Notices, NoticesEnd};
use cpc_transport::control_stream::{ControlEnd, ControlStream};
use cpc_transport::tunnel::Tunnel;

/// Time for an agent to answer a challenge with a life sign.
const CHALLENGE: Duration = Duration::from_secs(1);

/// Time after which a silent tunnel ends whose agent has another one: the idle timeout of the transport, which
/// itself waits longer where it has measured long round trips (RFC 9000 section 10.1).
const GIVE_UP: Duration = Duration::from_secs(30);

/// Timeout for an agent to permit the stream of notices.
const STREAM_TIMEOUT: Duration = Duration::from_secs(3);

/// Drives the session until it ends.
pub(super) async fn run(
    shard: &Rc<Shard>,
    link: &Rc<TunnelLink>,
    control: &mut ControlStream<ServerSession>,
) -> ControlEnd {
    let mut lifecycle = Lifecycle::new(shard.issuer.is_some());
    let mut phase = shard.phase.clone();
    let session = Session { shard, link };
    let mut silent_since = None;
    loop {
        // One that says much gives way to its neighbours on the shard.
        coop::consume_budget().await;
        let input = tokio::select! {
            event = control.next() => match event {
                Ok(event) => Input::Agent(event),
                Err(end) => return end,
            },
            Ok(()) = phase.changed() => Input::PhaseChanged,
            () = link.info.replaced.notified() => Input::Replaced,
            () = link.info.challenged.notified() => Input::Challenged,
            () = silent_for_long(silent_since) => {
                silent_since = Some(Instant::now());
                match link.info.is_outlived() {
                    true => Input::Replaced,
                    false => continue,
                }
            }
        };
        let mut next = Some(input);
        while let Some(input) = next.take() {
            let at = Moment {
                now: Instant::now(),
                phase: *shard.phase.borrow(),
            };
            match session.perform(lifecycle.handle(input, at)).await {
                Ok(result) => next = result,
                Err(error) => return error.into(),
            }
        }
        silent_since = match link.info.silent.load(Ordering::Relaxed) {
            true => silent_since.or_else(|| Some(Instant::now())),
            false => None,
        };
    }
}

/// Waits until a tunnel has been silent for so long that its agent has lost it.
async fn silent_for_long(since: Option<Instant>) {
    match since {
        Some(since) => sleep_until((since + GIVE_UP).into()).await,
        None => std::future::pending().await,
    }
}

/// The means of a session.
struct Session<'a> {
    shard: &'a Rc<Shard>,
    link: &'a Rc<TunnelLink>,
}

impl Session<'_> {
    /// Executes an action. Returns its result, if the lifecycle waits for one.
    ///
    /// # Errors
    /// [`SessionError`]; the session is over.
    async fn perform(&self, action: Action) -> Result<Option<Input>, SessionError> {
        let Self { shard, link } = *self;
        let info = &link.info;
        match action {
            Action::Wait => {}
            Action::FindProcess(instance) => {
                let found = shard.control.holds(&info.identity, instance).await;
                return Ok(Some(Input::ProcessFound(found)));
            }
            Action::Admit => return Ok(Some(Input::Admitted(self.admit()))),
            Action::Register(registration) => {
                let verdict = self.register(registration).await;
                return Ok(Some(Input::Registered(verdict)));
            }
            Action::Welcome(verdict, greeting) => self.welcome(verdict, &greeting)?,
            Action::Judge(offer) => {
                let verdict = shard.control.offer(info.id, offer).await;
                return Ok(Some(Input::Judged(verdict)));
            }
            Action::SendVerdict(verdict) => {
                if verdict.is_new {
                    report_refused(shard, &info.identity, &verdict.refused);
                }
                let Verdict {
                    accepted, refused, ..
                } = verdict;
                link.session.with(|s| s.verdict(accepted, refused))?;
            }
            Action::SetSilent(silent) => {
                set_silent(info, silent);
                if let Some(process) = info.process.get() {
                    if !silent {
                        process.heard();
                    }
                    process.leave_silent();
                }
                shard.control.changed(info.id).await;
            }
            Action::SetDraining {
                reason,
                takes_dials,
            } => {
                if !takes_dials {
                    let serves = &info.serves_while_draining;
                    serves.store(false, Ordering::Relaxed);
                }
                if reason == CloseReason::HandedOver {
                    info.hands_over.store(true, Ordering::Relaxed);
                    shard.control.hold_routes_of(&info.identity);
                    if let Some(notices) = link.notices.get() {
                        notices.hold_all();
                    }
                }
                set_draining(info, Some(reason));
                shard.control.changed(info.id).await;
                // Dials that find the tunnel closed look for another one.
                if !takes_dials {
                    let opened = link.close_to_streams();
                    link.session.with(|s| s.no_more_streams(opened))?;
                }
            }
            Action::Drain(left) => {
                link.session
                    .with(|s| s.drain(left, CloseReason::Shutdown))?;
            }
            Action::Challenge => link
                .session
                .with(|s| s.challenge(CHALLENGE, Instant::now())),
            Action::Issue(csr) => {
                let answer = self.issue(csr).await;
                return Ok(Some(Input::Issued(answer)));
            }
            Action::SendCertificate(answer) => link.session.with(|s| s.certificate(&answer))?,
            Action::Refuse(reason, text) => {
                return Err(link.session.with(|s| s.refuse(reason, &text)));
            }
        }
        Ok(None)
    }

    /// Takes a place among the tunnels.
    ///
    /// # Errors
    /// The text of the limit that refuses.
    fn admit(&self) -> Result<(), String> {
        let Self { shard, link } = *self;
        let admitted = shard.admit_tunnel(&link.info.identity.trust_domain);
        let place = admitted.map_err(|limit| limit.text(&shard.limits))?;
        drop(link.place.replace(Some(place)));
        Ok(())
    }

    async fn register(&self, registration: Registration) -> Option<Verdict> {
        let Self { shard, link } = *self;
        let Registration {
            process,
            offer,
            incarnation,
            serves_while_draining,
            holds_sessions,
        } = registration;
        if holds_sessions && !shard.limits.resume.is_zero() {
            self.hold_sessions((process.0, incarnation)).await;
        }
        let serves = &link.info.serves_while_draining;
        serves.store(serves_while_draining, Ordering::Relaxed);
        let entry = Link::Tunnel(link.clone());
        register(shard, &link.info, entry, process, offer).await
    }

    /// Prepares the tunnel for sessions of the agent's process. Without a stream for their notices they are
    /// connections that end with the tunnel.
    async fn hold_sessions(&self, process: (InstanceId, u64)) {
        let Self { shard, link } = *self;
        let opened = timeout(STREAM_TIMEOUT, link.open_stream()).await;
        let Ok(Ok((mut send, recv))) = opened else {
            return;
        };
        let mut head = BytesMut::new();
        StreamHead::Notices.encode(&mut head);
        if send.send(&mut head.freeze()).await.is_err() {
            return;
        }
        let probe = link.connection.probe();
        let notices = Notices::new(move || probe.path().rtt);
        // The tunnel is new.
        let _ = link.notices.set(notices.clone());
        { &shard.processes }.arrived(process, link.peer.clone(), &link.info);
        let (connection, session) = (link.connection.clone(), link.session.clone());
        let (info, moving) = (link.info.clone(), shard.clone());
        tokio::task::spawn_local(async move {
            let in_use = || session.note_traffic(Instant::now());
            let mut run = pin!(notices.run((send, recv), in_use));
            let end = loop {
                tokio::select! {
                    end = &mut run => break end,
                    () = info.outlived.notified() => {
                        tracing::info!(
                            agent = %info.identity,
                            "connections of a silent tunnel go on over another one"
                        );
                        for state in notices.evict_all() {
                            settle(&moving, &info, CloseReason::Replaced, Box::new(state));
                        }
                    }
                }
            };
            if !matches!(end, NoticesEnd::Tunnel(_)) {
                connection.close(CloseReason::ProtocolError, &end.to_string());
            }
        });
    }

    fn welcome(&self, verdict: Verdict, greeting: &Greeting) -> Result<(), SessionError> {
        let Self { shard, link } = *self;
        let (info, remote) = (&link.info, link.connection.remote());
        let accepted = verdict.accepted.len();
        tracing::info!(
            agent = %info.identity, %remote, instance = %greeting.instance,
            version = %greeting.version, offered = greeting.offered, accepted,
            "agent connected"
        );
        audit::agent_connected(&info.identity, remote, info.kind.label(), accepted);
        let welcome = Welcome {
            version: VERSION,
            server_id: shard.server_id.to_string(),
            server_count: shard.server_count,
            instance_id: shard.instance,
            accepted: verdict.accepted,
            refused: verdict.refused,
            heartbeat: Timers::default().heartbeat,
            incarnation: shard.incarnation,
        };
        link.session.with(|s| s.welcome(welcome, Instant::now()))
    }

    async fn issue(&self, csr: Vec<u8>) -> Answer {
        let Self { shard, link } = *self;
        let Some(issuer) = &shard.issuer else {
            return Err(NO_ISSUER.into());
        };
        let leaf = link.connection.peer_certificate();
        issuer.renew(link.info.identity.clone(), leaf, csr).await
    }
}
