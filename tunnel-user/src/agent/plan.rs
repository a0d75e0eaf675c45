//! Which server address to dial next. Sans-IO: time and chance are arguments.
//!
//! The aim: a live tunnel to every server, told apart by server id, since several addresses may
//! lead to one server and one address (a virtual IP) to several. Dialling never ends; only its
//! pace changes.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tunnel_proto::session::InstanceId;

/// The pace of dialling an address: from this..
const SLOWEST: Duration = Duration::from_secs(10);

/// ..to this, and half as slow again after each failure.
const FASTEST: Duration = Duration::from_secs(1);

/// After a tunnel was lost its server is dialled at once, but not by all agents in the same instant.
const SPREAD: Duration = Duration::from_millis(200);

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
    resolved: bool,
    dialling: bool,
    next: Instant,
    pace: Duration,
}

#[derive(Debug)]
struct Held {
    tunnel: u64,
    instance: InstanceId,
    address: SocketAddr,
    live: bool,
}

/// What is known of addresses and servers.
#[derive(Debug, Default)]
pub struct Plan {
    candidates: BTreeMap<SocketAddr, Candidate>,
    held: HashMap<Arc<str>, Held>,
    server_count: u32,
}

impl Plan {
    /// The addresses that the configured names have now.
    pub fn set_addresses(&mut self, addresses: &[SocketAddr], now: Instant) {
        for candidate in self.candidates.values_mut() {
            candidate.resolved = false;
        }
        for address in addresses {
            let fresh = || Candidate {
                leads_to: None,
                resolved: true,
                dialling: false,
                next: now,
                pace: FASTEST,
            };
            self.candidates
                .entry(*address)
                .or_insert_with(fresh)
                .resolved = true;
        }
        self.candidates
            .retain(|_, candidate| candidate.resolved || candidate.dialling);
    }

    /// The addresses to dial now. Each is then under way until [`failed`](Self::failed) or
    /// [`welcomed`](Self::welcomed).
    pub fn due(&mut self, now: Instant) -> Vec<SocketAddr> {
        let mut due = Vec::new();
        for (address, candidate) in &mut self.candidates {
            if candidate.next <= now && wanted(candidate, &self.held, self.server_count) {
                candidate.dialling = true;
                due.push(*address);
            }
        }
        due
    }

    /// When [`due`](Self::due) should be asked again.
    pub fn next_timeout(&self) -> Option<Instant> {
        let wanted = |c: &&Candidate| wanted(c, &self.held, self.server_count);
        self.candidates
            .values()
            .filter(wanted)
            .map(|c| c.next)
            .min()
    }

    /// A dial came to nothing. `chance` is in 0..1.
    pub fn failed(&mut self, address: SocketAddr, now: Instant, chance: f64) {
        if let Some(candidate) = self.candidates.get_mut(&address) {
            candidate.dialling = false;
            slow_down(candidate, now, chance);
        }
    }

    /// A dial reached `server`, as its certificate says. Whether to introduce ourselves: not where
    /// this address is known to lead to it and a live tunnel does, too, since the server would
    /// send connections into a tunnel that is about to be declined. `chance` is in 0..1.
    pub fn reached(
        &mut self,
        address: SocketAddr,
        server: &str,
        now: Instant,
        chance: f64,
    ) -> bool {
        let live = self.held.get(server).is_some_and(|held| held.live);
        match self.candidates.get_mut(&address) {
            Some(candidate) if live && candidate.leads_to.as_deref() == Some(server) => {
                candidate.dialling = false;
                slow_down(candidate, now, chance);
                false
            }
            _ => true,
        }
    }

    /// Whether `tunnel` is the one that is held to `server`.
    pub fn holds(&self, server: &str, tunnel: u64) -> bool {
        self.held
            .get(server)
            .is_some_and(|held| held.tunnel == tunnel)
    }

