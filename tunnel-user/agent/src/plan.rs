//! The plan of dials: which server address to dial next, and over which protocol. Sans-I/O: time and
//! chance are arguments.
//!
//! The aim is a live tunnel to every server, or several native ones where that is configured. Server ids
//! distinguish servers, because several addresses may lead to one server and one address (a virtual IP)
//! to several. Dialling never ends; only its pace changes.
//!
//! A native kind is preferred to a foreign one for the same address: the foreign one is dialled a little
//! later, and only while no native tunnel reaches the same server. Once one does,
//! [`Plan::superseded`] names the foreign tunnels that may end with their last connection.

mod endpoint;
mod tunnels;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tunnel_proto::session::InstanceId;

pub(super) use self::endpoint::{Health, Verdict};
pub use self::endpoint::{ServerEndpoint, ServerInfo};
use self::tunnels::{TunnelEntry, Tunnels, all, is_reached, live, reached, take};
use cpc_config::TunnelKind;
use cpc_config::agent::Protocol;

/// Longest interval between dials of an address.
const SLOWEST: Duration = Duration::from_secs(10);

/// Shortest interval between dials of an address; it grows by half after each failure.
const FASTEST: Duration = Duration::from_secs(1);

/// Maximum random delay of the dial after a lost tunnel, so that not all agents dial in the same
/// instant.
const SPREAD: Duration = Duration::from_millis(200);

/// Minimum age of a tunnel whose server hands over, before the next dial. A quarter of it is the spread.
const SUCCESSOR: Duration = Duration::from_millis(100);

/// Time for the preferred kind before another one is tried where both are allowed.
const HEAD_START: Duration = Duration::from_secs(1);

/// Interval of dials to a foreign server's address even if no tunnel is missing: later servers are not
/// announced to connected agents.
const RECONCILE: Duration = Duration::from_secs(60);

/// Maximum number of foreign tunnels, whatever number one reports.
const MAX_FOREIGN_SERVERS: usize = 256;

#[derive(Debug)]
struct Candidate {
    leads_to: Option<Arc<str>>,
    /// Whether a native kind is preferred at this address.
    fallback: bool,
    resolved: bool,
    dialling: bool,
    /// Time of the next dial if the address is wanted.
    next: Instant,
    /// Time of the next dial if it is not.
    reconcile: Instant,
    pace: Duration,
}

/// State of addresses and servers.
#[derive(Debug, Default)]
pub(super) struct Plan {
    candidates: BTreeMap<ServerEndpoint, Candidate>,
    native: Tunnels,
    foreign: Tunnels,
    /// Number of native tunnels to one server, beyond the first.
    further: usize,
    /// Number of servers, as the last one reported.
    native_count: u32,
    foreign_count: u32,
    /// Number of foreign servers by their leases, in place of their reports.
    leases: Option<u32>,
    /// Whether the larger one of both numbers counts.
    larger: bool,
}

impl Plan {
    /// Sets the number of native tunnels to each server, at least one.
    pub(super) fn set_tunnels(&mut self, count: usize) {
        self.further = count.saturating_sub(1);
    }

    /// Sets the present addresses of the configured names, and their protocols.
    pub(super) fn set_addresses(&mut self, addresses: &[(SocketAddr, Protocol)], now: Instant) {
        for candidate in self.candidates.values_mut() {
            candidate.resolved = false;
        }
        for &(address, protocol) in addresses {
            for (at, &kind) in protocol.kinds().iter().enumerate() {
                self.resolved(ServerEndpoint { address, kind }, at > 0, now);
            }
        }
        self.candidates
            .retain(|_, candidate| candidate.resolved || candidate.dialling);
    }

