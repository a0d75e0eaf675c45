//! The routes in force: an immutable snapshot that the registry publishes and the shards read, keyed by
//! tenant.
//!
//! The choice follows the configured strategies in order. Usually the longest prefix comes first, then
//! shorter ones, the default route last; within a prefix the newest process of each identity, the least
//! loaded first. Silent links are not chosen, and draining ones come last: an agent that drains is
//! better than none.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use tokio::sync::Notify;
use tunnel_proto::preface::{Host, Name};
use tunnel_proto::route::NamePattern;

use super::agent_processes::AgentProcess;
use cpc_config::TunnelKind;
use cpc_config::agent::MAX_TUNNELS;
use cpc_config::server::Strategy;
use cpc_identity::{Identity, TrustDomain};
use cpc_observe::access::Totals;
use cpc_transport::tunnel::Probe;

/// Maximum number of links that one dial may try.
pub(super) const MAX_CANDIDATES: usize = 4;

/// Maximum number of links examined: among so many of the least loaded there are several agents, if
/// there are at all.
const MAX_EQUALS: usize = MAX_CANDIDATES * MAX_TUNNELS as usize;

/// Id of a link, unique within the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// Trust in an agent's claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The agent serves what its identity is granted.
    Granted,
    /// The agent serves what it claims, beside others with the same claim.
    Believed,
}

/// State of a link that other shards can read. Its shard writes it, any thread reads.
#[derive(Debug)]
pub struct LinkInfo {
    /// Id of the link.
    pub id: LinkId,
    /// Shard of the link.
    pub shard: usize,
    /// Kind of the link.
    pub kind: TunnelKind,
    /// Identity of the agent.
    pub identity: Identity,
    /// Trust in the agent's claims.
    pub trust: Trust,
    /// Start of the link.
    pub since: SystemTime,
    /// Whether the agent has not been heard for too long.
    pub silent: AtomicBool,
    /// Whether the agent drains.
    pub draining: AtomicBool,
    /// Whether the agent is about to hand over to a successor.
    pub hands_over: AtomicBool,
    /// Whether the agent takes dials while it drains.
    pub serves_while_draining: AtomicBool,
    /// Whether one connection holds up the others: dials should go elsewhere.
    pub held_up: AtomicBool,
    /// Open streams.
    pub streams: AtomicI64,
    /// Number of these whose dials the agent has not answered.
    pub unanswered: AtomicI64,
    /// Bytes over the link.
    pub totals: Totals,
    /// Probe of the path.
    pub probe: Probe,
    /// Notification that the agent fell silent: waiting dials may choose another.
    pub silenced: Notify,
    /// Notification that another link gets its place.
    pub replaced: Notify,
    /// Notification that the agent must give a life sign at once.
    pub challenged: Notify,
    /// Notification that sessions are to go on over another tunnel.
    pub outlived: Notify,
    /// Process of the agent, where its sessions may go from one tunnel to another.
    pub(super) process: OnceLock<Arc<AgentProcess>>,
}

impl LinkInfo {
    /// Creates the state of a fresh link.
    pub fn new(
        (id, shard): (LinkId, usize),
        kind: TunnelKind,
        (identity, trust): (Identity, Trust),
        probe: Probe,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            shard,
            kind,
            identity,
            trust,
            since: SystemTime::now(),
            silent: AtomicBool::default(),
            draining: AtomicBool::default(),
            hands_over: AtomicBool::default(),
            // Agents of other systems serve on without a deadline; ours say whether they do.
            serves_while_draining: AtomicBool::new(!kind.is_native()),
            held_up: AtomicBool::default(),
            streams: AtomicI64::default(),
            unanswered: AtomicI64::default(),
            totals: Totals::default(),
            probe,
            silenced: Notify::new(),
            replaced: Notify::new(),
            challenged: Notify::new(),
            outlived: Notify::new(),
            process: OnceLock::new(),
        })
    }

    /// Whether bytes may follow a request before it is answered.
    pub fn sends_early(&self) -> bool {
        // Elsewhere there is no connection yet that they could belong to.
        self.kind.is_native()
    }

    /// Whether new dials may use the link.
    pub fn is_available(&self) -> bool {
        !self.silent.load(Ordering::Relaxed) && !self.draining.load(Ordering::Relaxed)
    }

    /// Whether new dials may use the link without an alternative. Agents of earlier releases refuse
    /// them while they drain.
    pub fn is_last_resort(&self) -> bool {
        self.serves_while_draining.load(Ordering::Relaxed) && !self.silent.load(Ordering::Relaxed)
    }

    /// Whether the agent's process is heard over another link, while this one is silent.
    pub(super) fn is_outlived(&self) -> bool {
        let process = self.process.get();
        self.silent.load(Ordering::Relaxed) && process.is_some_and(|process| process.is_heard())
    }

    /// Returns the time at which the agent was last heard.
    pub fn last_seen(&self) -> SystemTime {
        let now = SystemTime::now();
        now.checked_sub(self.probe.path().since_data).unwrap_or(now)
    }
}

