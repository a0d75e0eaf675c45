//! Sessions without a tunnel: they wait for another one of the same agent process, and go on over it.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use tokio::time::{Instant, sleep, timeout_at};
use tunnel_proto::close::CloseReason;
use tunnel_proto::handover;

use super::agent_processes::AgentProcess;
use super::dial::Dialled;
use super::dial::permit::StreamPermit;
use super::handover::Collected;
use super::limits::Limit;
use super::link::{Link, LinkRecv, LinkSend};
use super::routes::LinkInfo;
use super::shard::{Common, Shard};
use cpc_datapath::{Budget, Progress};
use cpc_handover::HandoverError;
use cpc_host::concurrency::Permit;
use cpc_host::lifecycle::Phase;
use cpc_identity::TrustDomain;
use cpc_identity::identity::domain_of;
use cpc_observe::sessions::WaitingGuard;
use cpc_session::resume::{Outcome, close, resume};
use cpc_session::{Bounds, Detached, SessionRecv, SessionSend, SessionState, survives};

/// Pause before another attempt on the same tunnel.
const PAUSE: Duration = Duration::from_millis(100);

/// A session whose tunnel was lost.
pub(crate) struct Lost {
    state: Box<SessionState>,
    process: Arc<AgentProcess>,
    /// Reason for which the tunnel was lost.
    cause: CloseReason,
    at: Instant,
    /// Whether there is a connection, of which metrics count.
    is_connected: bool,
    /// Permits of the wait. One that a handover begins is bounded by the connections.
    _permits: Option<(Permit, Permit, Permit)>,
    _waiting: Option<WaitingGuard>,
}

/// End of the wait for a tunnel.
pub(crate) enum Advance {
    /// The session goes on here.
    Here(Box<Resumed>),
    /// The tunnel is one of this other shard, where the wait goes on.
    Elsewhere(usize, Box<Lost>),
    /// Another process takes the place of this one.
    HandedOver(Box<Lost>),
    /// The session has ended; [`CloseReason::Finished`] is the orderly end.
    Ended(CloseReason),
}

/// A session that goes on over another tunnel.
pub(crate) struct Resumed {
    send: SessionSend,
    recv: SessionRecv,
    permit: StreamPermit,
    /// Time without a tunnel.
    pub stall: Duration,
}

impl Lost {
    /// Takes a connection from its tunnel, which was lost for `cause`.
    ///
    /// # Errors
    /// The reason of the end, if the connection ends here. [`CloseReason::Finished`] is the orderly one.
    pub(crate) fn from(
        shard: &Rc<Shard>,
        tenant: &TrustDomain,
        dialled: &Dialled,
        cause: CloseReason,
    ) -> Result<Box<Self>, CloseReason> {
        let LinkSend::Tunnel(send) = &dialled.send else {
            return Err(cause);
        };
        let session = send.session().ok_or(cause)?;
        let process = dialled.permit.process.get().ok_or(cause)?.clone();
        let flag = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        let link = &dialled.permit;
        let is_leaving = flag(&link.draining) && !flag(&link.hands_over) && !process.is_heard();
        match session.detach(cause, std::time::Instant::now()) {
            Detached::Plain => Err(cause),
            Detached::Finished => Err(CloseReason::Finished),
            // A draining agent dials no more.
            Detached::Safe(_) if is_leaving => Err(cause),
            Detached::Safe(state) => {
                let lost = Self::new(shard, tenant, process, (cause, true), state);
                lost.map(Box::new).ok_or(cause)
            }
            Detached::Ended(state) => {
                settle(shard, &dialled.permit, cause, state);
                Err(cause)
            }
        }
    }

    /// Gives the session up for `reason`. The agent learns that over another tunnel.
    pub(crate) fn abandon(mut self: Box<Self>, shard: &Rc<Shard>, reason: CloseReason) {
        self.state.abort(reason);
        self.is_connected = false;
        self._waiting = None;
        tokio::task::spawn_local(until_settled(shard.clone(), self));
    }