    fn resolved(&mut self, endpoint: ServerEndpoint, fallback: bool, now: Instant) {
        let wait = if fallback { HEAD_START } else { Duration::ZERO };
        let candidate = self
            .candidates
            .entry(endpoint)
            .or_insert_with(|| Candidate {
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

    /// Uses the larger number of leases and of the foreign servers' reports.
    pub(super) fn count_both(&mut self) {
        self.larger = true;
    }

    /// Sets the number of foreign servers by their leases; with `None` their reports count.
    pub(super) fn set_leases(&mut self, count: Option<u32>) {
        // A server without a lease is still a server.
        self.leases = count.map(|count| count.max(1));
    }

    /// Returns the endpoints to dial now. Each is then under way until [`failed`](Self::failed) or
    /// [`welcomed`](Self::welcomed).
    pub(super) fn due(&mut self, now: Instant) -> Vec<ServerEndpoint> {
        let is_due = |(endpoint, candidate): (&ServerEndpoint, &Candidate)| {
            let at = self.at(endpoint, candidate)?;
            (at <= now).then_some(*endpoint)
        };
        let due: Vec<_> = self.candidates.iter().filter_map(is_due).collect();
        for endpoint in &due {
            if let Some(candidate) = self.candidates.get_mut(endpoint) {
                candidate.dialling = true;
            }
        }
        due
    }

    /// Returns the time at which [`due`](Self::due) must be called again.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.candidates
            .iter()
            .filter_map(|(endpoint, candidate)| self.at(endpoint, candidate))
            .min()
    }

    /// Notes a failed dial. `chance` is in 0..1.
    pub(super) fn failed(&mut self, endpoint: ServerEndpoint, now: Instant, chance: f64) {
        if let Some(candidate) = self.candidates.get_mut(&endpoint) {
            candidate.dialling = false;
            slow_down(candidate, now, chance);
        }
    }

    /// Notes that a dial reached `server`, by its certificate. Returns whether to send Hello: not where
    /// this address is known to lead to it and enough live tunnels do, too, because the server would
    /// send connections into a tunnel that is about to be declined. `chance` is in 0..1.
    pub(super) fn reached(
        &mut self,
        endpoint: ServerEndpoint,
        server: &str,
        now: Instant,
        chance: f64,
    ) -> bool {
        let full = self.is_full(endpoint, server);
        let known = self.held(endpoint.kind).get(server).into_iter().flatten();
        let known = { known }.any(|held| held.address == endpoint.address);
        match self.candidates.get_mut(&endpoint) {
            Some(candidate) if full && (known || candidate.leads_to.as_deref() == Some(server)) => {
                candidate.dialling = false;
                slow_down(candidate, now, chance);
                false
            }
            _ => true,
        }
    }

    /// Whether `tunnel` is one of those held to `server`.
    pub(super) fn holds(&self, kind: TunnelKind, server: &str, tunnel: u64) -> bool {
        let mut held = self.held(kind).get(server).into_iter().flatten();
        held.any(|held| held.tunnel == tunnel)
    }

    /// Notes that a dial led to a server. `tunnel` is the number of the tunnel, `chance` is in 0..1.
    pub(super) fn welcomed(
        &mut self,
        endpoint: ServerEndpoint,
        tunnel: u64,
        leads: ServerInfo,
        now: Instant,
        chance: f64,
    ) -> Verdict {
        let ServerInfo {
            server,
            instance,
            server_count,
        } = leads;
        let candidate = self.candidates.get(&endpoint);
        let fallback = candidate.is_some_and(|candidate| candidate.fallback);
        let superseded = fallback && self.is_superseded(&server, endpoint.address);
        match endpoint.kind.is_native() {
            true => self.native_count = server_count,
            // It counts the ids that it presents, not the servers that native tunnels reach.
            false if superseded => {}
            false => self.foreign_count = server_count,
        }
        let verdict = if superseded {
            Verdict::Decline
        } else {
            self.judge(endpoint, &server, instance)
        };
        if verdict == Verdict::Keep {
            self.hold(endpoint, tunnel, &server, instance, (fallback, now));
        }
        let is_full = self.is_full(endpoint, &server);
        if let Some(candidate) = self.candidates.get_mut(&endpoint) {
            candidate.dialling = false;
            candidate.leads_to = Some(server);
            slow_down(candidate, now, chance);
            if verdict == Verdict::Keep {
                candidate.pace = FASTEST;
                // Further tunnels come at once.
                candidate.next = if is_full { now + FASTEST } else { now };
            }
        }
        verdict
    }

    fn judge(
        &self,
        endpoint: ServerEndpoint,
        server: &str,
        instance: Option<InstanceId>,
    ) -> Verdict {
        let map = self.held(endpoint.kind);
        let held = map.get(server).into_iter().flatten();
        let live = held.filter(|held| held.live && !held.draining);
        let (same, other): (Vec<_>, Vec<_>) = live.partition(|held| held.instance == instance);
        if same.len() >= self.most(endpoint.kind) {
            return Verdict::Decline;
        }
        let mut elsewhere = other.iter().filter(|held| held.address != endpoint.address);
        match elsewhere.next() {
            Some(held) if same.is_empty() => Verdict::Conflict(held.address),
            _ if endpoint.kind.is_native() || map.contains_key(server) => Verdict::Keep,
            _ if map.len() >= MAX_FOREIGN_SERVERS => Verdict::Decline,
            _ => Verdict::Keep,
        }
    }

    fn hold(
        &mut self,
        endpoint: ServerEndpoint,
        tunnel: u64,
        server: &Arc<str>,
        instance: Option<InstanceId>,
        (fallback, now): (bool, Instant),
    ) {
        let most = self.most(endpoint.kind);
        let held = self
            .held_mut(endpoint.kind)
            .entry(server.clone())
            .or_default();
        // What leads to another process of that name has had its time.
        held.retain(|held| held.instance == instance);
        while held.len() >= most
            && let Some(silent) = held.iter().position(|held| !held.live)
        {
            held.remove(silent);
        }
        held.push(TunnelEntry {
            tunnel,
            instance,
            address: endpoint.address,
            since: now,
            fallback,
            live: true,
            draining: false,
        });
    }

    /// Notes that a server fell silent, drains, or is heard again.
    pub(super) fn changed(
        &mut self,
        kind: TunnelKind,
        server: &str,
        tunnel: u64,
        health: Health,
        now: Instant,
    ) {
        let mut held = self.held_mut(kind).get_mut(server).into_iter().flatten();
        let Some(held) = held.find(|held| held.tunnel == tunnel) else {
            return;
        };
        held.live = health != Health::Silent;
        held.draining = health == Health::Draining;
        let address = held.address;
        if !held.live {
            self.hasten(kind, server, address, now, Duration::ZERO);
        }
    }

    /// Notes the end of a tunnel: its server is dialled at once, unless the tunnel had hardly begun.
    /// `chance` is in 0..1.
    pub(super) fn ended(
        &mut self,
        kind: TunnelKind,
        server: &str,
        tunnel: u64,
        now: Instant,
        chance: f64,
    ) {
        // A server that lets agents in and then ends them would be dialled without a pause.
        self.dial_again(kind, server, tunnel, now, (FASTEST, SPREAD.mul_f64(chance)));
    }

    /// Notes the end of a tunnel whose server hands over: its successor is dialled at once, because connections
    /// wait. `chance` is in 0..1.
    pub(super) fn handed_over(
        &mut self,
        kind: TunnelKind,
        server: &str,
        tunnel: u64,
        now: Instant,
        chance: f64,
    ) {
        self.dial_again(
            kind,
            server,
            tunnel,
            now,
            (SUCCESSOR, SUCCESSOR.mul_f64(chance) / 4),
        );
    }

    /// Removes a tunnel, and dials its server again: after `wait`, and not sooner than `least` after the tunnel
    /// began.
    fn dial_again(
        &mut self,
        kind: TunnelKind,
        server: &str,
        tunnel: u64,
        now: Instant,
        (least, wait): (Duration, Duration),
    ) {
        let Some(TunnelEntry { address, since, .. }) = take(self.held_mut(kind), server, tunnel)
        else {
            return;
        };
        let from = now.max(since + least);
        let again = from + wait;
        for (endpoint, candidate) in &mut self.candidates {
            let leads =
                candidate.leads_to.as_deref() == Some(server) || endpoint.address == address;
            if endpoint.kind == kind && leads {
                candidate.pace = FASTEST;
                candidate.next = again;
            }
        }
        self.hasten(kind, server, address, from, HEAD_START);
    }

    /// Returns the foreign tunnels to servers that native ones reach by now: they are no longer held.
    pub(super) fn superseded(&mut self) -> Vec<u64> {
        let superseded = |(server, held): &(&Arc<str>, &TunnelEntry)| {
            held.fallback && self.is_superseded(server, held.address)
        };
        let superseded = all(&self.foreign).filter(superseded);
        let superseded: Vec<_> = superseded
            .map(|(s, held)| (s.clone(), held.tunnel))
            .collect();
        for (server, tunnel) in &superseded {
            take(&mut self.foreign, server, *tunnel);
        }
        superseded.into_iter().map(|(_, tunnel)| tunnel).collect()
    }

    /// Returns the number of servers, by their leases or reports; 0 before any report.
    pub(super) fn server_count(&self) -> u32 {
        let foreign = self.foreign_servers();
        match (self.native.is_empty(), self.foreign.is_empty()) {
            (false, true) => self.native_count,
            (true, false) => foreign,
            _ => self.native_count.max(foreign),
        }
    }

    /// Returns the maximum number of tunnels to one server.
    fn most(&self, kind: TunnelKind) -> usize {
        match kind.is_native() {
            true => self.further + 1,
            // Foreign servers present an id for each.
            false => 1,
        }
    }

    /// Whether `endpoint` is not needed, because there are enough live tunnels to `server`. Those to a
    /// server that drains count at their own address: elsewhere its successor may be found.
    fn is_full(&self, endpoint: ServerEndpoint, server: &str) -> bool {
        let held = self.held(endpoint.kind).get(server).into_iter().flatten();
        let counts =
            |held: &&TunnelEntry| held.live && (!held.draining || held.address == endpoint.address);
        held.filter(counts).count() >= self.most(endpoint.kind)
    }

    fn held(&self, kind: TunnelKind) -> &Tunnels {
        match kind.is_native() {
            true => &self.native,
            false => &self.foreign,
        }
    }

    fn held_mut(&mut self, kind: TunnelKind) -> &mut Tunnels {
        match kind.is_native() {
            true => &mut self.native,
            false => &mut self.foreign,
        }
    }

    /// Brings forward a foreign dial after a native tunnel failed to reach `server`: its address is tried
    /// after `wait`, and others, where a balancer may lead to it too, not before.
    fn hasten(
        &mut self,
        kind: TunnelKind,
        server: &str,
        address: SocketAddr,
        now: Instant,
        wait: Duration,
    ) {
        if !kind.is_native() {
            return;
        }
        for (endpoint, candidate) in &mut self.candidates {
            let leads =
                candidate.leads_to.as_deref() == Some(server) || endpoint.address == address;
            if candidate.fallback && leads {
                candidate.pace = FASTEST;
                candidate.next = now + wait;
            } else if candidate.fallback {
                candidate.next = candidate.next.max(now + wait);
            }
        }
    }

    /// Returns the time of the next dial of an endpoint; `None` while it is not needed.
    fn at(&self, endpoint: &ServerEndpoint, candidate: &Candidate) -> Option<Instant> {
        if !candidate.resolved || candidate.dialling {
            return None;
        }
        if self.is_wanted(endpoint, candidate) {
            return Some(candidate.next);
        }
        let reconciled =
            !endpoint.kind.is_native() && !self.foreign.is_empty() && self.leases.is_none();
        reconciled.then_some(candidate.reconcile)
    }

    fn is_wanted(&self, endpoint: &ServerEndpoint, candidate: &Candidate) -> bool {
        if !endpoint.kind.is_native() && reached(&self.foreign).count() >= MAX_FOREIGN_SERVERS {
            return false;
        }
        // A virtual address may lead to another one than last time.
        let mut here =
            live(self.held(endpoint.kind)).filter(|(_, held)| held.address == endpoint.address);
        if here.any(|(server, _)| !self.is_full(*endpoint, server)) {
            return true;
        }
        let served = match &candidate.leads_to {
            Some(server) => {
                self.is_full(*endpoint, server)
                    || candidate.fallback && self.is_superseded(server, endpoint.address)
            }
            // The foreign server is unknown, but a native tunnel reaches one.
            None => {
                candidate.fallback && live(&self.native).any(|(_, h)| h.address == endpoint.address)
            }
        };
        !served || self.is_missing(endpoint.kind, candidate.fallback)
    }

    fn foreign_servers(&self) -> u32 {
        match self.leases {
            Some(leases) if self.larger => leases.max(self.foreign_count),
            Some(leases) => leases,
            None => self.foreign_count,
        }
    }

    /// Whether there are servers without a live tunnel.
    fn is_missing(&self, kind: TunnelKind, fallback: bool) -> bool {
        let native_missing = reached(&self.native).count() < self.native_count as usize;
        match kind.is_native() {
            true => native_missing,
            false if fallback && self.native_count > 0 && !native_missing => false,
            false => {
                let expected = match self.foreign_servers() {
                    0 if fallback => self.native_count,
                    expected => expected,
                };
                let over_native = reached(&self.native).filter(|s| !is_reached(&self.foreign, s));
                let known = reached(&self.foreign).count() + over_native.count();
                known < expected as usize
            }
        }
    }

    /// Whether a native tunnel reaches the foreign server with the id `server` at `address`. Servers of
    /// ours present several ids to foreign agents there: their own, and that with a number.
    fn is_superseded(&self, server: &str, address: SocketAddr) -> bool {
        live(&self.native).any(|(id, held)| match server.strip_prefix(&**id) {
            Some("") => true,
            Some(rest) => held.address.ip() == address.ip() && is_number(rest),
            None => false,
        })
    }
}

/// Whether the suffix is that of a server's further ids.
fn is_number(suffix: &str) -> bool {
    let digits = suffix.strip_prefix('-').unwrap_or_default();
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

fn slow_down(candidate: &mut Candidate, now: Instant, chance: f64) {
    let jitter = 0.75 + chance / 2.0;
    candidate.next = now + candidate.pace.mul_f64(jitter);
    candidate.reconcile = now + RECONCILE.mul_f64(jitter);
    candidate.pace = candidate.pace.mul_f64(1.5).min(SLOWEST);
}

#[cfg(test)]
mod tests;