/// Reason why an agent that served a destination takes no dials for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absence {
    /// The agent is not connected.
    Disconnected,
    /// The agent is connected, and has not been heard for too long.
    Silent,
    /// The agent drains, and takes none meanwhile.
    Draining,
    /// The agent is connected, and serves other destinations now.
    Elsewhere,
}

/// An agent that takes no dials, with its last state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departed {
    /// Name of the agent.
    pub name: Arc<str>,
    /// Time at which it was last heard, or last served the destination.
    pub last_seen: SystemTime,
    /// Reason of its absence.
    pub absence: Absence,
}

/// Reason why there is no link for a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteError {
    /// The destination was never granted to an agent, or is forgotten.
    NoRoute,
    /// An agent served the destination, but is absent.
    NoAgent(Departed),
}

/// Links of one prefix or name.
#[derive(Clone, Debug, Default)]
pub(super) struct Entry {
    /// Links of the newest process of each identity.
    pub links: Vec<Arc<LinkInfo>>,
    /// Agent that served it last.
    pub departed: Option<Departed>,
}

impl Entry {
    /// Whether an agent is available.
    fn is_served(&self) -> bool {
        let asked = |link: &Arc<LinkInfo>| link.is_available() || link.is_last_resort();
        self.links.iter().any(asked)
    }

    /// Returns the least loaded of those that `may` be chosen, held up ones last; among equals the
    /// newest first. One link of each agent comes before further ones of any: a fault of an agent
    /// affects all of its tunnels.
    fn least_loaded(&self, may: impl Fn(&LinkInfo) -> bool) -> Vec<&Arc<LinkInfo>> {
        let load = |link: &&Arc<LinkInfo>| {
            let held_up = link.held_up.load(Ordering::Relaxed);
            let streams = link.streams.load(Ordering::Relaxed);
            (held_up, streams, Reverse(link.id))
        };
        let mut links: Vec<_> = self.links.iter().filter(|link| may(link)).collect();
        if links.len() > MAX_EQUALS {
            links.select_nth_unstable_by_key(MAX_EQUALS, load);
            links.truncate(MAX_EQUALS);
        }
        links.sort_by_key(load);
        let mut agents: Vec<&Arc<str>> = Vec::new();
        let (mut first, further): (Vec<_>, Vec<_>) = links.into_iter().partition(|link| {
            let name = &link.identity.name;
            let is_new = !agents.contains(&name);
            if is_new {
                agents.push(name);
            }
            is_new
        });
        first.extend(further);
        first
    }

    fn unavailable(&self) -> Option<Departed> {
        let connected = self.links.last().map(|link| Departed {
            name: link.identity.name.clone(),
            last_seen: link.last_seen(),
            absence: match link.silent.load(Ordering::Relaxed) {
                true => Absence::Silent,
                false => Absence::Draining,
            },
        });
        connected.or_else(|| self.departed.clone())
    }
}

/// The routes of one tenant.
#[derive(Clone, Debug, Default)]
pub(super) struct TenantRoutes {
    pub prefixes: JointPrefixMap<IpNet, Entry>,
    pub names: BTreeMap<NamePattern, Entry>,
    /// Agents that may serve everything, for [`Strategy::Default`].
    pub any: Entry,
}

/// A snapshot of all routes.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    pub(super) tenants: HashMap<TrustDomain, TenantRoutes>,
    pub(super) strategies: Arc<[Strategy]>,
}

