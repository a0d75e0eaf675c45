//! The registry of connected agents and their claims. Sans-I/O: events in, snapshots of the routes out.
//!
//! Claims belong to an identity, not to a session. Sessions of one identity coexist (a restart, a
//! rollout, several tunnels); those of its newest process take new dials, the older ones drain. A node
//! address belongs to one identity at a time, and to the one that has it in its certificate before one
//! that is merely granted it; ranges, names and the default route may be shared. An agent that is heard
//! comes before a silent one in both.
//!
//! Agents of other systems usually share one certificate or service account: there each process takes
//! dials beside the others. Those without proof of their claims own nothing.

mod claims;
mod shares;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tunnel_proto::route::Claim;
use tunnel_proto::session::{InstanceId, Refusal};

use self::claims::{Key, addresses, alone, certified, for_entries, key};
pub use self::shares::RouteBounds;
use self::shares::{Shares, cost};
use super::grants::Grants;
use super::limits::Limit;
use super::routes::{Absence, Departed, LinkId, LinkInfo, Routes, Trust};
use cpc_config::server::{LimitsConfig, Strategy};
use cpc_identity::Identity;

/// Maximum number of tunnels of one identity: a few for each process, and several processes in a
/// rollout.
const MAX_LINKS: usize = 32;

/// Maximum number of remembered claims of departed agents.
const MAX_DEPARTED: usize = 20_000;

/// Time since the last packet within which an agent is not challenged when others claim its address.
const RECENTLY: Duration = Duration::from_secs(1);

/// A connected agent.
#[derive(Debug)]
pub struct Session {
    /// State that shards and the control task share.
    pub info: Arc<LinkInfo>,
    /// Process of the agent.
    pub instance: InstanceId,
    /// Whether the agent was reported silent.
    silent: bool,
    /// Offered claims.
    pub offer: Vec<Claim>,
    /// Accepted claims.
    pub claims: Vec<Claim>,
    /// Refused claims.
    pub refused: Vec<Refusal>,
    /// Whether some claims had no room.
    crowded: bool,
}

/// Number of available agents: processes, of which each may hold several links.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backends {
    /// Number of all.
    pub all: usize,
    /// Number by the configured strategies, in their order.
    pub by_strategy: Vec<(Strategy, usize)>,
}

impl Session {
    /// Returns the strength of the right to a node address; among equals the first one has it.
    fn right(&self, claim: &Claim) -> (bool, bool) {
        (!self.silent, certified(&self.info, claim))
    }

    fn verdict(&self) -> Verdict {
        Verdict {
            accepted: self.claims.clone(),
            refused: self.refused.clone(),
            is_new: true,
        }
    }
}

/// Verdict of the server on an offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Accepted claims.
    pub accepted: Vec<Claim>,
    /// Refused claims, with reasons.
    pub refused: Vec<Refusal>,
    /// Whether it differs from the last verdict on the same session.
    pub is_new: bool,
}

#[derive(Debug)]
struct Memory {
    departed: Departed,
    at: Instant,
}

/// Ends a silent link of a process that has a successor. All its sessions end where that is `proven`, or
/// where no link of the process is heard.
fn end_process(info: &LinkInfo, proven: bool) {
    if let Some(process) = info.process.get()
        && (proven || !process.is_heard())
    {
        process.end();
    }
    info.replaced.notify_one();
}

/// All sessions of a server.
#[derive(Debug)]
pub struct Registry {
    grants: Grants,
    strategies: Arc<[Strategy]>,
    forget: Duration,
    sessions: BTreeMap<LinkId, Session>,
    /// Holders of each claim: the inverse of `sessions`.
    holders: HashMap<Key, BTreeSet<LinkId>>,
    /// Number of claims by tenant and agent.
    shares: Shares,
    bounds: RouteBounds,
    /// Bounds that had no room for a claim since the last call, once per claim.
    crowded: Vec<Limit>,
    departed: HashMap<Key, Memory>,
}

