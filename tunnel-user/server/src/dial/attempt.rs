//! One attempt of a dial: passes the circuit breaker, takes a place on the link, and asks its agent
//! until the deadline.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::{Instant, timeout_at};
use tunnel_proto::preface::DialRequest;

use super::ask::Exchange;
use super::breaker::{BreakerPass, outcome};
use super::error::{Failed, full, too_late};
use super::plan::{Ask, Failure};
use super::suspicion::Suspicion;
use super::{Dial, Dialled, permit};
use crate::breaker::Outcome;
use crate::early::Cursor;
use crate::routes::LinkInfo;
use crate::shard::Shard;
use cpc_datapath::LocalSocket;

impl Dial {
    /// Asks an agent if the breaker lets the dial through, and tells the breaker the outcome.
    pub(super) async fn attempt(
        &mut self,
        shard: &Rc<Shard>,
        ask: Ask<Arc<LinkInfo>>,
        local: &impl LocalSocket,
    ) -> Result<Dialled, Failed> {
        let pass = BreakerPass::new(shard, || self.target());
        let pass = pass.map_err(|error| Failed {
            failure: Failure::CircuitOpen,
            error,
        })?;
        let link = ask.candidate.clone();
        let asked = self.ask(shard, ask, local).await;
        let silent = link.silent.load(Ordering::Relaxed);
        let outcome = asked.as_ref().map_or_else(
            |failed| outcome(&failed.error, silent),
            |_| Outcome::Answered,
        );
        pass.settle(outcome, || self.target());
        asked
    }

    async fn ask(
        &mut self,
        shard: &Rc<Shard>,
        ask: Ask<Arc<LinkInfo>>,
        local: &impl LocalSocket,
    ) -> Result<Dialled, Failed> {
        let link = &ask.candidate;
        self.record.peer = Some(link.identity.name.clone());
        let permits = permit::acquire(link, &shard.limits);
        let (permit, _unanswered) = permits.map_err(|limit| {
            shard.metrics.limits.refuse(limit.label());
            Failed {
                failure: Failure::NotAsked,
                error: full(&shard.limits, link, limit),
            }
        })?;
        let request = DialRequest {
            session: None,
            id: self.record.id,
            destination: self.record.destination.clone(),
            deadline: ask.time_left,
            attempt: ask.attempt,
        };
        let suspicion = Suspicion {
            shard,
            link,
            asked_at: Instant::now(),
            patience: ask.patience,
            tenant: &self.tenant,
            host: &request.destination.host,
            alternatives: self.plan.alternatives(),
        };
        let exchange = Exchange {
            shard,
            link,
            request: &request,
            local,
        };
        let deadline = self.deadline();
        let mut cursor = Cursor::default();
        let run = exchange.run(
            &mut self.plan,
            &mut self.early,
            &mut cursor,
            suspicion.wait(),
        );
        let Ok(connected) = timeout_at(deadline, Box::pin(run)).await else {
            return Err(Failed {
                failure: Failure::DeadlineOver,
                error: too_late(&shard.limits, &self.record),
            });
        };
        let (send, recv) = connected?;
        let (unsent, sent) = self.early.rest(cursor);
        Ok(Dialled {
            send,
            recv,
            unsent,
            sent,
            permit,
            budget: shard.tenants.of(&self.tenant).budget.clone(),
        })
    }
}