impl Routes {
    /// Returns the links for `host`, the best first.
    ///
    /// # Errors
    /// [`RouteError`] when there is none.
    pub fn candidates(
        &self,
        tenant: &TrustDomain,
        host: &Host,
    ) -> Result<Vec<Arc<LinkInfo>>, RouteError> {
        let routes = self.tenants.get(tenant).ok_or(RouteError::NoRoute)?;
        let entries: Vec<_> = self
            .strategies
            .iter()
            .flat_map(|strategy| routes.entries(*strategy, host))
            .collect();
        let mut found: Vec<Arc<LinkInfo>> = Vec::with_capacity(1);
        for may in [LinkInfo::is_available, LinkInfo::is_last_resort] {
            for link in entries.iter().flat_map(|entry| entry.least_loaded(may)) {
                if found.len() < MAX_CANDIDATES && found.iter().all(|f| f.id != link.id) {
                    found.push(link.clone());
                }
            }
        }
        if !found.is_empty() {
            return Ok(found);
        }
        let departed = entries.iter().find_map(|entry| entry.unavailable());
        Err(departed.map_or(RouteError::NoRoute, RouteError::NoAgent))
    }

    /// Iterates over all prefixes, and whether an agent is available for each: the kernel needs that to
    /// serve or to refuse.
    pub fn verdicts(&self) -> impl Iterator<Item = (&TrustDomain, IpNet, bool)> {
        self.tenants.iter().flat_map(move |(tenant, routes)| {
            let prefixes = routes.prefixes.iter().map(|(net, _)| net);
            let missing = DEFAULT_ROUTES
                .into_iter()
                .filter(|net| !routes.any.links.is_empty() && routes.prefixes.get(net).is_none());
            let served = move |net: &IpNet| {
                let mut entries = self
                    .strategies
                    .iter()
                    .flat_map(|strategy| routes.covering(*strategy, *net));
                entries.any(Entry::is_served)
            };
            let nets: Vec<_> = prefixes.chain(missing).collect();
            nets.into_iter().map(move |net| (tenant, net, served(&net)))
        })
    }
}

impl TenantRoutes {
    fn entries(&self, strategy: Strategy, host: &Host) -> Vec<&Entry> {
        match (strategy, host) {
            (_, Host::Ip(addr)) => self.covering(strategy, IpNet::from(*addr)),
            (Strategy::DestHost, Host::Name(name)) => self.matching(name),
            (Strategy::DefaultRoute, Host::Name(_)) => DEFAULT_ROUTES
                .iter()
                .filter_map(|net| self.prefixes.get(net))
                .collect(),
            (Strategy::Default, Host::Name(_)) => vec![&self.any],
        }
    }

    /// Returns the entries for a range, the longest prefix first.
    fn covering(&self, strategy: Strategy, net: IpNet) -> Vec<&Entry> {
        if strategy == Strategy::Default {
            return vec![&self.any];
        }
        let everything = strategy == Strategy::DefaultRoute;
        let mut entries: Vec<_> = self
            .prefixes
            .cover(&net)
            .filter(|(net, _)| (net.prefix_len() == 0) == everything)
            .map(|(_, entry)| entry)
            .collect();
        entries.reverse();
        entries
    }

    /// Returns the entries for a name: itself, then the suffixes, the longest first.
    fn matching(&self, name: &Name) -> Vec<&Entry> {
        let mut keys = vec![NamePattern::Exact(name.clone())];
        let mut rest = name.as_str();
        while let Some((_, parent)) = rest.split_once('.') {
            keys.extend(parent.parse().map(NamePattern::Below));
            rest = parent;
        }
        keys.iter().filter_map(|key| self.names.get(key)).collect()
    }
}

/// Networks of a claim of the default route.
pub(super) const DEFAULT_ROUTES: [IpNet; 2] = [
    IpNet::V4(ipnet::Ipv4Net::new_assert(
        std::net::Ipv4Addr::UNSPECIFIED,
        0,
    )),
    IpNet::V6(ipnet::Ipv6Net::new_assert(
        std::net::Ipv6Addr::UNSPECIFIED,
        0,
    )),
];
