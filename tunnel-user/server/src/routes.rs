//! The routes that are in force: an immutable snapshot that the registry publishes and the shards
//! read, keyed by tenant.
//!
//! The choice follows the configured strategies in order. Usually: the longest prefix first, then
//! shorter ones, the default route last; within a prefix the newest process of each identity, the
//! least loaded first. Silent links are not chosen, and draining ones come last: an agent that drains
//! is better than none.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use tokio::sync::Notify;
use tunnel_proto::preface::{Host, Name};
use tunnel_proto::route::NamePattern;

use cpc_config::agent::MAX_TUNNELS;
use cpc_config::server::Strategy;
use cpc_identity::{Identity, TrustDomain};
use cpc_observe::access::Totals;

/// The most links that one dial may try.
pub(super) const MAX_CANDIDATES: usize = 4;

/// Links that are looked at: among so many of the least loaded there are several agents, if there are
/// at all.
const MAX_EQUALS: usize = MAX_CANDIDATES * MAX_TUNNELS as usize;

/// A link in this process, for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// The path of a link as it is now, which may change under it.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// The agent's address as we see it.
    pub remote: SocketAddr,
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// The largest IP packet that is sent, in bytes, where we decide on it.
    pub mtu: Option<u16>,
    /// The time since the last packet from the agent, acknowledgements included.
    pub since_packet: Duration,
    /// The time since the agent last said something.
    pub since_data: Duration,
}

/// Looks at a link's path, from any thread.
pub struct Probe(pub Box<dyn Fn() -> Path + Send + Sync>);

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (self.0)().fmt(f)
    }
}

/// What an agent speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkKind {
    /// Ours.
    Quic,
    /// Konnectivity's.
    Konnectivity,
}

impl LinkKind {
    /// Metric label and status field.
    pub fn label(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Konnectivity => "konnectivity",
        }
    }
}

/// How far an agent is taken at its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// It serves what its identity is granted.
    Granted,
    /// It serves what it says, beside whoever says the same.
    Believed,
}

/// What of a link is known outside its shard. Written by the shard, read anywhere.
#[derive(Debug)]
pub struct LinkInfo {
    /// Which link.
    pub id: LinkId,
    /// The shard that it lives on.
    pub shard: usize,
    /// What is spoken on it.
    pub kind: LinkKind,
    /// Whose it is.
    pub identity: Identity,
    /// Whether what the agent says is enough.
    pub trust: Trust,
    /// Since when.
    pub since: SystemTime,
    /// Not heard for too long.
    pub silent: AtomicBool,
    /// About to leave.
    pub draining: AtomicBool,
    /// The agent takes dials while it drains.
    pub serves_while_draining: AtomicBool,
    /// Held up by one of its connections: dials had better go elsewhere.
    pub held_up: AtomicBool,
    /// Open streams.
    pub streams: AtomicI64,
    /// Of these, dials that the agent has not answered.
    pub unanswered: AtomicI64,
    /// Bytes over it.
    pub totals: Totals,
    /// Looks at its path.
    pub probe: Probe,
    /// Told when the agent falls silent: dials that wait for it may look elsewhere.
    pub silenced: Notify,
    /// Told when its place is given to another link.
    pub replaced: Notify,
    /// Told when the agent is to give a life sign at once.
    pub challenged: Notify,
}

impl LinkInfo {
    /// A fresh link.
    pub fn new(
        (id, shard): (LinkId, usize),
        kind: LinkKind,
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
            // Agents of Konnectivity go on serving for ever.
            serves_while_draining: AtomicBool::new(kind == LinkKind::Konnectivity),
            held_up: AtomicBool::default(),
            streams: AtomicI64::default(),
            unanswered: AtomicI64::default(),
            totals: Totals::default(),
            probe,
            silenced: Notify::new(),
            replaced: Notify::new(),
            challenged: Notify::new(),
        })
    }

    /// Whether bytes may follow a request before it is answered.
    pub fn sends_early(&self) -> bool {
        match self.kind {
            LinkKind::Quic => true,
            // There is no connection yet that they could belong to.
            LinkKind::Konnectivity => false,
        }
    }

    /// Whether new dials may go to it.
    pub fn is_available(&self) -> bool {
        !self.silent.load(Ordering::Relaxed) && !self.draining.load(Ordering::Relaxed)
    }

    /// Whether new dials may go to it where nothing else is left. Agents of earlier releases refuse
    /// them while they drain.
    pub fn is_last_resort(&self) -> bool {
        self.serves_while_draining.load(Ordering::Relaxed) && !self.silent.load(Ordering::Relaxed)
    }

    /// When the agent was last heard.
    pub fn last_seen(&self) -> SystemTime {
        let now = SystemTime::now();
        now.checked_sub((self.probe.0)().since_data).unwrap_or(now)
    }
}

/// Why an agent that served a destination takes no dials for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absence {
    /// It is not connected.
    Disconnected,
    /// It is connected, and has not been heard for too long.
    Silent,
    /// It drains, and takes none while it does.
    Draining,
    /// It is connected, and serves other destinations now.
    Elsewhere,
}

/// The last that was heard of an agent that takes no dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departed {
    /// Its name.
    pub name: Arc<str>,
    /// When it was last heard, or last served the destination.
    pub last_seen: SystemTime,
    /// What has become of it.
    pub absence: Absence,
}

/// Why there is nobody to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteError {
    /// Nobody was ever granted the destination, or it is forgotten.
    NoRoute,
    /// Somebody was, but is not there.
    NoAgent(Departed),
}

/// What serves one prefix or name.
#[derive(Clone, Debug, Default)]
pub(super) struct Entry {
    /// Links of the newest process of each identity.
    pub links: Vec<Arc<LinkInfo>>,
    /// Whoever served it last.
    pub departed: Option<Departed>,
}

impl Entry {
    /// Whether somebody can be asked.
    fn is_served(&self) -> bool {
        let asked = |link: &Arc<LinkInfo>| link.is_available() || link.is_last_resort();
        self.links.iter().any(asked)
    }

    /// The least loaded of those that `may` be chosen, held up ones last; among equals the newest
    /// first. One link of each agent comes before further ones of any: what ails an agent ails all of
    /// its tunnels.
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
    /// Whoever may serve everything, for [`Strategy::Default`].
    pub any: Entry,
}

/// A snapshot of all routes.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    pub(super) tenants: HashMap<TrustDomain, TenantRoutes>,
    pub(super) strategies: Arc<[Strategy]>,
}

impl Routes {
    /// The links that may be asked for `host`, the best first.
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

    /// Every prefix and whether somebody can be asked for what it covers: what the kernel needs to
    /// know to serve or to refuse.
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

    /// The entries for a range, the longest prefix first.
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

    /// The entries for a name: itself, then the suffixes, the longest first.
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

/// What a claim of the default route stands for.
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
