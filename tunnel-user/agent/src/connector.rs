//! Decisions of the connector, which holds tunnels to every server until the process ends: what is
//! dialled, and which tunnels are kept. Sans-I/O: events, time and chance come in, [`Action`]s go out,
//! and the [`driver`] executes them.
//!
//! Invariants: each question of a dialled tunnel (reached, welcomed) has one answer, at once. No server
//! process has more live tunnels than wanted. A draining agent dials nothing.

mod driver;
mod notice;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tunnel_proto::close::CloseReason;

pub(super) use self::driver::{Servers, run};
use self::notice::Notice;
use super::plan::{Health, Plan, ServerEndpoint, ServerInfo, Verdict};
use super::tunnel_info::TunnelEnd;
use cpc_config::agent::Protocol;
use cpc_observe::error_dedup::ErrorDedup;

/// Event for the connector. Numbers are those of [`Action::Dial`].
#[derive(Debug)]
enum Event {
    /// A server's name leads to these addresses, or is not resolved for this reason.
    Resolved(Arc<str>, Result<Vec<SocketAddr>, String>),
    /// The number of foreign servers, from a source beside their reports, changed.
    ForeignServers(Option<u32>),
    /// A dialled server has shown its certificate, which has this name, and waits for an answer.
    Reached(u64, Arc<str>),
    /// A dial failed.
    Failed(u64, String),
    /// A server has welcomed the agent, and waits for an answer.
    Welcomed(u64, ServerInfo),
    /// The server of a kept tunnel fell silent, drains, or is heard again.
    Changed(u64, Health),
    /// A kept tunnel has ended.
    Ended(u64, TunnelEnd),
    /// The process drains.
    Draining,
    /// The process dials nothing for now, because of a handover, or dials again.
    Paused(bool),
    /// The process ends: kept tunnels are closed with this reason.
    Stopping(CloseReason),
    /// Time has passed.
    Timeout,
}

/// A step of the driver, which executes them in order.
#[derive(Debug)]
enum Action {
    /// Dials a server.
    Dial(Dial),
    /// Answers a server that was reached: sends Hello.
    Introduce(u64),
    /// Answers a server that has welcomed the agent: serves the tunnel.
    Keep(u64),
    /// Answers a server that was reached, or has welcomed the agent: ends the tunnel.
    Decline(u64),
    /// Ends a kept tunnel with its last stream.
    Retire(u64),
    /// Ends a kept tunnel at once.
    Close(u64, CloseReason),
    /// Writes a line to the log.
    Log(Notice),
}

/// A dial.
#[derive(Clone, Debug)]
struct Dial {
    /// Number of the tunnel, unique within the process.
    number: u64,
    /// Address and protocol.
    endpoint: ServerEndpoint,
    /// Server name that the address was resolved from.
    server: Arc<str>,
    /// Number of the tunnel among those at its address; its successor gets the same number.
    slot: u8,
}

/// Tunnels and servers of an agent.
#[derive(Debug, Default)]
struct Connector {
    plan: Plan,
    dialling: BTreeMap<u64, Dial>,
    tunnels: BTreeMap<u64, KeptTunnel>,
    complaints: BTreeMap<ServerEndpoint, ErrorDedup>,
    /// Protocol and addresses of each server name.
    names: BTreeMap<Arc<str>, (Protocol, Vec<SocketAddr>)>,
    unresolved: BTreeSet<Arc<str>>,
    last: u64,
    is_draining: bool,
    is_paused: bool,
    is_stopping: bool,
    actions: VecDeque<Action>,
}

/// A kept tunnel.
#[derive(Debug)]
struct KeptTunnel {
    endpoint: ServerEndpoint,
    slot: u8,
    server: Arc<str>,
    is_retiring: bool,
}

impl Connector {
    /// Creates the connector of a starting agent: `names` are "host:port" of each server with its
    /// protocol, `tunnels` the number of native tunnels to each server. `counts_both` selects the larger
    /// one of that source and the reports as the number of foreign servers.
    fn new(
        names: impl IntoIterator<Item = (Arc<str>, Protocol)>,
        tunnels: u8,
        counts_both: bool,
    ) -> Self {
        let mut plan = Plan::default();
        plan.set_tunnels(tunnels.into());
        if counts_both {
            plan.count_both();
        }
        let names = names.into_iter();
        Self {
            plan,
            names: names
                .map(|(name, protocol)| (name, (protocol, Vec::new())))
                .collect(),
            ..Self::default()
        }
    }