    fn new(
        shard: &Shard,
        tenant: &TrustDomain,
        process: Arc<AgentProcess>,
        (cause, is_connected): (CloseReason, bool),
        state: Box<SessionState>,
    ) -> Option<Self> {
        let is_ending = *shard.phase.borrow() == Phase::Ended;
        if !survives(cause) || is_ending || process.has_ended() || shard.limits.resume.is_zero() {
            return None;
        }
        let permits = match shard.handover.is_collecting() {
            true => Ok(None),
            false => acquire(shard, tenant, &process).map(Some),
        };
        let at = Instant::now();
        let permits = permits.inspect_err(|limit| shard.metrics.limits.refuse(limit.label()));
        Some(Self {
            state,
            process,
            cause,
            at,
            _permits: permits.ok()?,
            is_connected,
            _waiting: is_connected.then(|| shard.metrics.sessions.waiting.add(at.into_std())),
        })
    }

    /// Returns the session for another process.
    pub(crate) fn save(&self) -> handover::Connection {
        handover::Connection {
            session: Some(self.state.save()),
            peer: Some(self.process.save()),
            cause: self.cause as u32,
            waited: u64::try_from(self.at.elapsed().as_nanos()).unwrap_or(u64::MAX),
            socket: None,
        }
    }

    /// Restores a session that another process has [saved](Self::save).
    ///
    /// # Errors
    /// [`HandoverError::Malformed`].
    pub(crate) fn restore(
        common: &Common,
        saved: &handover::Connection,
    ) -> Result<Self, HandoverError> {
        let malformed = HandoverError::Malformed;
        let peer = saved.peer.as_ref().ok_or(malformed("peer"))?;
        let process = { &common.processes }
            .expect(peer)
            .ok_or(malformed("peer"))?;
        let now = Instant::now();
        let at = now.checked_sub(Duration::from_nanos(saved.waited));
        let at = at.unwrap_or(now);
        let tenant = domain_of(&peer.identity).ok_or(malformed("identity"))?;
        let tenant = common.tenants.of(&tenant);
        let bounds = Bounds {
            bytes: common.limits.session_bytes,
            window: common.limits.stream_window.into(),
            budget: { &tenant.budget }.part(common.limits.stalled_bytes_per_tunnel()),
            held: common.metrics.sessions.held.clone(),
        };
        let session = saved.session.as_ref().ok_or(malformed("session"))?;
        let state = SessionState::restore(session, Arc::new(bounds), at.into_std());
        let state = state.map_err(|_| malformed("session"))?;
        let is_connected = saved.socket.is_some();
        let cause = CloseReason::from_code(saved.cause.into());
        Ok(Self {
            state: Box::new(state),
            process,
            cause: cause.unwrap_or(CloseReason::LinkLost),
            at,
            is_connected,
            _permits: None,
            _waiting: is_connected.then(|| common.metrics.sessions.waiting.add(at.into_std())),
        })
    }

    /// Returns the time without a tunnel.
    pub(crate) fn waited(&self) -> Duration {
        self.at.elapsed()
    }

