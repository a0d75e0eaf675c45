//! One dial: choose a link, ask its agent, and if that is safe ask another.
//!
//! A dial goes to the shard of the link that is asked: usually once, before anybody is asked. A client
//! that can't go along has his dial carried over a bridge instead.
//!
//! Invariant: a request never runs twice. Another agent is asked only when the first one answered
//! that it did not dial, or when nothing of the client's had been sent on its stream.

mod ask;
mod breaker;
mod doubt;
mod error;
mod look_up;
mod on_link;

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::{Instant, timeout_at};
use tunnel_proto::preface::{ConnectionId, DialRequest, StreamKind};

use self::ask::{Failed, try_link};
use self::breaker::{Attempt, outcome};
use self::doubt::{Others, doubtful};
use self::error::{full, no_route, too_late};
use self::look_up::candidates;
use self::on_link::OnLink;
use super::breaker::Outcome;
use super::early::{Cursor, EarlyBytes};
use super::link::{LinkRecv, LinkSend};
use super::routes::{LinkId, LinkInfo, MAX_CANDIDATES, RouteError};
use super::shard::{Dialling, Shard, Target};
use cpc_datapath::{Budget, LocalSocket, Outbound};
use cpc_host::report::report;
use cpc_identity::TrustDomain;
use cpc_observe::access::Record;
use cpc_observe::konnectivity::Counted;

pub(super) use error::DialError;

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

/// A fresh connection id.
pub(super) fn connection_id() -> ConnectionId {
    let mut id = [0; 16];
    // Ids are for logs: without random numbers they repeat, and TLS has failed before.
    let _ = aws_lc_rs::rand::fill(&mut id);
    ConnectionId(id)
}
