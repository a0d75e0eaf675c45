//! The routes that are in force: an immutable snapshot that the registry publishes and the shards
//! read, keyed by tenant.
//!
//! The choice: the longest prefix first, then shorter ones; within a prefix the newest process of
//! each identity, the least loaded first. Links that are silent or draining are not chosen.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use tunnel_proto::preface::{Host, Name};
use tunnel_proto::route::NamePattern;

use crate::telemetry::access::Totals;
use crate::tls::{Identity, TrustDomain};

/// The most links that one dial may try.
const MAX_CANDIDATES: usize = 4;

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
}

/// Looks at a link's path, from any thread.
pub struct Probe(pub Box<dyn Fn() -> Path + Send + Sync>);

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (self.0)().fmt(f)
    }
}

/// What of a link is known outside its shard. Written by the shard, read anywhere.
#[derive(Debug)]
pub struct LinkInfo {
    /// Which link.
    pub id: LinkId,
    /// The shard that it lives on.
    pub shard: usize,
    /// Whose it is.
    pub identity: Identity,
    /// Since when.
    pub since: SystemTime,
    /// Not heard for too long.
    pub silent: AtomicBool,
    /// About to leave.
    pub draining: AtomicBool,
    /// Open streams.
    pub streams: AtomicI64,
    /// Bytes over it.
    pub totals: Totals,
    /// Looks at its path.
    pub probe: Probe,
}

impl LinkInfo {
    /// A fresh link.
    pub fn new(id: LinkId, shard: usize, identity: Identity, probe: Probe) -> Arc<Self> {
        Arc::new(Self {
            id,
            shard,
            identity,
            since: SystemTime::now(),
            silent: AtomicBool::default(),
            draining: AtomicBool::default(),
            streams: AtomicI64::default(),
            totals: Totals::default(),
            probe,
        })
    }

    /// Whether new dials may go to it.
    pub fn is_available(&self) -> bool {
        !self.silent.load(Ordering::Relaxed) && !self.draining.load(Ordering::Relaxed)
    }
}

/// The last that was heard of an agent that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departed {
    /// Its name.
    pub name: Arc<str>,
    /// When it was last connected.
    pub last_seen: SystemTime,
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
    fn available(&self) -> impl Iterator<Item = &Arc<LinkInfo>> {
        self.links.iter().filter(|link| link.is_available())
    }

    /// At most [`MAX_CANDIDATES`]; among equals the newest first.
    fn least_loaded(&self) -> Vec<&Arc<LinkInfo>> {
        let load = |link: &&Arc<LinkInfo>| (link.streams.load(Ordering::Relaxed), Reverse(link.id));
        let mut links: Vec<_> = self.available().collect();
        if links.len() > MAX_CANDIDATES {
            links.select_nth_unstable_by_key(MAX_CANDIDATES, load);
            links.truncate(MAX_CANDIDATES);
        }
        links.sort_by_key(load);
        links
    }

    fn unavailable(&self) -> Option<Departed> {
        // A silent link is as good as gone, since about now.
        let silent = self.links.first().map(|link| Departed {
            name: link.identity.name.clone(),
            last_seen: SystemTime::now(),
        });
        silent.or_else(|| self.departed.clone())
    }
}

/// The routes of one tenant.
#[derive(Clone, Debug, Default)]
pub(super) struct TenantRoutes {
    pub prefixes: JointPrefixMap<IpNet, Entry>,
    pub names: BTreeMap<NamePattern, Entry>,
}

/// A snapshot of all routes.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    pub(super) tenants: HashMap<TrustDomain, TenantRoutes>,
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
        let entries = match host {
            Host::Ip(addr) => routes.covering(*addr),
            Host::Name(name) => routes.matching(name),
        };
        let mut found: Vec<Arc<LinkInfo>> = Vec::with_capacity(1);
        for entry in &entries {
            for link in entry.least_loaded() {
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
        self.tenants.iter().flat_map(|(tenant, routes)| {
            routes.prefixes.iter().map(move |(net, entry)| {
                let served = entry.available().next().is_some()
                    || routes
                        .prefixes
                        .cover(&net)
                        .any(|(_, e)| e.available().next().is_some());
                (tenant, net, served)
            })
        })
    }
}

impl TenantRoutes {
    /// The entries for an address, the longest prefix first.
    fn covering(&self, addr: IpAddr) -> Vec<&Entry> {
        let mut entries: Vec<_> = self
            .prefixes
            .cover(&IpNet::from(addr))
            .map(|(_, entry)| entry)
            .collect();
        entries.reverse();
        entries
    }

    /// The entries for a name: itself, then the suffixes, the longest first, then the default
    /// route, which serves names as well.
    fn matching(&self, name: &Name) -> Vec<&Entry> {
        let mut keys = vec![NamePattern::Exact(name.clone())];
        let mut rest = name.as_str();
        while let Some((_, parent)) = rest.split_once('.') {
            keys.extend(parent.parse().map(NamePattern::Below));
            rest = parent;
        }
        let named = keys.iter().filter_map(|key| self.names.get(key));
        let defaults = DEFAULT_ROUTES
            .iter()
            .filter_map(|net| self.prefixes.get(net));
        named.chain(defaults).collect()
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