    /// Handles an event. `chance` is a random number in 0..1.
    fn handle(&mut self, event: Event, now: Instant, chance: f64) {
        match event {
            Event::Resolved(server, answer) => self.resolved(server, answer, now),
            Event::ForeignServers(count) => self.plan.set_leases(count),
            Event::Reached(number, server) => self.reached(number, &server, now, chance),
            Event::Failed(number, error) => {
                if let Some(Dial { endpoint, .. }) = self.dialling.remove(&number) {
                    self.plan.failed(endpoint, now, chance);
                    // An agent that ends does not try again.
                    if !self.is_stopping {
                        self.complain(endpoint, &error);
                    }
                }
            }
            Event::Welcomed(number, server) => self.welcomed(number, server, now, chance),
            Event::Changed(number, health) => self.changed(number, health, now),
            Event::Ended(number, end) => self.ended(number, end, now, chance),
            Event::Draining => self.is_draining = true,
            Event::Paused(is_paused) => self.is_paused = is_paused,
            Event::Stopping(reason) => self.stop(reason),
            Event::Timeout => {}
        }
        if !self.is_draining && !self.is_paused {
            for endpoint in self.plan.due(now) {
                self.dial(endpoint);
            }
        }
    }

    /// Returns the next action.
    fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Returns the time of the next [`Event::Timeout`].
    fn poll_timeout(&self) -> Option<Instant> {
        match self.is_draining || self.is_paused {
            true => None,
            false => self.plan.next_timeout(),
        }
    }

    /// Returns the number of servers, by their leases or reports; 0 before any report.
    fn server_count(&self) -> u32 {
        self.plan.server_count()
    }

    /// Whether a tunnel is kept.
    fn has_tunnels(&self) -> bool {
        !self.tunnels.is_empty()
    }

    fn resolved(
        &mut self,
        server: Arc<str>,
        answer: Result<Vec<SocketAddr>, String>,
        now: Instant,
    ) {
        match answer {
            Ok(addresses) => {
                self.unresolved.remove(&server);
                if let Some((_, known)) = self.names.get_mut(&server) {
                    *known = addresses;
                }
            }
            // Known addresses may still be right. Logged once, not at every attempt.
            Err(error) => {
                if self.unresolved.insert(server.clone()) {
                    self.log(Notice::Unresolved { server, error });
                }
                return;
            }
        }
        let names = self.names.values();
        let addresses: Vec<_> = names
            .flat_map(|(protocol, addresses)| addresses.iter().map(|addr| (*addr, *protocol)))
            .collect();
        let known = |at: &ServerEndpoint| addresses.iter().any(|(addr, _)| *addr == at.address);
        self.complaints.retain(|endpoint, _| known(endpoint));
        self.plan.set_addresses(&addresses, now);
    }

    fn dial(&mut self, endpoint: ServerEndpoint) {
        self.last += 1;
        let taken = |slot: &u8| {
            let mut kept = self.tunnels.values();
            kept.any(|kept| kept.endpoint.address == endpoint.address && kept.slot == *slot)
        };
        let dial = Dial {
            number: self.last,
            endpoint,
            server: self.name_of(endpoint),
            slot: (0..u8::MAX).find(|slot| !taken(slot)).unwrap_or_default(),
        };
        self.dialling.insert(dial.number, dial.clone());
        self.actions.push_back(Action::Dial(dial));
    }

    /// Returns the server name that `endpoint` was resolved from; an empty one if that is no longer so.
    fn name_of(&self, endpoint: ServerEndpoint) -> Arc<str> {
        let mut names = self.names.iter();
        let name = names.find(|(_, (protocol, addresses))| {
            protocol.kinds().contains(&endpoint.kind) && addresses.contains(&endpoint.address)
        });
        name.map(|(name, _)| name.clone()).unwrap_or_default()
    }