impl Registry {
    /// Creates an empty registry. `forget` is the time for which departed agents are remembered.
    pub fn new(grants: Grants, strategies: &[Strategy], forget: Duration) -> Self {
        Self {
            grants,
            strategies: strategies.into(),
            forget,
            sessions: BTreeMap::new(),
            holders: HashMap::new(),
            shares: Shares::default(),
            bounds: RouteBounds::from(&LimitsConfig::default()),
            crowded: Vec::new(),
            departed: HashMap::new(),
        }
    }

    /// Bounds the table of routes.
    #[must_use]
    pub fn bounded(mut self, bounds: RouteBounds) -> Self {
        self.bounds = bounds;
        self
    }

    /// Returns the number of routes of all tenants and of the one that has most, and the bounds that
    /// refused claims since the last call, once per claim.
    pub(crate) fn take_usage(&mut self) -> ((usize, usize), Vec<Limit>) {
        (self.shares.taken(), std::mem::take(&mut self.crowded))
    }

    /// Adds a session.
    pub fn connect(
        &mut self,
        info: Arc<LinkInfo>,
        instance: InstanceId,
        offer: Vec<Claim>,
        now: Instant,
    ) -> Verdict {
        self.make_room(&info);
        let link = info.id;
        let session = Session {
            info,
            instance,
            silent: false,
            offer: offer.into_iter().map(alone).collect(),
            claims: Vec::new(),
            refused: Vec::new(),
            crowded: false,
        };
        self.sessions.insert(link, session);
        self.settle([link].into(), now);
        self.challenge_owners(link);
        // The session was added above, and judging removes none.
        self.sessions[&link].verdict()
    }

    /// Ends the oldest links of an identity that has more than enough: one stolen certificate must not
    /// use up the places of all others. Agents of other systems may share one.
    fn make_room(&self, info: &LinkInfo) {
        if !info.kind.is_native() {
            return;
        }
        let links = self.sessions.values().map(|session| &session.info);
        let own = links.filter(|l| l.kind.is_native() && l.identity == info.identity);
        let own: Vec<_> = own.collect();
        // Those that were told before are still there until they have ended.
        let surplus = (own.len() + 1).saturating_sub(MAX_LINKS);
        for link in &own[..surplus] {
            tracing::warn!(agent = %link.identity, "too many tunnels of one agent, the oldest ends");
            link.replaced.notify_one();
        }
    }

    /// Checks the earlier processes of an agent that has just connected. One that `predecessor` proves
    /// to have ended, or that is silent, ends at once with its streams. Any other is challenged, and
    /// goes on when it answers, as in a rollout.
    ///
    /// Agents of other systems prove nothing, and one of their processes may have several streams: only
    /// a silent stream of the same process ends.
    pub fn succeed(&self, link: LinkId, predecessor: Option<InstanceId>) {
        let Some(new) = self.sessions.get(&link) else {
            return;
        };
        for old in self.other_links(new) {
            let info = &old.info;
            match info.kind.is_native() {
                true if old.instance == new.instance => {}
                true if old.silent || predecessor == Some(old.instance) => {
                    let proven = predecessor == Some(old.instance);
                    tracing::info!(
                        agent = %info.identity, instance = %old.instance, proven,
                        "an earlier process of the agent has ended, and so do its connections"
                    );
                    end_process(info, proven);
                }
                true => info.challenged.notify_one(),
                false if old.silent && old.instance == new.instance => {
                    info.replaced.notify_one();
                }
                false => {}
            }
        }
    }

    /// Returns other sessions of the same identity over the same protocol.
    fn other_links<'a>(&'a self, of: &'a Session) -> impl Iterator<Item = &'a Session> {
        let (id, native) = (of.info.id, of.info.kind.is_native());
        let identity = (&of.info.identity.trust_domain, &of.info.identity.name);
        self.sessions.values().filter(move |session| {
            let info = &session.info;
            let own = (&info.identity.trust_domain, &info.identity.name);
            info.kind.is_native() == native && own == identity && info.id != id
        })
    }

