//! Which server address to dial next, and over what. Sans-IO: time and chance are arguments.
//!
//! The aim: a live tunnel to every server, told apart by server id, since several addresses may
//! lead to one server and one address (a virtual IP) to several. Dialling never ends; only its
//! pace changes.
//!
//! Where both protocols may be spoken QUIC is preferred: gRPC is dialled a little later, and only
//! while QUIC does not reach the same server. Once it does, [`Plan::superseded`] names the gRPC
//! tunnels that may end with their last connection.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tunnel_proto::session::InstanceId;

use crate::config::agent::Protocol;

/// The pace of dialling an address: from this..
const SLOWEST: Duration = Duration::from_secs(10);

/// ..to this, and half as slow again after each failure.
const FASTEST: Duration = Duration::from_secs(1);

/// After a tunnel was lost its server is dialled at once, but not by all agents in the same instant.
const SPREAD: Duration = Duration::from_millis(200);

/// What QUIC is given before gRPC is tried where either may be spoken.
const HEAD_START: Duration = Duration::from_secs(1);

/// How often a proxy-server's address is dialled though nothing is missing: servers that came
/// later are not announced to agents that are connected already.
const RECONCILE: Duration = Duration::from_secs(60);

/// The most tunnels to proxy-servers: what one says of their number is not believed beyond.
const MAX_PROXY_SERVERS: usize = 256;

/// What a tunnel speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Wire {
    /// Ours, over UDP.
    Quic,
    /// Konnectivity's, over TCP.
    Grpc,
}

impl Wire {
    /// For people: what the configuration calls it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Grpc => "konnectivity",
        }
    }
}

/// One way to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Way {
    /// Where.
    pub address: SocketAddr,
    /// Over what.
    pub wire: Wire,
}

/// Where a fresh tunnel leads.
#[derive(Clone, Debug)]
pub struct Leads {
    /// The server's id.
    pub server: Arc<str>,
    /// Its process, where the protocol tells.
    pub instance: Option<InstanceId>,
    /// How many servers there are, as it says.
    pub server_count: u32,
}

/// What to do with a fresh tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Serve it.
    Keep,
    /// There is a live one to that server.
    Decline,
    /// Another process of that name is live at this address: two servers have one id. It is left
    /// alone, or each of them would end the other's connections.
    Conflict(SocketAddr),
}

#[derive(Debug)]
struct Candidate {
    leads_to: Option<Arc<str>>,
    /// QUIC is preferred at this address.
    fallback: bool,
    resolved: bool,
    dialling: bool,
    /// When it may be dialled if it is wanted..
    next: Instant,
    /// ..and when if it is not.
    reconcile: Instant,
    pace: Duration,
}

#[derive(Debug)]
struct Held {
    tunnel: u64,
    instance: Option<InstanceId>,
    address: SocketAddr,
    since: Instant,
    /// It is no longer wanted once QUIC reaches the same server.
    fallback: bool,
    live: bool,
}

/// What is known of addresses and servers.
#[derive(Debug, Default)]
pub struct Plan {
    candidates: BTreeMap<Way, Candidate>,
    quic: HashMap<Arc<str>, Held>,
    grpc: HashMap<Arc<str>, Held>,
    /// As the last server said.
    quic_count: u32,
    grpc_count: u32,
    /// As their leases say, in place of what proxy-servers say.
    leases: Option<u32>,
    /// Or both are asked, and the larger number counts.
    larger: bool,
}

impl Plan {
    /// The addresses that the configured names have now, and what may be spoken there.
    pub fn set_addresses(&mut self, addresses: &[(SocketAddr, Protocol)], now: Instant) {
        for candidate in self.candidates.values_mut() {
            candidate.resolved = false;
        }
        for &(address, protocol) in addresses {
            if protocol != Protocol::Konnectivity {
                let wire = Wire::Quic;
                self.resolved(Way { address, wire }, false, now);
            }
            if protocol != Protocol::Quic {
                let wire = Wire::Grpc;
                self.resolved(Way { address, wire }, protocol == Protocol::Auto, now);
            }
        }
        self.candidates
            .retain(|_, candidate| candidate.resolved || candidate.dialling);
    }