    /// A dial led to a server. `tunnel` tells this tunnel from others, `chance` is in 0..1.
    pub fn welcomed(
        &mut self,
        address: SocketAddr,
        (server, instance, tunnel): (Arc<str>, InstanceId, u64),
        server_count: u32,
        now: Instant,
        chance: f64,
    ) -> Verdict {
        self.server_count = server_count;
        let verdict = match self.held.get(&server) {
            Some(held) if held.instance == instance && held.live => Verdict::Decline,
            Some(held) if held.instance != instance && held.live && held.address != address => {
                Verdict::Conflict(held.address)
            }
            _ => Verdict::Keep,
        };
        if let Some(candidate) = self.candidates.get_mut(&address) {
            candidate.dialling = false;
            candidate.leads_to = Some(server.clone());
            if verdict == Verdict::Keep {
                candidate.pace = FASTEST;
                candidate.next = now + FASTEST;
            } else {
                slow_down(candidate, now, chance);
            }
        }
        if verdict == Verdict::Keep {
            self.held.insert(
                server,
                Held {
                    tunnel,
                    instance,
                    address,
                    live: true,
                },
            );
        }
        verdict
    }

    /// A server fell silent, drains, or is heard again.
    pub fn changed(&mut self, server: &str, tunnel: u64, live: bool) {
        if let Some(held) = self
            .held
            .get_mut(server)
            .filter(|held| held.tunnel == tunnel)
        {
            held.live = live;
        }
    }

    /// A tunnel has ended: its server is dialled at once. `chance` is in 0..1.
    pub fn ended(&mut self, server: &str, tunnel: u64, now: Instant, chance: f64) {
        if self
            .held
            .get(server)
            .is_none_or(|held| held.tunnel != tunnel)
        {
            return;
        }
        self.held.remove(server);
        for candidate in self.candidates.values_mut() {
            if candidate.leads_to.as_deref() == Some(server) {
                candidate.pace = FASTEST;
                candidate.next = now + SPREAD.mul_f64(chance);
            }
        }
    }

    /// How many servers there are, as the last one said; 0 before any did.
    pub fn server_count(&self) -> u32 {
        self.server_count
    }
}

fn slow_down(candidate: &mut Candidate, now: Instant, chance: f64) {
    candidate.next = now + candidate.pace.mul_f64(0.75 + chance / 2.0);
    candidate.pace = candidate.pace.mul_f64(1.5).min(SLOWEST);
}