    /// Notes whether a link is silent, by its [`LinkInfo`]. Claims that a silent agent was first to
    /// make may be another's now; an agent that has a successor ends.
    pub fn changed(&mut self, link: LinkId, now: Instant) {
        let Some(session) = self.sessions.get_mut(&link) else {
            return;
        };
        let silent = session.info.silent.load(Ordering::Relaxed);
        if std::mem::replace(&mut session.silent, silent) == silent {
            return;
        }
        if !silent {
            return self.settle([link].into(), now);
        }
        let held = addresses(&session.info, &session.claims).collect();
        self.end_if_succeeded(link);
        self.settle(self.waiting_for(&held), now);
    }

    /// Ends a silent link of an agent whose later process is heard.
    fn end_if_succeeded(&self, link: LinkId) {
        let Some(session) = self.sessions.get(&link) else {
            return;
        };
        let successor = self.other_links(session).find(|other| {
            let is_later = other.info.id > link && other.instance != session.instance;
            other.info.kind.is_native() && is_later && !other.silent
        });
        if let Some(successor) = successor {
            tracing::info!(
                agent = %session.info.identity, instance = %session.instance,
                successor = %successor.instance,
                "a silent process of the agent has a successor, and its connections end"
            );
            end_process(&session.info, false);
        }
    }

    /// Replaces a session's offer. Returns `None` when the session is gone.
    pub fn offer(&mut self, link: LinkId, offer: Vec<Claim>, now: Instant) -> Option<Verdict> {
        let session = self.sessions.get_mut(&link)?;
        let offer = offer.into_iter().map(alone).collect();
        let before = session.verdict();
        if session.offer == offer {
            return Some(Verdict {
                is_new: false,
                ..before
            });
        }
        session.offer = offer;
        self.settle([link].into(), now);
        self.challenge_owners(link);
        let verdict = self.sessions.get(&link)?.verdict();
        let is_new = verdict != before;
        Some(Verdict { is_new, ..verdict })
    }

    /// Challenges the holders of node addresses that `link` offers too. One that was heard a moment ago
    /// is skipped: however often an address is claimed, its owner is seldom challenged.
    fn challenge_owners(&self, link: LinkId) {
        let Some(session) = self.sessions.get(&link) else {
            return;
        };
        let offered = session.offer.iter();
        let refused = offered.filter(|claim| !session.claims.contains(claim));
        for holder in refused.flat_map(|claim| self.rivals(&session.info, claim)) {
            let is_native = holder.info.kind.is_native();
            if is_native && !holder.silent && holder.info.probe.path().since_packet >= RECENTLY {
                holder.info.challenged.notify_one();
            }
        }
    }

    /// Removes a session, and remembers its claims. Agents that were refused them may get them now.
    pub fn disconnect(&mut self, link: LinkId, now: Instant) {
        if let Some(session) = self.sessions.remove(&link) {
            let freed = addresses(&session.info, &session.claims).collect();
            self.release(&session.info, session.claims, now);
            let mut waiting = self.waiting_for(&freed);
            let crowded = self.sessions.values().filter(|session| session.crowded);
            waiting.extend(crowded.map(|session| session.info.id));
            self.settle(waiting, now);
        }
    }

    /// Replaces the policy, and judges every session's offer by it.
    pub fn set_grants(&mut self, grants: Grants, now: Instant) {
        self.grants = grants;
        self.settle(self.sessions.keys().copied().collect(), now);
    }

    /// Judges the offers of `links`, and of all agents that gain or lose by the result.
    ///
    /// Terminates: an agent that has displaced another can't be displaced, because the right of each
    /// stays the same, and one that gains a node address gives up none for it.
    fn settle(&mut self, mut links: BTreeSet<LinkId>, now: Instant) {
        while !links.is_empty() {
            let (mut freed, mut again) = (HashSet::new(), BTreeSet::new());
            for link in links {
                self.judge_one(link, now, &mut freed, &mut again);
            }
            again.extend(self.waiting_for(&freed));
            links = again;
        }
    }

