//! One dial: choose a link, ask its agent, and if that is safe ask another.
//!
//! A dial goes to the shard of the link that is asked: usually once, before anybody is asked. A client
//! that can't go along has his dial carried over a bridge instead.
//!
//! Invariant: a request never runs twice. Another agent is asked only when the first one answered
//! that it did not dial, or when nothing of the client's had been sent on its stream.

mod attempt;
mod error;

use std::collections::VecDeque;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tunnel_proto::close::{CloseClass, CloseReason};
use tunnel_proto::preface::{ConnectionId, DialRequest, DialResponse, Host, StreamKind};

use self::attempt::{Attempt, outcome};
use self::error::{full, no_route, too_late};
use super::breaker::Outcome;
use super::early::{Cursor, EarlyBytes, EarlyEnd};
use super::limits::Limit;
use super::link::{LinkRecv, LinkSend, bridge};
use super::routes::{LinkId, LinkInfo, MAX_CANDIDATES, RouteError};
use super::shard::{Dialling, Shard, Target};
use cpc_config::server::LimitsConfig;
use cpc_datapath::Budget;
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendHalf};
use cpc_datapath::{LocalSocket, Outbound};
use cpc_host::lifecycle::Phase;
use cpc_host::report::report;
use cpc_identity::TrustDomain;
use cpc_observe::access::Record;
use cpc_observe::konnectivity::Counted;
use cpc_observe::metrics::Closer;
use cpc_transport::quic::HeadError;

pub(super) use error::DialError;

/// Agents are back so soon after a server's start.
const HOMECOMING: Duration = Duration::from_secs(3);

/// How often is looked whether they are.
const HOMECOMING_POLL: Duration = Duration::from_millis(20);

/// An agent that has not answered by then, and of which no packet has come since, may be gone.
const UNHEARD: Duration = Duration::from_secs(1);

/// A dial that succeeded.
#[derive(Debug)]
pub(super) struct Dialled {
    /// Towards the target.
    pub send: LinkSend,
    /// From the target.
    pub recv: LinkRecv,
    /// What the target is still to be given.
    pub rest: Outbound,
    /// How many bytes it has been given.
    pub given: usize,
    /// Who serves it, where it counts from its first packet.
    pub on_link: OnLink,
    /// What bounds its reader, should it stop.
    pub budget: Budget,
}

/// How far a dial has come.
pub(super) enum Step {
    /// To its end.
    Dialled(Box<Dialled>),
    /// The link to ask next lives on another shard: go there.
    Elsewhere(usize),
}

/// A dial under way, which may go from shard to shard.
pub(super) struct Dial {
    /// What is asked, and what becomes of it.
    pub record: Box<Record>,
    tenant: TrustDomain,
    early: EarlyBytes,
    deadline: Instant,
    /// Whom to ask, the best first; `None` before they are looked up, anew for each try.
    candidates: Option<VecDeque<Arc<LinkInfo>>>,
    asked: Vec<LinkId>,
    attempt: u8,
    last: Option<DialError>,
    /// Counts it while it is under way.
    pending: Option<(Counted, Dialling)>,
}

/// One try, and whether another may follow.
struct Failed {
    error: DialError,
    safe: bool,
}

impl Dial {
    /// Of `record`'s destination, for a client of `tenant`.
    pub(super) fn new(
        shard: &Shard,
        record: Record,
        tenant: &TrustDomain,
        (mut early, dialling): (EarlyBytes, Dialling),
    ) -> Self {
        early.charge_to(shard.tenants.of(tenant).budget.clone());
        Self {
            record: Box::new(record),
            tenant: tenant.clone(),
            early,
            deadline: Instant::now() + shard.limits.dial_timeout,
            candidates: None,
            asked: Vec::new(),
            attempt: 0,
            last: None,
            pending: Some((shard.metrics.konnectivity.pending_dial(), dialling)),
        }
    }

    /// What is left of it when it has succeeded.
    pub(super) fn into_record(self) -> Box<Record> {
        self.record
    }

    /// Dials as far as the links of this shard go.
    ///
    /// # Errors
    /// [`DialError`]; the client has been sent nothing.
    pub(super) async fn advance(
        &mut self,
        shard: &Rc<Shard>,
        local: &impl LocalSocket,
    ) -> Result<Step, DialError> {
        self.counted(shard, local, true).await
    }