    fn resolved(&mut self, way: Way, fallback: bool, now: Instant) {
        let wait = if fallback { HEAD_START } else { Duration::ZERO };
        let candidate = self.candidates.entry(way).or_insert_with(|| Candidate {
            leads_to: None,
            fallback,
            resolved: true,
            dialling: false,
            next: now + wait,
            reconcile: now + RECONCILE,
            pace: FASTEST,
        });
        candidate.resolved = true;
    }

    /// Leases alone are not believed: proxy-servers that say that there are more are, too.
    pub fn count_both(&mut self) {
        self.larger = true;
    }

    /// How many proxy-servers there are by their leases; with `None` they say themselves.
    pub fn set_leases(&mut self, count: Option<u32>) {
        // A server without a lease is still a server.
        self.leases = count.map(|count| count.max(1));
    }

    /// The ways to dial now. Each is then under way until [`failed`](Self::failed) or
    /// [`welcomed`](Self::welcomed).
    pub fn due(&mut self, now: Instant) -> Vec<Way> {
        let is_due = |(way, candidate): (&Way, &Candidate)| {
            let at = self.at(way, candidate)?;
            (at <= now).then_some(*way)
        };
        let due: Vec<_> = self.candidates.iter().filter_map(is_due).collect();
        for way in &due {
            if let Some(candidate) = self.candidates.get_mut(way) {
                candidate.dialling = true;
            }
        }
        due
    }

    /// When [`due`](Self::due) should be asked again.
    pub fn next_timeout(&self) -> Option<Instant> {
        self.candidates
            .iter()
            .filter_map(|(way, candidate)| self.at(way, candidate))
            .min()
    }

    /// A dial came to nothing. `chance` is in 0..1.
    pub fn failed(&mut self, way: Way, now: Instant, chance: f64) {
        if let Some(candidate) = self.candidates.get_mut(&way) {
            candidate.dialling = false;
            slow_down(candidate, now, chance);
        }
    }

    /// A dial reached `server`, as its certificate says. Whether to introduce ourselves: not where
    /// this address is known to lead to it and a live tunnel does, too, since the server would
    /// send connections into a tunnel that is about to be declined. `chance` is in 0..1.
    pub fn reached(&mut self, way: Way, server: &str, now: Instant, chance: f64) -> bool {
        let live = is_live(self.held(way.wire), server);
        match self.candidates.get_mut(&way) {
            Some(candidate) if live && candidate.leads_to.as_deref() == Some(server) => {
                candidate.dialling = false;
                slow_down(candidate, now, chance);
                false
            }
            _ => true,
        }
    }

    /// Whether `tunnel` is the one that is held to `server`.
    pub fn holds(&self, wire: Wire, server: &str, tunnel: u64) -> bool {
        self.held(wire)
            .get(server)
            .is_some_and(|held| held.tunnel == tunnel)
    }