    /// Judges an offer. Adds the released node addresses, and the links that lose theirs.
    fn judge_one(
        &mut self,
        link: LinkId,
        now: Instant,
        freed: &mut HashSet<Key>,
        displaced: &mut BTreeSet<LinkId>,
    ) {
        let Some(session) = self.sessions.get(&link) else {
            return;
        };
        let info = session.info.clone();
        let mut verdict = self.judge(session, session.offer.clone());
        let crowded = self.fit(&info, &mut verdict);
        let Some(session) = self.sessions.get(&link) else {
            return;
        };
        let before = session.claims.clone();
        let kept: HashSet<_> = verdict.accepted.iter().collect();
        freed.extend(addresses(&info, &before).filter(|(_, claim)| !kept.contains(claim)));
        self.release(&info, before, now);
        displaced.extend(self.weaker_holders(link, &verdict.accepted));
        self.hold(&info, &verdict.accepted);
        if let Some(session) = self.sessions.get_mut(&link) {
            session.claims = verdict.accepted;
            session.refused = verdict.refused;
            session.crowded = crowded;
        }
    }

    /// Refuses accepted claims that the table of routes has no room for. Returns whether there was any.
    /// A node's own addresses come before all other claims of its agent.
    fn fit(&mut self, info: &LinkInfo, verdict: &mut Verdict) -> bool {
        let tenant = &info.identity.trust_domain;
        let held_by_others = |claim: &Claim| {
            let holders = self.holders.get(&key(info, claim));
            holders.is_some_and(|holders| holders.iter().any(|id| *id != info.id))
        };
        let siblings = self.siblings(info);
        let (mut room, limit) = self.shares.room(&self.bounds, tenant);
        // While its offer is judged, what a link holds by itself is free.
        let before = self.sessions.get(&info.id).map(|it| &it.claims);
        let before: HashSet<_> = before.into_iter().flatten().collect();
        room += { before.into_iter() }
            .filter(|claim| !held_by_others(claim))
            .map(cost)
            .sum::<usize>();
        let mut own_room = self.bounds.per_agent.saturating_sub(siblings.len());

        let mut order: Vec<_> = (0..verdict.accepted.len()).collect();
        order.sort_by_key(|at| !certified(info, &verdict.accepted[*at]));
        let mut decided: Vec<Option<Limit>> = vec![None; verdict.accepted.len()];
        let mut seen = HashSet::new();
        for at in order {
            let claim = &verdict.accepted[at];
            if !seen.insert(claim) {
                continue;
            }
            let is_known = siblings.contains(claim);
            let needed = if held_by_others(claim) {
                0
            } else {
                cost(claim)
            };
            if !is_known && own_room == 0 {
                decided[at] = Some(Limit::RoutesPerAgent);
            } else if needed > room {
                decided[at] = Some(limit);
            } else {
                room -= needed;
                own_room -= usize::from(!is_known);
            }
        }
        let (bounds, crowded) = (self.bounds, &mut self.crowded);
        let mut decided = decided.into_iter();
        let refused = &mut verdict.refused;
        let before = crowded.len();
        verdict.accepted.retain(|claim| {
            let Some(limit) = decided.next().flatten() else {
                return true;
            };
            crowded.push(limit);
            refused.push(Refusal {
                claim: claim.to_string(),
                why: bounds.text(limit),
            });
            false
        });
        crowded.len() > before
    }

    /// Returns the claims of other links of the same agent. Agents of other systems may share an
    /// identity: there each process is an agent of its own.
    fn siblings(&self, info: &LinkInfo) -> HashSet<Claim> {
        let is_sibling = |other: &LinkInfo| {
            info.kind.is_native()
                && other.kind.is_native()
                && other.id != info.id
                && other.identity == info.identity
        };
        let siblings = self.sessions.values().filter(|it| is_sibling(&it.info));
        siblings.flat_map(|it| it.claims.iter().cloned()).collect()
    }

    /// Returns the links that offer one of these node addresses and do not serve it.
    fn waiting_for(&self, freed: &HashSet<Key>) -> BTreeSet<LinkId> {
        if freed.is_empty() {
            return BTreeSet::new();
        }
        let waits = |session: &&Session| {
            let mut offered = addresses(&session.info, &session.offer);
            offered.any(|key| freed.contains(&key) && !session.claims.contains(&key.1))
        };
        // What is offered and not served is refused: that is rare, and to look for it costs less.
        let refused = { self.sessions.values() }.filter(|session| !session.refused.is_empty());
        let waiting = refused.filter(waits);
        waiting.map(|session| session.info.id).collect()
    }

