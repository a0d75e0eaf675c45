//! The decisions of the control task. Sans-IO: the requests of a batch in, effects out, in the order in
//! which they have to be carried out.
//!
//! Invariants: an agent learns its verdict only after the routes behind it are in force. An earlier process
//! ends only then, too: what ends with it is dialled again over the links that have come.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tunnel_proto::route::Claim;
use tunnel_proto::session::InstanceId;

use crate::grants::Grants;
use crate::limits::Limit;
use crate::registry::{Backends, Registry, Verdict};
use crate::routes::{LinkId, LinkInfo, Routes};

/// Pause after a change of the routes, as a multiple of its duration: changes meanwhile count as one.
/// So agents that change their offers all the time get a fifth of one core, however many they are.
const PAUSE_FACTOR: u32 = 4;

/// Maximum pause.
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// Returns the pause after a change of the routes that took `work`.
pub(super) fn pause_after(work: Duration) -> Duration {
    (work * PAUSE_FACTOR).min(MAX_PAUSE)
}

/// A change of the registry.
#[derive(Debug)]
pub(super) enum Change {
    /// A session begins.
    Connect {
        info: Arc<LinkInfo>,
        instance: InstanceId,
        predecessor: Option<InstanceId>,
        offer: Vec<Claim>,
    },
    /// A session offers other claims.
    Offer(LinkId, Vec<Claim>),
    /// A link became available, or ceased to be.
    Availability(LinkId),
    /// A session has ended.
    Disconnect(LinkId),
    /// There is another policy.
    Grants(Box<Grants>),
}

/// An effect of a batch. `T` is the means to answer a request.
#[derive(Debug)]
pub(super) enum Effect<T> {
    /// Put these routes in force.
    Publish(Box<Snapshot>),
    /// Check the earlier processes of an agent that has just connected.
    Succeed(LinkId, Option<InstanceId>),
    /// Answer a request.
    Answer(T, Verdict),
}

/// Publication of a change of the routes.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// The routes.
    pub routes: Arc<Routes>,
    /// Number of routes of all tenants and of the one that has most, and the bounds that refused claims.
    pub usage: ((usize, usize), Vec<Limit>),
    /// Number of available agents.
    pub backends: Backends,
}

/// Requests that arrived together, and what they have changed so far.
#[derive(Debug)]
pub(super) struct Batch<'a, T> {
    registry: &'a mut Registry,
    now: Instant,
    changed: bool,
    /// New links, and the processes that their agents know to have ended.
    arrived: Vec<(LinkId, Option<InstanceId>)>,
    verdicts: Vec<(T, Verdict)>,
}

impl<'a, T> Batch<'a, T> {
    /// Begins a batch: what has expired by `now` is a change.
    pub(super) fn new(registry: &'a mut Registry, now: Instant) -> Self {
        let changed = registry.expire(now);
        Self {
            registry,
            now,
            changed,
            arrived: Vec::new(),
            verdicts: Vec::new(),
        }
    }

    /// Applies a change. `answer` gets the verdict, where there is one.
    pub(super) fn apply(&mut self, change: Change, answer: Option<T>) {
        let now = self.now;
        match change {
            Change::Connect {
                info,
                instance,
                predecessor,
                offer,
            } => {
                self.arrived.push((info.id, predecessor));
                let verdict = self.registry.connect(info, instance, offer, now);
                self.changed = true;
                self.verdicts.extend(answer.map(|answer| (answer, verdict)));
            }
            Change::Offer(link, offer) => {
                if let Some(verdict) = self.registry.offer(link, offer, now) {
                    // An offer that is repeated changes nothing.
                    self.changed |= verdict.is_new;
                    self.verdicts.extend(answer.map(|answer| (answer, verdict)));
                }
            }
            Change::Availability(link) => {
                self.registry.changed(link, now);
                self.changed = true;
            }
            Change::Disconnect(link) => {
                self.registry.disconnect(link, now);
                self.changed = true;
            }
            Change::Grants(grants) => {
                self.registry.set_grants(*grants, now);
                self.changed = true;
            }
        }
    }

    /// Returns the registry, to read from.
    pub(super) fn registry(&self) -> &Registry {
        self.registry
    }

    /// Ends the batch. Returns whether routes may have changed, and the effects in order.
    pub(super) fn finish(self) -> (bool, Vec<Effect<T>>) {
        let snapshot = self.changed.then(|| snapshot(self.registry));
        let arrived = self.arrived.into_iter();
        let effects = { snapshot.into_iter().map(Box::new).map(Effect::Publish) }
            .chain(arrived.map(|(link, predecessor)| Effect::Succeed(link, predecessor)))
            .chain(
                self.verdicts
                    .into_iter()
                    .map(|(to, verdict)| Effect::Answer(to, verdict)),
            );
        (self.changed, effects.collect())
    }
}

/// Returns what the registry publishes.
pub(super) fn snapshot(registry: &mut Registry) -> Snapshot {
    Snapshot {
        routes: Arc::new(registry.routes()),
        usage: registry.take_usage(),
        backends: registry.backends(),
    }
}

#[cfg(test)]
mod tests;
