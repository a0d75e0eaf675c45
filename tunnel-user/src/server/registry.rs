//! Who is connected and what each may serve. Sans-IO: events in, snapshots of the routes out.
//!
//! Claims belong to an identity, not to a session. Sessions of one identity coexist (a restart, a
//! rollout, several tunnels); those of its newest process take new dials, the older ones drain. A
//! node address belongs to one identity at a time; ranges, names and the default route may be
//! shared.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;
use tunnel_proto::route::Claim;
use tunnel_proto::session::{InstanceId, Refusal};

use super::grants::Grants;
use super::routes::{DEFAULT_ROUTES, Departed, Entry, LinkId, LinkInfo, Routes};
use crate::tls::TrustDomain;

/// Claims of departed agents that are remembered at most.
const MAX_DEPARTED: usize = 20_000;

/// A connected agent.
#[derive(Debug)]
pub struct Session {
    /// What shards and control share of it.
    pub info: Arc<LinkInfo>,
    /// Its process.
    pub instance: InstanceId,
    /// What it offers.
    pub offer: Vec<Claim>,
    /// What it serves.
    pub claims: Vec<Claim>,
    /// What it wanted to serve and may not.
    pub refused: Vec<Refusal>,
}

/// What the server says to an offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What it serves from now on.
    pub accepted: Vec<Claim>,
    /// What it may not, and why.
    pub refused: Vec<Refusal>,
}

/// A claim within its tenant.
type Key = (TrustDomain, Claim);

#[derive(Debug)]
struct Memory {
    departed: Departed,
    at: Instant,
}

/// All sessions of a server.
#[derive(Debug)]
pub struct Registry {
    grants: Grants,
    forget: Duration,
    sessions: BTreeMap<LinkId, Session>,
    /// Who holds each claim: the other view of `sessions`.
    holders: HashMap<Key, BTreeSet<LinkId>>,
    departed: HashMap<Key, Memory>,
}

impl Registry {
    /// An empty registry. `forget` is how long departed agents are remembered.
    pub fn new(grants: Grants, forget: Duration) -> Self {
        Self {
            grants,
            forget,
            sessions: BTreeMap::new(),
            holders: HashMap::new(),
            departed: HashMap::new(),
        }
    }

    /// Takes a session in.
    pub fn connect(
        &mut self,
        info: Arc<LinkInfo>,
        instance: InstanceId,
        offer: Vec<Claim>,
    ) -> Verdict {
        let verdict = self.judge(&info, offer.clone());
        self.hold(&info, &verdict.accepted);
        let session = Session {
            instance,
            offer,
            claims: verdict.accepted.clone(),
            refused: verdict.refused.clone(),
            info,
        };
        self.sessions.insert(session.info.id, session);
        verdict
    }

    /// Replaces what a session offers. `None` when the session is gone.
    pub fn offer(&mut self, link: LinkId, offer: Vec<Claim>, now: Instant) -> Option<Verdict> {
        let info = self.sessions.get(&link)?.info.clone();
        let verdict = self.judge(&info, offer.clone());
        let session = self.sessions.get_mut(&link)?;
        session.offer = offer;
        session.refused = verdict.refused.clone();
        let before = std::mem::replace(&mut session.claims, verdict.accepted.clone());
        self.release(&info, before, now);
        self.hold(&info, &verdict.accepted);
        Some(verdict)
    }

    /// Forgets a session, and remembers what it served. What others were refused because it served
    /// it may be theirs now.
    pub fn disconnect(&mut self, link: LinkId, now: Instant) {
        if let Some(session) = self.sessions.remove(&link) {
            self.release(&session.info, session.claims, now);
            self.judge_again(now, |session| !session.refused.is_empty());
        }
    }

    fn judge_again(&mut self, now: Instant, whom: impl Fn(&Session) -> bool) {
        let again: Vec<_> = self
            .sessions
            .values()
            .filter(|session| whom(session))
            .collect();
        let again: Vec<_> = again.iter().map(|s| (s.info.id, s.offer.clone())).collect();
        for (link, offer) in again {
            self.offer(link, offer, now);
        }
    }

    /// Puts another policy in force: every session's offer is judged by it.
    pub fn set_grants(&mut self, grants: Grants, now: Instant) {
        self.grants = grants;
        self.judge_again(now, |_| true);
    }

    /// Drops memories that are older than `forget`. Returns whether any was.
    pub fn expire(&mut self, now: Instant) -> bool {
        let before = self.departed.len();
        let forget = self.forget;
        self.departed
            .retain(|_, memory| now.saturating_duration_since(memory.at) < forget);
        self.departed.len() != before
    }