    /// Drops memories that are older than `forget`. Returns whether any was.
    pub fn expire(&mut self, now: Instant) -> bool {
        let before = self.departed.len();
        let forget = self.forget;
        self.departed
            .retain(|_, memory| now.saturating_duration_since(memory.at) < forget);
        self.departed.len() != before
    }

    /// Iterates over the sessions, oldest first.
    pub fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.sessions.values()
    }

    /// Whether there is a session of process `instance` of an agent.
    pub fn holds(&self, identity: &Identity, instance: InstanceId) -> bool {
        let mut sessions = self.sessions.values();
        sessions.any(|session| {
            let own = &session.info.identity;
            let own = (&own.trust_domain, &own.name, session.instance);
            own == (&identity.trust_domain, &identity.name, instance)
        })
    }

    /// Returns the number of agents that are available now: in all, and for each strategy.
    pub fn backends(&self) -> Backends {
        let count = |serves: &dyn Fn(&Session) -> bool| {
            let sessions = self.sessions.values();
            let asked = sessions.filter(|s| s.info.is_available() || s.info.is_last_resort());
            let agents = asked.filter(|session| serves(session)).map(|session| {
                let identity = &session.info.identity;
                (&identity.trust_domain, &identity.name, session.instance)
            });
            agents.collect::<HashSet<_>>().len()
        };
        let is_default = |claim: &Claim| *claim == Claim::DefaultRoute;
        let by_strategy = self.strategies.iter().map(|&strategy| {
            let count = match strategy {
                Strategy::Default => count(&|s| self.may_serve_everything(&s.info)),
                Strategy::DestHost => count(&|s| s.claims.iter().any(|claim| !is_default(claim))),
                Strategy::DefaultRoute => count(&|s| s.claims.iter().any(is_default)),
            };
            (strategy, count)
        });
        Backends {
            all: count(&|_| true),
            by_strategy: by_strategy.collect(),
        }
    }

    /// Returns the present routes.
    pub fn routes(&self) -> Routes {
        let mut routes = Routes {
            strategies: self.strategies.clone(),
            ..Routes::default()
        };
        let any = self.strategies.contains(&Strategy::Default);
        let chosen = self.newest();
        for session in self.sessions.values() {
            if !chosen.contains(&session.info.id) {
                continue;
            }
            let tenant = &session.info.identity.trust_domain;
            for claim in &session.claims {
                for_entries(&mut routes, tenant, claim, |entry| {
                    entry.links.push(session.info.clone());
                });
            }
            if any && self.may_serve_everything(&session.info) {
                let routes = routes.tenants.entry(tenant.clone()).or_default();
                routes.any.links.push(session.info.clone());
            }
        }
        let mut connected = HashSet::new();
        if !self.departed.is_empty() {
            // Agents of other systems may share a name.
            let links = self.sessions.values().map(|session| &session.info);
            let own = links.filter(|link| link.kind.is_native());
            connected.extend(own.map(|l| (&l.identity.trust_domain, &l.identity.name)));
        }
        for ((tenant, claim), memory) in &self.departed {
            let mut departed = memory.departed.clone();
            if connected.contains(&(tenant, &departed.name)) {
                departed.absence = Absence::Elsewhere;
            }
            for_entries(&mut routes, tenant, claim, |entry| {
                entry.departed = Some(departed.clone());
            });
        }
        routes
    }

    /// Returns, for each identity, the links of its newest process that can take dials; all of its
    /// links when none can.
    fn newest(&self) -> HashSet<LinkId> {
        let mut by_identity: HashMap<_, Vec<&Session>> = HashMap::new();
        for session in self.sessions.values() {
            let identity = &session.info.identity;
            let process = (!session.info.kind.is_native()).then_some(session.instance);
            by_identity
                .entry((&identity.trust_domain, &identity.name, process))
                .or_default()
                .push(session);
        }
        let mut chosen = HashSet::new();
        for sessions in by_identity.values() {
            let newest = sessions.iter().rev().find(|s| s.info.is_available());
            let taken = sessions
                .iter()
                .filter(|s| newest.is_none_or(|newest| newest.instance == s.instance));
            chosen.extend(taken.map(|s| s.info.id));
        }
        chosen
    }

    fn judge(&self, session: &Session, offer: Vec<Claim>) -> Verdict {
        let info = &session.info;
        if info.trust == Trust::Believed {
            return Verdict {
                accepted: offer,
                refused: Vec::new(),
                is_new: true,
            };
        }
        let (granted, mut refused) = self.grants.cut(&info.identity, offer);
        let mut accepted = Vec::with_capacity(granted.len());
        for claim in granted {
            match self.owner(session, &claim) {
                None => accepted.push(claim),
                Some(owner) => refused.push(Refusal {
                    claim: claim.to_string(),
                    why: format!("the node address is served by {}", owner.info.identity),
                }),
            }
        }
        Verdict {
            accepted,
            refused,
            is_new: true,
        }
    }

    fn may_serve_everything(&self, info: &LinkInfo) -> bool {
        info.trust == Trust::Believed || self.grants.allow_default_route(&info.identity)
    }

    /// Returns another identity of the tenant that holds a node address, with an equal or better right
    /// to it.
    fn owner<'a>(&'a self, session: &'a Session, claim: &Claim) -> Option<&'a Session> {
        let mut rivals = self.rivals(&session.info, claim);
        rivals.find(|holder| holder.right(claim) >= session.right(claim))
    }

    /// Returns the holders of node addresses that `link` has a better right to.
    fn weaker_holders(&self, link: LinkId, claims: &[Claim]) -> BTreeSet<LinkId> {
        let Some(session) = self.sessions.get(&link) else {
            return BTreeSet::new();
        };
        let weaker = |claim| {
            let rivals = self.rivals(&session.info, claim);
            rivals.filter(move |holder| holder.right(claim) < session.right(claim))
        };
        let weaker = claims.iter().flat_map(weaker);
        weaker.map(|holder| holder.info.id).collect()
    }

    /// Returns sessions of other identities of the tenant that hold a node address by right.
    fn rivals<'a>(
        &'a self,
        info: &'a LinkInfo,
        claim: &Claim,
    ) -> impl Iterator<Item = &'a Session> + use<'a> {
        let holders = match claim {
            Claim::Address(_) => self.holders.get(&key(info, claim)),
            _ => None,
        };
        let sessions = holders
            .into_iter()
            .flatten()
            .filter_map(|id| self.sessions.get(id));
        sessions.filter(|holder| {
            let holder = &holder.info;
            holder.trust == Trust::Granted && holder.identity.name != info.identity.name
        })
    }

    fn hold(&mut self, info: &LinkInfo, claims: &[Claim]) {
        for claim in claims {
            let key = key(info, claim);
            self.departed.remove(&key);
            let holders = self.holders.entry(key.clone()).or_default();
            if holders.is_empty() {
                self.shares.add(&key);
            }
            holders.insert(info.id);
        }
    }

    /// Takes claims from a session, and remembers those that no other session holds.
    fn release(&mut self, info: &LinkInfo, claims: Vec<Claim>, now: Instant) {
        let departed = Departed {
            name: info.identity.name.clone(),
            last_seen: info.last_seen(),
            absence: Absence::Disconnected,
        };
        for claim in claims {
            let key = key(info, &claim);
            let Some(holders) = self.holders.get_mut(&key) else {
                continue;
            };
            holders.remove(&info.id);
            if !holders.is_empty() {
                continue;
            }
            self.holders.remove(&key);
            self.shares.remove(&key);
            if self.departed.len() < MAX_DEPARTED {
                let memory = Memory {
                    departed: departed.clone(),
                    at: now,
                };
                self.departed.insert(key, memory);
            }
        }
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
pub(crate) mod tests;