    /// A dial led to a server. `tunnel` tells this tunnel from others, `chance` is in 0..1.
    pub fn welcomed(
        &mut self,
        way: Way,
        tunnel: u64,
        leads: Leads,
        now: Instant,
        chance: f64,
    ) -> Verdict {
        let Leads {
            server,
            instance,
            server_count,
        } = leads;
        let candidate = self.candidates.get(&way);
        let fallback = candidate.is_some_and(|candidate| candidate.fallback);
        let superseded = fallback && self.is_superseded(&server, way.address);
        match way.wire {
            Wire::Quic => self.quic_count = server_count,
            // It counts the ids that it presents, not the servers that QUIC reaches.
            Wire::Grpc if superseded => {}
            Wire::Grpc => self.grpc_count = server_count,
        }
        let verdict = match self.held(way.wire).get(&server) {
            _ if superseded => Verdict::Decline,
            Some(held) if held.live && held.instance == instance => Verdict::Decline,
            Some(held) if held.live && held.address != way.address => {
                Verdict::Conflict(held.address)
            }
            None if way.wire == Wire::Grpc && self.grpc.len() >= MAX_PROXY_SERVERS => {
                Verdict::Decline
            }
            _ => Verdict::Keep,
        };
        if let Some(candidate) = self.candidates.get_mut(&way) {
            candidate.dialling = false;
            candidate.leads_to = Some(server.clone());
            slow_down(candidate, now, chance);
            if verdict == Verdict::Keep {
                candidate.pace = FASTEST;
                candidate.next = now + FASTEST;
            }
        }
        if verdict == Verdict::Keep {
            let held = Held {
                tunnel,
                instance,
                address: way.address,
                since: now,
                fallback,
                live: true,
            };
            self.held_mut(way.wire).insert(server, held);
        }
        verdict
    }

    /// A server fell silent, drains, or is heard again.
    pub fn changed(&mut self, wire: Wire, server: &str, tunnel: u64, live: bool, now: Instant) {
        let held = self.held_mut(wire).get_mut(server);
        let Some(held) = held.filter(|held| held.tunnel == tunnel) else {
            return;
        };
        held.live = live;
        let address = held.address;
        if !live {
            self.hasten(wire, server, address, now, Duration::ZERO);
        }
    }

    /// A tunnel has ended: its server is dialled at once, unless the tunnel had hardly begun.
    /// `chance` is in 0..1.
    pub fn ended(&mut self, wire: Wire, server: &str, tunnel: u64, now: Instant, chance: f64) {
        if !self.holds(wire, server, tunnel) {
            return;
        }
        let Some(Held { address, since, .. }) = self.held_mut(wire).remove(server) else {
            return;
        };
        // A server that lets agents in and then ends them would be dialled without a pause.
        let from = now.max(since + FASTEST);
        let again = from + SPREAD.mul_f64(chance);
        for (way, candidate) in &mut self.candidates {
            let leads = candidate.leads_to.as_deref() == Some(server) || way.address == address;
            if way.wire == wire && leads {
                candidate.pace = FASTEST;
                candidate.next = again;
            }
        }
        self.hasten(wire, server, address, from, HEAD_START);
    }

    /// The gRPC tunnels to servers that QUIC reaches by now: they are no longer held.
    pub fn superseded(&mut self) -> Vec<u64> {
        let superseded = |(server, held): (&Arc<str>, &Held)| {
            let superseded = held.fallback && self.is_superseded(server, held.address);
            superseded.then(|| (server.clone(), held.tunnel))
        };
        let superseded: Vec<_> = self.grpc.iter().filter_map(superseded).collect();
        let given_up = superseded.into_iter().map(|(server, tunnel)| {
            self.grpc.remove(&server);
            tunnel
        });
        given_up.collect()
    }

    /// How many servers there are, by their leases or as they said; 0 before any did.
    pub fn server_count(&self) -> u32 {
        let grpc = self.proxy_servers();
        match (self.quic.is_empty(), self.grpc.is_empty()) {
            (false, true) => self.quic_count,
            (true, false) => grpc,
            _ => self.quic_count.max(grpc),
        }
    }

    fn held(&self, wire: Wire) -> &HashMap<Arc<str>, Held> {
        match wire {
            Wire::Quic => &self.quic,
            Wire::Grpc => &self.grpc,
        }
    }

    fn held_mut(&mut self, wire: Wire) -> &mut HashMap<Arc<str>, Held> {
        match wire {
            Wire::Quic => &mut self.quic,
            Wire::Grpc => &mut self.grpc,
        }
    }