    /// Dials from this shard, wherever the links live.
    ///
    /// # Errors
    /// [`DialError`]; the client has been sent nothing.
    pub(super) async fn finish(
        &mut self,
        shard: &Rc<Shard>,
        local: &impl LocalSocket,
    ) -> Result<Dialled, DialError> {
        match self.counted(shard, local, false).await? {
            Step::Dialled(dialled) => Ok(*dialled),
            // It was not to go anywhere.
            Step::Elsewhere(_) => Err(no_route(RouteError::NoRoute, &self.record)),
        }
    }

    async fn counted(
        &mut self,
        shard: &Rc<Shard>,
        local: &impl LocalSocket,
        goes: bool,
    ) -> Result<Step, DialError> {
        let metrics = &shard.metrics.konnectivity;
        let step = self.try_links(shard, local, goes).await;
        match &step {
            Ok(Step::Dialled(_)) => metrics.dialled(self.record.start.elapsed()),
            Ok(Step::Elsewhere(_)) => return step,
            Err(error) => metrics.dial_failed(error.konnectivity()),
        }
        self.pending = None;
        step
    }

    async fn try_links(
        &mut self,
        shard: &Rc<Shard>,
        local: &impl LocalSocket,
        goes: bool,
    ) -> Result<Step, DialError> {
        while let Some(info) = self.next(shard).await? {
            if goes && info.shard != shard.index {
                let at = info.shard;
                self.candidates.get_or_insert_default().push_front(info);
                return Ok(Step::Elsewhere(at));
            }
            let attempt = Attempt::new(shard, || self.target())?;
            let asked = self.ask(shard, &info, local).await;
            let silent = info.silent.load(Ordering::Relaxed);
            let known = asked.as_ref().map_or_else(
                |failed| outcome(&failed.error, silent),
                |_| Outcome::Answered,
            );
            attempt.settle(known, || self.target());
            match asked {
                Ok(dialled) => return Ok(Step::Dialled(Box::new(dialled))),
                Err(Failed { error, safe: false }) => return Err(error),
                Err(Failed { error, .. }) => {
                    tracing::debug!(agent = %info.identity, error = report(&error), "trying another agent");
                    self.last = Some(error);
                    self.asked.push(info.id);
                    // Its successor may be there by now.
                    self.candidates = None;
                }
            }
        }
        let last = self.last.take();
        Err(last.unwrap_or_else(|| no_route(RouteError::NoRoute, &self.record)))
    }

    /// What the breaker knows it by.
    fn target(&self) -> Target {
        (self.tenant.clone(), self.record.destination.clone())
    }

    /// Whom to ask next, if anybody.
    async fn next(&mut self, shard: &Shard) -> Result<Option<Arc<LinkInfo>>, DialError> {
        if self.asked.len() >= MAX_CANDIDATES {
            return Ok(None);
        }
        if self.candidates.is_none() {
            let host = &self.record.destination.host;
            let found = match candidates(shard, &self.tenant, host, self.deadline).await {
                Ok(found) => found,
                Err(_) if self.last.is_some() => Vec::new(),
                Err(error) => return Err(no_route(error, &self.record)),
            };
            let is_new = |info: &Arc<LinkInfo>| !self.asked.contains(&info.id);
            self.candidates = Some(found.into_iter().filter(is_new).collect());
        }
        Ok(self.candidates.as_mut().and_then(VecDeque::pop_front))
    }