fn wanted(candidate: &Candidate, held: &HashMap<Arc<str>, Held>, server_count: u32) -> bool {
    let live = |server: &Arc<str>| held.get(server).is_some_and(|held| held.live);
    let unserved = !candidate.leads_to.as_ref().is_some_and(live);
    let missing = held.values().filter(|held| held.live).count() < server_count as usize;
    candidate.resolved && !candidate.dialling && (unserved || missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ([u8; 4], u16) = ([10, 0, 0, 1], 8132);
    const B: ([u8; 4], u16) = ([10, 0, 0, 2], 8132);

    fn plan(addresses: &[([u8; 4], u16)], now: Instant) -> Plan {
        let mut plan = Plan::default();
        let addresses: Vec<_> = addresses.iter().map(|a| SocketAddr::from(*a)).collect();
        plan.set_addresses(&addresses, now);
        plan
    }

    fn welcome(
        plan: &mut Plan,
        at: ([u8; 4], u16),
        id: &str,
        instance: u8,
        tunnel: u64,
        count: u32,
        now: Instant,
    ) -> Verdict {
        let server = (id.into(), InstanceId([instance; 16]), tunnel);
        plan.welcomed(at.into(), server, count, now, 0.5)
    }

    #[test]
    fn every_address_is_dialled_once_and_then_rests() {
        let now = Instant::now();
        let mut plan = plan(&[A, B], now);
        assert_eq!(plan.due(now), [A.into(), B.into()]);
        assert!(plan.due(now).is_empty());
        assert_eq!(welcome(&mut plan, A, "s1", 1, 1, 2, now), Verdict::Keep);
        assert_eq!(welcome(&mut plan, B, "s2", 2, 2, 2, now), Verdict::Keep);
        assert_eq!(plan.next_timeout(), None);
    }

    #[test]
    fn a_virtual_address_is_dialled_until_all_servers_are_found() {
        let mut now = Instant::now();
        let mut plan = plan(&[A], now);
        plan.due(now);
        welcome(&mut plan, A, "s1", 1, 1, 2, now);
        now = plan.next_timeout().unwrap();
        assert_eq!(plan.due(now), [A.into()]);
        assert!(!plan.reached(A.into(), "s1", now, 0.5));
        now = plan.next_timeout().unwrap();
        assert_eq!(plan.due(now), [A.into()]);
        assert!(plan.reached(A.into(), "s2", now, 0.5));
        assert_eq!(welcome(&mut plan, A, "s2", 2, 3, 2, now), Verdict::Keep);
        assert_eq!(plan.next_timeout(), None);
    }

    #[test]
    fn a_lost_server_is_dialled_at_once_and_for_ever() {
        let mut now = Instant::now();
        let mut plan = plan(&[A], now);
        plan.due(now);
        welcome(&mut plan, A, "s1", 1, 1, 1, now);
        plan.ended("s1", 1, now, 0.99);
        assert!(plan.next_timeout().unwrap() - now < SPREAD);
        for _ in 0..50 {
            let next = plan.next_timeout().unwrap();
            assert!(next - now <= SLOWEST.mul_f64(1.25));
            now = next;
            assert_eq!(plan.due(now), [A.into()]);
            plan.failed(A.into(), now, 0.99);
        }
    }

    #[test]
    fn a_silent_server_is_dialled_beside_its_tunnel() {
        let now = Instant::now();
        let mut plan = plan(&[A], now);
        plan.due(now);
        welcome(&mut plan, A, "s1", 1, 1, 1, now);
        plan.changed("s1", 1, false);
        let now = now + FASTEST;
        assert_eq!(plan.due(now), [A.into()]);
        assert_eq!(welcome(&mut plan, A, "s1", 1, 2, 1, now), Verdict::Keep);
        // The old tunnel's end is no loss.
        plan.ended("s1", 1, now, 0.0);
        assert_eq!(plan.next_timeout(), None);
    }

    #[test]
    fn a_restarted_server_takes_the_place_of_its_former_process() {
        let now = Instant::now();
        let mut plan = plan(&[A], now);
        plan.due(now);
        welcome(&mut plan, A, "s1", 1, 1, 1, now);
        plan.changed("s1", 1, false);
        plan.due(now + FASTEST);
        assert_eq!(welcome(&mut plan, A, "s1", 9, 2, 1, now), Verdict::Keep);
        assert!(plan.holds("s1", 2) && !plan.holds("s1", 1));
    }

    #[test]
    fn of_two_servers_with_one_id_the_first_is_kept_while_it_lives() {
        let now = Instant::now();
        let mut plan = plan(&[A, B], now);
        plan.due(now);
        assert_eq!(welcome(&mut plan, A, "s1", 1, 1, 2, now), Verdict::Keep);
        let conflict = Verdict::Conflict(A.into());
        assert_eq!(welcome(&mut plan, B, "s1", 2, 2, 2, now), conflict);
        plan.changed("s1", 1, false);
        assert_eq!(welcome(&mut plan, B, "s1", 2, 3, 2, now), Verdict::Keep);
    }

    #[test]
    fn an_address_that_is_no_longer_resolved_is_not_dialled() {
        let now = Instant::now();
        let mut plan = plan(&[A, B], now);
        plan.set_addresses(&[B.into()], now);
        assert_eq!(plan.due(now), [B.into()]);
    }
}