    /// The sessions, oldest first.
    pub fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.sessions.values()
    }

    /// The routes as they stand.
    pub fn routes(&self) -> Routes {
        let mut routes = Routes::default();
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
        }
        for ((tenant, claim), memory) in &self.departed {
            for_entries(&mut routes, tenant, claim, |entry| {
                entry.departed = Some(memory.departed.clone());
            });
        }
        routes
    }

    /// For each identity the links of its newest process that can take dials; all of its links
    /// when none can.
    fn newest(&self) -> HashSet<LinkId> {
        let mut by_identity: HashMap<_, Vec<&Session>> = HashMap::new();
        for session in self.sessions.values() {
            let identity = &session.info.identity;
            by_identity
                .entry((&identity.trust_domain, &identity.name))
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

    fn judge(&self, info: &LinkInfo, offer: Vec<Claim>) -> Verdict {
        let (granted, mut refused) = self.grants.cut(&info.identity, offer);
        let mut accepted = Vec::with_capacity(granted.len());
        for claim in granted {
            match self.owner(info, &claim) {
                None => accepted.push(claim),
                Some(owner) => refused.push(Refusal {
                    claim: claim.to_string(),
                    why: format!("the node address is served by {}", owner.identity),
                }),
            }
        }
        Verdict { accepted, refused }
    }

    /// Another identity of the tenant that holds a node address.
    fn owner(&self, info: &LinkInfo, claim: &Claim) -> Option<&LinkInfo> {
        if !matches!(claim, Claim::Address(_)) {
            return None;
        }
        let holders = self.holders.get(&key(info, claim))?;
        let infos = holders
            .iter()
            .filter_map(|id| Some(&*self.sessions.get(id)?.info));
        infos
            .into_iter()
            .find(|holder| holder.identity.name != info.identity.name)
    }

    fn hold(&mut self, info: &LinkInfo, claims: &[Claim]) {
        for claim in claims {
            let key = key(info, claim);
            self.departed.remove(&key);
            self.holders.entry(key).or_default().insert(info.id);
        }
    }

    /// Takes claims from a session, and remembers those that nobody else holds.
    fn release(&mut self, info: &LinkInfo, claims: Vec<Claim>, now: Instant) {
        let departed = Departed {
            name: info.identity.name.clone(),
            last_seen: SystemTime::now(),
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

fn key(info: &LinkInfo, claim: &Claim) -> Key {
    (info.identity.trust_domain.clone(), claim.clone())
}

fn for_entries(
    routes: &mut Routes,
    tenant: &TrustDomain,
    claim: &Claim,
    mut change: impl FnMut(&mut Entry),
) {
    let routes = routes.tenants.entry(tenant.clone()).or_default();
    match claim {
        Claim::Address(addr) => change(routes.prefixes.entry(IpNet::from(*addr)).or_default()),
        Claim::Cidr(net) => change(routes.prefixes.entry(net.trunc()).or_default()),
        Claim::Name(name) => change(routes.names.entry(name.clone()).or_default()),
        Claim::DefaultRoute => {
            for net in DEFAULT_ROUTES {
                change(routes.prefixes.entry(net).or_default());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::server::{GrantConfig, PolicyConfig};
    use crate::server::routes::{Path, Probe, RouteError};
    use crate::tls::{Identity, Role};
    use std::sync::atomic::Ordering;
    use tunnel_proto::preface::Host;

    const FORGET: Duration = Duration::from_secs(60);

    fn registry() -> Registry {
        let grant = GrantConfig {
            identity: "spiffe://*/agent/gw*".into(),
            cidrs: vec!["10.0.0.0/8".parse().unwrap()],
            names: vec!["*.svc".into()],
            default_route: true,
        };
        let grants = Grants::new(&PolicyConfig {
            grants: vec![grant],
        })
        .unwrap();
        Registry::new(grants, FORGET)
    }

    fn link(id: u64, name: &str, address: &str) -> Arc<LinkInfo> {
        let identity = Identity {
            trust_domain: "a".parse().unwrap(),
            role: Role::Agent,
            name: name.into(),
            addresses: vec![address.parse().unwrap()],
        };
        let path = Path {
            remote: "127.0.0.1:1".parse().unwrap(),
            rtt: Duration::ZERO,
        };
        LinkInfo::new(LinkId(id), 0, identity, Probe(Box::new(move || path)))
    }

    fn claim(addr: &str) -> Vec<Claim> {
        vec![Claim::Address(addr.parse().unwrap())]
    }

    fn ask(registry: &Registry, tenant: &str, host: &str) -> Result<Vec<u64>, RouteError> {
        let host: Host = host.parse().unwrap();
        let found = registry
            .routes()
            .candidates(&tenant.parse().unwrap(), &host)?;
        Ok(found.iter().map(|l| l.id.0).collect())
    }

    #[test]
    fn the_newest_process_takes_new_dials() {
        let mut registry = registry();
        let (old, new) = (link(1, "w1", "10.99.1.2"), link(2, "w1", "10.99.1.2"));
        registry.connect(old, InstanceId([1; 16]), claim("10.99.1.2"));
        registry.connect(new.clone(), InstanceId([2; 16]), claim("10.99.1.2"));
        assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2]));
        new.silent.store(true, Ordering::Relaxed);
        assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![1]));
    }

    #[test]
    fn a_node_address_has_one_owner() {
        let mut registry = registry();
        registry.connect(
            link(1, "w1", "10.99.1.2"),
            InstanceId([1; 16]),
            claim("10.99.1.2"),
        );
        let verdict = registry.connect(
            link(2, "w9", "10.99.1.2"),
            InstanceId([2; 16]),
            claim("10.99.1.2"),
        );
        assert!(verdict.accepted.is_empty());
        assert!(
            verdict.refused[0].why.contains("agent/w1"),
            "{:?}",
            verdict.refused
        );
        assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![1]));
    }

    #[test]
    fn an_address_passes_on_when_its_owner_leaves() {
        let mut registry = registry();
        let (one, two) = (link(1, "w1", "10.99.1.2"), link(2, "w9", "10.99.1.2"));
        registry.connect(one, InstanceId([1; 16]), claim("10.99.1.2"));
        registry.connect(two, InstanceId([2; 16]), claim("10.99.1.2"));
        registry.disconnect(LinkId(1), Instant::now());
        assert_eq!(ask(&registry, "a", "10.99.1.2"), Ok(vec![2]));
    }

    #[test]
    fn a_tenant_sees_its_own_agents_only() {
        let mut registry = registry();
        registry.connect(
            link(1, "w1", "10.99.1.2"),
            InstanceId([1; 16]),
            claim("10.99.1.2"),
        );
        assert_eq!(ask(&registry, "b", "10.99.1.2"), Err(RouteError::NoRoute));
    }

    #[test]
    fn a_departed_agent_is_remembered_then_forgotten() {
        let mut registry = registry();
        let start = Instant::now();
        registry.connect(
            link(1, "w1", "10.99.1.2"),
            InstanceId([1; 16]),
            claim("10.99.1.2"),
        );
        registry.disconnect(LinkId(1), start);
        assert!(
            matches!(ask(&registry, "a", "10.99.1.2"), Err(RouteError::NoAgent(d)) if &*d.name == "w1")
        );
        assert!(!registry.expire(start + FORGET / 2));
        assert!(registry.expire(start + FORGET));
        assert_eq!(ask(&registry, "a", "10.99.1.2"), Err(RouteError::NoRoute));
    }

    #[test]
    fn the_longest_prefix_first_then_the_least_loaded() {
        let mut registry = registry();
        let cidr = |net: &str| vec![Claim::Cidr(net.parse().unwrap())];
        let busy = link(1, "gw1", "10.0.0.1");
        busy.streams.store(5, Ordering::Relaxed);
        registry.connect(busy, InstanceId([1; 16]), cidr("10.244.0.0/16"));
        registry.connect(
            link(2, "gw2", "10.0.0.2"),
            InstanceId([2; 16]),
            cidr("10.244.0.0/16"),
        );
        registry.connect(
            link(3, "gw3", "10.0.0.3"),
            InstanceId([3; 16]),
            cidr("10.244.1.0/24"),
        );
        registry.connect(
            link(4, "gw4", "10.0.0.4"),
            InstanceId([4; 16]),
            vec![Claim::DefaultRoute],
        );
        assert_eq!(ask(&registry, "a", "10.244.1.9"), Ok(vec![3, 2, 1, 4]));
        assert_eq!(ask(&registry, "a", "10.244.2.9"), Ok(vec![2, 1, 4]));
        assert_eq!(ask(&registry, "a", "x.svc"), Ok(vec![4]));
        let routes = registry.routes();
        assert!(routes.verdicts().all(|(_, _, served)| served));
    }

    #[test]
    fn another_policy_takes_claims_away_and_gives_them_back() {
        let mut registry = registry();
        let net = vec![Claim::Cidr("10.244.0.0/16".parse().unwrap())];
        registry.connect(link(1, "gw1", "10.0.0.1"), InstanceId([1; 16]), net);
        let before = std::mem::take(&mut registry.grants);
        registry.set_grants(Grants::default(), Instant::now());
        assert!(matches!(
            ask(&registry, "a", "10.244.0.1"),
            Err(RouteError::NoAgent(_))
        ));
        assert_eq!(registry.sessions().next().unwrap().refused.len(), 1);
        registry.set_grants(before, Instant::now());
        assert_eq!(ask(&registry, "a", "10.244.0.1"), Ok(vec![1]));
    }
}