    async fn ask(
        &mut self,
        shard: &Rc<Shard>,
        info: &Arc<LinkInfo>,
        local: &impl LocalSocket,
    ) -> Result<Dialled, Failed> {
        self.record.peer = Some(info.identity.name.clone());
        let (on_link, _unanswered) = OnLink::new(info, &shard.limits).map_err(|limit| {
            shard.metrics.limits.refuse(limit.label());
            let error = full(shard, info, limit);
            Failed { error, safe: true }
        })?;
        let left = self.deadline.saturating_duration_since(Instant::now());
        let request = DialRequest {
            kind: StreamKind::Tcp,
            id: self.record.id,
            destination: self.record.destination.clone(),
            deadline: left,
            attempt: self.attempt,
        };
        self.attempt += 1;
        let is_last = self.candidates.as_ref().is_none_or(VecDeque::is_empty);
        let patience = (!is_last).then_some(left / 3);
        let asked = Instant::now();
        let others = Others {
            tenant: &self.tenant,
            host: &request.destination.host,
            asked: &self.asked,
        };
        let doubt = async {
            doubtful(info, asked, patience).await;
            others.but(shard, info.id).await;
        };
        let mut cursor = Cursor::default();
        let early = (&mut self.early, &mut cursor);
        let tried = Box::pin(try_link(shard, info, &request, local, early, doubt));
        let Ok(tried) = timeout_at(self.deadline, tried).await else {
            let error = too_late(shard, &self.record);
            return Err(Failed { error, safe: false });
        };
        let (send, recv) = tried?;
        let (rest, given) = self.early.rest(cursor);
        Ok(Dialled {
            send,
            recv,
            rest,
            given,
            on_link,
            budget: shard.tenants.of(&self.tenant).budget.clone(),
        })
    }
}

/// Who serves `host`. A server that has just started waits for its agents to come back: what waited
/// for it in the backlog of a listener is not to be refused for their absence.
async fn candidates(
    shard: &Shard,
    tenant: &TrustDomain,
    host: &Host,
    deadline: Instant,
) -> Result<Vec<Arc<LinkInfo>>, RouteError> {
    let until = deadline.min(shard.started + HOMECOMING);
    loop {
        let found = shard.control.routes().candidates(tenant, host);
        if found.is_ok() || Instant::now() >= until || *shard.phase.borrow() != Phase::Running {
            return found;
        }
        sleep(HOMECOMING_POLL).await;
    }
}

/// Waits until an agent that has been asked may be gone: it falls silent, or nothing is heard of it. With
/// `patience` another one could be asked, and the dial waits no longer than that.
async fn doubtful(info: &LinkInfo, asked: Instant, patience: Option<Duration>) {
    let unheard = async {
        let path = (info.probe.0)();
        // An acknowledgement takes a round trip.
        sleep(UNHEARD.max(3 * path.rtt)).await;
        if (info.probe.0)().since_packet < asked.elapsed() {
            std::future::pending().await
        }
    };
    let impatient = async {
        match patience {
            Some(patience) => sleep(patience).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = info.silenced.notified() => {}
        () = unheard => {}
        () = impatient => {}
    }
}

/// Whom else a dial may ask.
struct Others<'a> {
    tenant: &'a TrustDomain,
    host: &'a Host,
    asked: &'a [LinkId],
}

impl Others<'_> {
    /// Waits until there is one besides `link`.
    async fn but(&self, shard: &Shard, link: LinkId) {
        if self.asked.len() + 1 >= MAX_CANDIDATES {
            return std::future::pending().await;
        }
        let mut published = shard.control.published();
        loop {
            let found = shard.control.routes().candidates(self.tenant, self.host);
            let mut found = found.iter().flatten();
            if found.any(|other| other.id != link && !self.asked.contains(&other.id)) {
                return;
            }
            if published.changed().await.is_err() {
                // The control task has ended, and so will everything else.
                std::future::pending().await
            }
        }
    }
}