    fn reached(&mut self, number: u64, server: &str, now: Instant, chance: f64) {
        let dial = self.dialling.get(&number).filter(|_| !self.is_stopping);
        let wanted = dial.is_some_and(|dial| {
            let endpoint = dial.endpoint;
            self.plan.reached(endpoint, server, now, chance)
        });
        if wanted {
            self.actions.push_back(Action::Introduce(number));
        } else {
            self.dialling.remove(&number);
            self.actions.push_back(Action::Decline(number));
        }
    }

    fn welcomed(&mut self, number: u64, info: ServerInfo, now: Instant, chance: f64) {
        let dial = self.dialling.remove(&number);
        let Some(Dial { endpoint, slot, .. }) = dial.filter(|_| !self.is_stopping) else {
            return self.actions.push_back(Action::Decline(number));
        };
        let server = info.server.clone();
        let verdict = self.plan.welcomed(endpoint, number, info, now, chance);
        if let Verdict::Conflict(other) = verdict {
            let error = format!("{other} is a server {server} too; give each an id of its own");
            self.complain(endpoint, &error);
        } else {
            self.complaints.remove(&endpoint);
        }
        if verdict != Verdict::Keep {
            return self.actions.push_back(Action::Decline(number));
        }
        let kept = KeptTunnel {
            endpoint,
            slot,
            server,
            is_retiring: false,
        };
        self.tunnels.insert(number, kept);
        self.actions.push_back(Action::Keep(number));
        self.retire_superseded();
    }

    fn changed(&mut self, number: u64, health: Health, now: Instant) {
        let Some(KeptTunnel {
            endpoint, server, ..
        }) = self.tunnels.get(&number)
        else {
            return;
        };
        let kind = endpoint.kind;
        self.plan.changed(kind, server, number, health, now);
        if health == Health::Live && !self.plan.holds(kind, server, number) {
            self.retire(number);
        } else {
            self.retire_superseded();
        }
    }

    fn ended(&mut self, number: u64, end: TunnelEnd, now: Instant, chance: f64) {
        let Some(kept) = self.tunnels.remove(&number) else {
            return;
        };
        let KeptTunnel {
            endpoint, server, ..
        } = kept;
        let plan = &mut self.plan;
        let note = match end.reason {
            CloseReason::HandedOver => Plan::handed_over,
            _ => Plan::ended,
        };
        note(plan, endpoint.kind, &server, number, now, chance);
        let is_intended = matches!(end.reason, CloseReason::Replaced | CloseReason::HandedOver)
            || self.is_draining;
        self.log(Notice::Ended {
            server,
            endpoint,
            end,
            is_intended,
        });
    }

    fn stop(&mut self, reason: CloseReason) {
        self.is_draining = true;
        self.is_stopping = true;
        let numbers = self.tunnels.keys();
        self.actions
            .extend(numbers.map(|number| Action::Close(*number, reason)));
    }

    /// Retires foreign tunnels where a native one does the same: their connections go on.
    fn retire_superseded(&mut self) {
        for number in self.plan.superseded() {
            if let Some(kept) = self.tunnels.get(&number) {
                let notice = Notice::Superseded {
                    server: kept.server.clone(),
                    endpoint: kept.endpoint,
                };
                self.log(notice);
                self.retire(number);
            }
        }
    }

    fn retire(&mut self, number: u64) {
        if let Some(kept) = self.tunnels.get_mut(&number)
            && !std::mem::replace(&mut kept.is_retiring, true)
        {
            self.actions.push_back(Action::Retire(number));
        }
    }

    /// Logs an error of an endpoint once per kind of error, not at every attempt. A server that does not
    /// speak one protocol is no error where another one leads to it.
    fn complain(&mut self, endpoint: ServerEndpoint, error: &dyn fmt::Display) {
        let error = error.to_string();
        let complaint = self.complaints.entry(endpoint).or_default();
        if !complaint.is_new(&error) {
            return;
        }
        let mut kept = self.tunnels.values();
        let is_reached = kept.any(|kept| kept.endpoint.address == endpoint.address);
        self.log(Notice::NotReached {
            endpoint,
            error,
            is_reached,
        });
    }

    fn log(&mut self, notice: Notice) {
        self.actions.push_back(Action::Log(notice));
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
