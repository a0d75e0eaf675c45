//! The driver of a dial: looks agents up, asks one over its link, and hands every event to the plan,
//! which decides whether another is asked.
//!
//! A dial goes to the shard of the link that is asked: usually once, before any agent is asked. For a
//! client that can't move (one of gRPC), a bridge carries the dial instead.

mod ask;
mod attempt;
mod breaker;
pub(super) mod error;
mod look_up;
pub(super) mod permit;
mod plan;
mod suspicion;

use std::rc::Rc;
use std::sync::Arc;

use tokio::time::Instant;
use tunnel_proto::preface::ConnectionId;

use self::error::{DialError, Failed, no_route};
use self::look_up::look_up;
use self::permit::StreamPermit;
use self::plan::{Action, Candidate, Plan};
use super::early::EarlyBytes;
use super::link::{LinkRecv, LinkSend};
use super::permits::DialPermit;
use super::routes::{LinkId, LinkInfo, RouteError};
use super::shard::{Shard, Target};
use cpc_datapath::{Budget, LocalSocket, Progress};
use cpc_host::random;
use cpc_host::report::report;
use cpc_identity::TrustDomain;
use cpc_observe::access::Record;
use cpc_observe::metrics::GaugeGuard;

impl Candidate for Arc<LinkInfo> {
    type Id = LinkId;

    fn id(&self) -> LinkId {
        self.id
    }
}

/// A dial that succeeded.
#[derive(Debug)]
pub(super) struct Dialled {
    /// Towards the target.
    pub send: LinkSend,
    /// From the target.
    pub recv: LinkRecv,
    /// The client's early bytes that the stream has not carried.
    pub unsent: Progress,
    /// The number of early bytes that it has carried.
    pub sent: usize,
    /// Counts the stream on its link.
    pub permit: StreamPermit,
    /// Bounds unread bytes.
    pub budget: Budget,
}

/// The progress of a dial.
pub(super) enum Step {
    /// The target is connected.
    Dialled(Box<Dialled>),
    /// The link to ask next lives on this other shard: continue there.
    Elsewhere(usize),
}

/// A dial under way, which may go from shard to shard.
pub(super) struct Dial {
    /// The request, and its outcome.
    pub record: Box<Record>,
    tenant: TrustDomain,
    early: EarlyBytes,
    plan: Plan<Arc<LinkInfo>, DialError>,
    /// Counts the dial while it is under way.
    pending: Option<(Option<GaugeGuard>, DialPermit)>,
}

impl Dial {
    /// A dial of `record`'s destination, for a client of `tenant`.
    pub(super) fn new(
        shard: &Shard,
        record: Record,
        tenant: &TrustDomain,
        (mut early, permit): (EarlyBytes, DialPermit),
    ) -> Self {
        early.charge_to(shard.tenants.of(tenant).budget.clone());
        let deadline = Instant::now() + shard.limits.dial_timeout;
        let observed = shard.observer.as_ref().map(|it| it.dial_begins());
        Self {
            record: Box::new(record),
            tenant: tenant.clone(),
            early,
            plan: Plan::new(deadline.into_std()),
            pending: Some((observed, permit)),
        }
    }

    /// Returns the record of a dial that succeeded, and the client's tenant.
    pub(super) fn into_record(self) -> (Box<Record>, TrustDomain) {
        (self.record, self.tenant)
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
        self.run_and_count(shard, local, true).await
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
        match self.run_and_count(shard, local, false).await? {
            Step::Dialled(dialled) => Ok(*dialled),
            // Only a dial that may move does.
            Step::Elsewhere(_) => Err(no_route(RouteError::NoRoute, &self.record)),
        }
    }

    async fn run_and_count(
        &mut self,
        shard: &Rc<Shard>,
        local: &impl LocalSocket,
        may_move: bool,
    ) -> Result<Step, DialError> {
        let step = self.run(shard, local, may_move).await;
        if let Ok(Step::Elsewhere(_)) = step {
            return step;
        }
        if let Some(observer) = &shard.observer {
            match &step {
                Ok(_) => observer.dialled(self.record.start.elapsed()),
                Err(error) => observer.dial_failed(error),
            }
        }
        self.pending = None;
        step
    }

    async fn run(
        &mut self,
        shard: &Rc<Shard>,
        local: &impl LocalSocket,
        may_move: bool,
    ) -> Result<Step, DialError> {
        loop {
            match self.plan.next(Instant::now().into_std()) {
                Action::LookUp => {
                    let host = &self.record.destination.host;
                    let found = look_up(shard, &self.tenant, host, self.deadline()).await;
                    let found = found.map_err(|error| no_route(error, &self.record));
                    self.plan.found(found);
                }
                Action::Ask(ask) if may_move && ask.candidate.shard != shard.index => {
                    return Ok(Step::Elsewhere(ask.candidate.shard));
                }
                Action::Ask(ask) => {
                    let agent = ask.candidate.clone();
                    match self.attempt(shard, ask, local).await {
                        Ok(dialled) => {
                            self.plan.connected();
                            return Ok(Step::Dialled(Box::new(dialled)));
                        }
                        Err(Failed { failure, error }) => {
                            if let Some(error) = self.plan.failed(failure, error) {
                                let agent = &agent.identity;
                                tracing::debug!(%agent, error = report(error), "trying another agent");
                            }
                        }
                    }
                }
                Action::GiveUp(error) => {
                    let no_route = || no_route(RouteError::NoRoute, &self.record);
                    return Err(error.unwrap_or_else(no_route));
                }
            }
        }
    }

    fn deadline(&self) -> Instant {
        Instant::from_std(self.plan.deadline())
    }

    /// The key of this dial in the breaker.
    fn target(&self) -> Target {
        (self.tenant.clone(), self.record.destination.clone())
    }
}

/// A fresh connection id.
pub(super) fn connection_id() -> ConnectionId {
    let mut id = [0; 16];
    // Ids are for logs: without random numbers they repeat, and TLS has failed before.
    let _ = random::fill(&mut id);
    ConnectionId(id)
}