    /// QUIC has failed `server`: gRPC to its address is tried after `wait`, and to others, where a
    /// balancer may lead to it too, not before.
    fn hasten(
        &mut self,
        wire: Wire,
        server: &str,
        address: SocketAddr,
        now: Instant,
        wait: Duration,
    ) {
        if wire != Wire::Quic {
            return;
        }
        for (way, candidate) in &mut self.candidates {
            let leads = candidate.leads_to.as_deref() == Some(server) || way.address == address;
            if candidate.fallback && leads {
                candidate.pace = FASTEST;
                candidate.next = now + wait;
            } else if candidate.fallback {
                candidate.next = candidate.next.max(now + wait);
            }
        }
    }

    /// When to dial it; `None` while there is no use in it.
    fn at(&self, way: &Way, candidate: &Candidate) -> Option<Instant> {
        if !candidate.resolved || candidate.dialling {
            return None;
        }
        if self.is_wanted(way, candidate) {
            return Some(candidate.next);
        }
        let reconciled = way.wire == Wire::Grpc && !self.grpc.is_empty() && self.leases.is_none();
        reconciled.then_some(candidate.reconcile)
    }

    fn is_wanted(&self, way: &Way, candidate: &Candidate) -> bool {
        if way.wire == Wire::Grpc && live(&self.grpc).count() >= MAX_PROXY_SERVERS {
            return false;
        }
        let served = match &candidate.leads_to {
            Some(server) => {
                is_live(self.held(way.wire), server)
                    || candidate.fallback && self.is_superseded(server, way.address)
            }
            // Nobody knows what gRPC would lead to, but QUIC leads somewhere.
            None => candidate.fallback && live(&self.quic).any(|(_, h)| h.address == way.address),
        };
        !served || self.is_missing(way.wire, candidate.fallback)
    }

    fn proxy_servers(&self) -> u32 {
        match self.leases {
            Some(leases) if self.larger => leases.max(self.grpc_count),
            Some(leases) => leases,
            None => self.grpc_count,
        }
    }

    /// Whether there are servers that no live tunnel leads to.
    fn is_missing(&self, wire: Wire, fallback: bool) -> bool {
        let quic_missing = live(&self.quic).count() < self.quic_count as usize;
        match wire {
            Wire::Quic => quic_missing,
            Wire::Grpc if fallback && self.quic_count > 0 && !quic_missing => false,
            Wire::Grpc => {
                let expected = match self.proxy_servers() {
                    0 if fallback => self.quic_count,
                    expected => expected,
                };
                let over_quic = live(&self.quic).filter(|(s, _)| !is_live(&self.grpc, s));
                let known = live(&self.grpc).count() + over_quic.count();
                known < expected as usize
            }
        }
    }

    /// Whether QUIC reaches the server that calls itself `server` over gRPC at `address`. Servers
    /// of ours present several ids to proxy agents there: their own, and that with a number.
    fn is_superseded(&self, server: &str, address: SocketAddr) -> bool {
        live(&self.quic).any(|(id, held)| match server.strip_prefix(&**id) {
            Some("") => true,
            Some(rest) => held.address.ip() == address.ip() && is_number(rest),
            None => false,
        })
    }
}

/// Whether it is what a server's further ids have behind the first.
fn is_number(suffix: &str) -> bool {
    let digits = suffix.strip_prefix('-').unwrap_or_default();
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

fn live(held: &HashMap<Arc<str>, Held>) -> impl Iterator<Item = (&Arc<str>, &Held)> {
    held.iter().filter(|(_, held)| held.live)
}

fn is_live(held: &HashMap<Arc<str>, Held>, server: &str) -> bool {
    held.get(server).is_some_and(|held| held.live)
}

fn slow_down(candidate: &mut Candidate, now: Instant, chance: f64) {
    let jitter = 0.75 + chance / 2.0;
    candidate.next = now + candidate.pace.mul_f64(jitter);
    candidate.reconcile = now + RECONCILE.mul_f64(jitter);
    candidate.pace = candidate.pace.mul_f64(1.5).min(SLOWEST);
}

#[cfg(test)]
mod tests;