    /// Waits for a tunnel, and continues the session over it if it belongs to this shard. `poll_urgent` is ready when
    /// the session is not to wait for its turn. Cancelling loses the session.
    pub(crate) async fn advance(
        self: Box<Self>,
        shard: &Rc<Shard>,
        poll_urgent: impl FnMut(&mut Context<'_>) -> Poll<()>,
    ) -> Advance {
        let deadline = self.at + shard.limits.resume;
        let (process, is_connected) = (self.process.clone(), self.is_connected);
        let advanced = timeout_at(deadline, self.attempts(shard, &process, poll_urgent));
        let reason = tokio::select! {
            advanced = advanced => match advanced {
                Ok(advanced) => return advanced,
                Err(_) => CloseReason::LinkLost,
            },
            () = process.ended() => CloseReason::LinkLost,
            () = revoked(shard, &process) => CloseReason::IdentityRefused,
        };
        if is_connected {
            shard.metrics.sessions.lost(reason);
        }
        Advance::Ended(reason)
    }

    async fn attempts(
        mut self: Box<Self>,
        shard: &Rc<Shard>,
        process: &AgentProcess,
        mut poll_urgent: impl FnMut(&mut Context<'_>) -> Poll<()>,
    ) -> Advance {
        loop {
            let link = tokio::select! {
                biased;
                () = shard.handover.collecting() => return Advance::HandedOver(self),
                link = process.link() => link,
            };
            if link.shard != shard.index {
                return Advance::Elsewhere(link.shard, self);
            }
            // Those that keep bytes need not wait for those that wait for bytes themselves.
            let turn = match self.state.kept() {
                0 => tokio::select! {
                    turn = process.idle_turns.acquire() => turn.ok(),
                    () = poll_fn(&mut poll_urgent) => None,
                },
                _ => None,
            };
            if shard.handover.is_collecting() {
                continue;
            }
            match self.attempt(shard, &link).await {
                Ok(advance) => return advance,
                Err(lost) => self = lost,
            }
            drop(turn);
            tokio::select! {
                () = sleep(PAUSE) => {}
                () = shard.handover.collecting() => {}
            }
        }
    }

    /// Asks the agent once. An error gives the session back.
    async fn attempt(
        self: Box<Self>,
        shard: &Shard,
        link: &Arc<LinkInfo>,
    ) -> Result<Advance, Box<Self>> {
        let tunnel = match shard.links.borrow().get(&link.id) {
            Some(Link::Tunnel(tunnel)) => tunnel.clone(),
            _ => return Err(self),
        };
        let Some(notices) = tunnel.notices.get() else {
            return Err(self);
        };
        let permit = StreamPermit::new(link);
        match resume(tunnel.open_stream(), notices, self.state).await {
            Outcome::Resumed(send, recv) => {
                let stall = self.at.elapsed();
                if self.is_connected {
                    shard.metrics.sessions.resumed(self.cause, stall);
                }
                Ok(Advance::Here(Box::new(Resumed {
                    send,
                    recv,
                    permit,
                    stall,
                })))
            }
            Outcome::Ended(reason) => {
                if let Some(reason) = reason.filter(|_| self.is_connected) {
                    shard.metrics.sessions.lost(reason);
                }
                Ok(Advance::Ended(reason.unwrap_or(CloseReason::Finished)))
            }
            Outcome::Later(state) => Err(Box::new(Self { state, ..*self })),
        }
    }
}

impl Resumed {
    /// Returns the connection that goes on, from `unsent` on.
    pub(crate) fn into_dialled(self, unsent: Progress, budget: Budget) -> Dialled {
        Dialled {
            send: LinkSend::Tunnel(self.send),
            recv: LinkRecv::Tunnel(self.recv),
            unsent,
            sent: 0,
            permit: self.permit,
            budget,
        }
    }
}

/// Waits until the certificate is revoked that the process has shown last.
async fn revoked(shard: &Shard, process: &AgentProcess) {
    loop {
        let peer = process.peer();
        shard.revocations.on_revocation(&peer).await;
        if process.peer() == peer {
            return;
        }
    }
}

/// Takes the permits of a waiting session.
///
/// # Errors
/// The limit that refuses.
fn acquire(
    shard: &Shard,
    tenant: &TrustDomain,
    process: &AgentProcess,
) -> Result<(Permit, Permit, Permit), Limit> {
    let own = shard.tenants.of(tenant);
    Ok((
        { shard.waiting_sessions.acquire() }.ok_or(Limit::WaitingSessions)?,
        { own.waiting_sessions.acquire() }.ok_or(Limit::WaitingSessionsPerTenant)?,
        { process.waiting.acquire() }.ok_or(Limit::WaitingSessionsPerAgent)?,
    ))
}

/// Tells the agent, over another tunnel, how a session without a socket ended.
pub(crate) fn settle(
    shard: &Rc<Shard>,
    link: &LinkInfo,
    cause: CloseReason,
    state: Box<SessionState>,
) {
    let Some(process) = link.process.get() else {
        return;
    };
    let tenant = &link.identity.trust_domain;
    if let Some(lost) = Lost::new(shard, tenant, process.clone(), (cause, false), state) {
        tokio::task::spawn_local(until_settled(shard.clone(), Box::new(lost)));
    }
}

/// Lets a session wait for its turn.
pub(crate) fn never(_: &mut Context<'_>) -> Poll<()> {
    Poll::Pending
}

pub(crate) fn until_settled(shard: Rc<Shard>, lost: Box<Lost>) -> LocalBoxFuture<'static, ()> {
    Box::pin(async move {
        match lost.advance(&shard, never).await {
            Advance::Elsewhere(at, lost) => {
                shard.run_on(at, move |shard| until_settled(shard, lost));
            }
            Advance::HandedOver(lost) => shard.handover.give(Collected { client: None, lost }),
            // The notices of the tunnel do the rest.
            Advance::Here(resumed) => close((resumed.send, resumed.recv)),
            Advance::Ended(_) => {}
        }
    })
}
