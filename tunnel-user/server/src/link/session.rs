//! The session with one agent over a tunnel: executes the decisions of its [`lifecycle`] with the control
//! stream, the control task and the issuer.

mod lifecycle;

use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::task::coop;
use tunnel_proto::certificate::Answer;
use tunnel_proto::close::CloseReason;
use tunnel_proto::control::VERSION;
use tunnel_proto::session::{ServerSession, SessionError, Timers, Welcome};

use self::lifecycle::{Action, Greeting, Input, Lifecycle, Moment, NO_ISSUER, Registration};
use super::Link;
use super::registration::{register, report_refused, set_draining, set_silent};
use super::tunnel::TunnelLink;
use crate::registry::Verdict;
use crate::shard::Shard;
use cpc_observe::audit::events as audit;
use cpc_transport::control_stream::{ControlEnd, ControlStream};
use cpc_transport::tunnel::Tunnel;

/// Time for an agent to answer a challenge with a life sign.
const CHALLENGE: Duration = Duration::from_secs(1);

/// Drives the session until it ends.
pub(super) async fn run(
    shard: &Rc<Shard>,
    link: &Rc<TunnelLink>,
    control: &mut ControlStream<ServerSession>,
) -> ControlEnd {
    let mut lifecycle = Lifecycle::new(shard.issuer.is_some());
    let mut phase = shard.phase.clone();
    let session = Session { shard, link };
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
                set_draining(info, Some(reason));
                shard.control.changed(info.id).await;
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
            serves_while_draining,
        } = registration;
        let serves = &link.info.serves_while_draining;
        serves.store(serves_while_draining, Ordering::Relaxed);
        let entry = Link::Tunnel(link.clone());
        register(shard, &link.info, entry, process, offer).await
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