/// Asks one agent. When `doubt` completes there is another one to ask, and the link is given up while
/// that is safe.
async fn try_link(
    shard: &Rc<Shard>,
    info: &LinkInfo,
    request: &DialRequest,
    local: &impl LocalSocket,
    (early, cursor): (&mut EarlyBytes, &mut Cursor),
    doubt: impl Future<Output = ()>,
) -> Result<(LinkSend, LinkRecv), Failed> {
    let lost = |reason: CloseReason, safe| Failed {
        error: DialError::new(
            reason,
            Closer::Tunnel,
            format!(
                "the tunnel to {} was lost while dialling: {reason}",
                info.identity.name
            ),
        ),
        safe,
    };
    let opened = if info.shard == shard.index {
        // Its link may have ended since the routes were published.
        let link = shard.links.borrow().get(&info.id).cloned();
        let link = link.ok_or_else(|| lost(CloseReason::LinkLost, true))?;
        link.open(request).await
    } else {
        let (send, recv) = bridge::open(shard, info, request);
        Ok((
            LinkSend::Bridge(Box::new(send)),
            LinkRecv::Bridge(Box::new(recv)),
        ))
    };
    let (mut send, mut recv) = opened.map_err(|reason| lost(reason, true))?;

    let touched = cursor.touched.clone();
    let hopeless = async {
        doubt.await;
        if touched.get() {
            std::future::pending().await
        }
    };
    let answer = {
        let mut answer = pin!(recv.answer());
        let stream = info.sends_early().then_some(&mut send);
        tokio::select! {
            // An answer that is there counts, whatever else has happened.
            biased;
            answer = &mut answer => Answer::Given(answer),
            end = early.pump(local, stream, cursor) => match end {
                EarlyEnd::Client => Answer::Unwanted,
                // The agent takes no more: its answer says why.
                EarlyEnd::Stream(_) => Answer::Given(answer.await),
            },
            () = hopeless => Answer::Missing,
        }
    };
    match answer {
        Answer::Given(Ok(DialResponse::Connected)) => Ok((send, recv)),
        Answer::Given(Ok(DialResponse::Refused { reason, detail })) => {
            let agent = (info.kind, &*info.identity.name);
            send.reset(reason);
            recv.stop(reason);
            Err(Failed {
                error: DialError::refused(agent, &request.destination, reason, detail),
                safe: reason.class() == CloseClass::NotDialled,
            })
        }
        Answer::Given(Err(error)) => {
            let reason = match &error {
                HeadError::Malformed(_) => CloseReason::ProtocolError,
                HeadError::End(RecvEnd::Finished) => CloseReason::LinkLost,
                HeadError::End(RecvEnd::Reset(reason) | RecvEnd::Link(reason)) => *reason,
            };
            // A tunnel that its agent declines serves no stream, and an agent that ends for want of
            // anything to serve has dialled nothing that it did not answer.
            let unserved = [CloseReason::DuplicateServer, CloseReason::Draining].contains(&reason);
            Err(lost(reason, unserved || !touched.get()))
        }
        Answer::Missing => {
            send.reset(CloseReason::Cancelled);
            recv.stop(CloseReason::Cancelled);
            Err(lost(CloseReason::DialTimeout, true))
        }
        Answer::Unwanted => {
            send.reset(CloseReason::Cancelled);
            recv.stop(CloseReason::Cancelled);
            let text = "the client went away while its connection was dialled";
            Err(Failed {
                error: DialError::new(CloseReason::Cancelled, Closer::Client, text),
                safe: false,
            })
        }
    }
}

/// What became of a request.
enum Answer {
    /// The agent's answer, or the end of the stream.
    Given(Result<DialResponse, HeadError>),
    /// None came in time.
    Missing,
    /// The client has gone.
    Unwanted,
}

/// A fresh connection id.
pub(super) fn connection_id() -> ConnectionId {
    let mut id = [0; 16];
    // Ids are for logs: without random numbers they repeat, and TLS has failed before.
    let _ = aws_lc_rs::rand::fill(&mut id);
    ConnectionId(id)
}

/// Counts a stream on its link until it is dropped.
#[derive(Debug)]
pub(super) struct OnLink(Arc<LinkInfo>);

impl OnLink {
    /// Counts one, and that its agent has not answered yet.
    ///
    /// # Errors
    /// The bound that lets no more on this link.
    fn new(link: &Arc<LinkInfo>, limits: &LimitsConfig) -> Result<(Self, Unanswered), Limit> {
        let is_over = |count: i64, most| usize::try_from(count).is_ok_and(|count| count >= most);
        // Dropped, they count no more.
        let streams = link.streams.fetch_add(1, Ordering::Relaxed);
        let on_link = Self(link.clone());
        let dials = link.unanswered.fetch_add(1, Ordering::Relaxed);
        let unanswered = Unanswered(link.clone());
        if is_over(streams, limits.connections_per_tunnel) {
            Err(Limit::ConnectionsPerTunnel)
        } else if is_over(dials, limits.dials_per_tunnel) {
            Err(Limit::DialsPerTunnel)
        } else {
            Ok((on_link, unanswered))
        }
    }
}

/// A dial that counts on its link until it is dropped.
struct Unanswered(Arc<LinkInfo>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.unanswered.fetch_sub(1, Ordering::Relaxed);
    }
}

impl std::ops::Deref for OnLink {
    type Target = LinkInfo;

    fn deref(&self) -> &LinkInfo {
        &self.0
    }
}

impl Drop for OnLink {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}
