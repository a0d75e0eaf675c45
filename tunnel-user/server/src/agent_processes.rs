//! Processes of agents with their tunnels: the sessions of a lost tunnel go on over another one of the same
//! process.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use tokio::sync::{Semaphore, watch};
use tunnel_proto::handover;
use tunnel_proto::session::InstanceId;

use super::routes::{LinkId, LinkInfo};
use cpc_host::concurrency::ConcurrencyLimit;
use cpc_identity::revoked::Peer;

/// Maximum number of idle sessions of one process that are resumed at once. Busy ones do not wait for them.
const IDLE_AT_ONCE: usize = 32;

/// All processes of agents that have a tunnel, or sessions that wait for one.
#[derive(Clone, Debug)]
pub(crate) struct AgentProcesses {
    known: Arc<Mutex<Known>>,
    /// Maximum number of waiting sessions of each identity.
    waiting: usize,
}

#[derive(Debug, Default)]
struct Known {
    /// Agents by the URI of their identity.
    agents: HashMap<String, Agent>,
    /// Number of agents at which those without a process are forgotten.
    forget_at: usize,
}

/// An identity, which may claim to be any number of processes.
#[derive(Debug)]
struct Agent {
    processes: Vec<(InstanceId, Weak<AgentProcess>)>,
    /// Waiting sessions of all processes.
    waiting: ConcurrencyLimit,
}

/// One process of an agent.
#[derive(Debug)]
pub(crate) struct AgentProcess {
    /// URI of the identity.
    identity: String,
    instance: InstanceId,
    /// Whether the process is known from a predecessor of this server alone: it is about to come.
    is_expected: AtomicBool,
    /// Number of processes that had the id before this one, as far as is known.
    incarnation: AtomicU64,
    /// Tunnels of the process, oldest first.
    links: watch::Sender<Vec<Arc<LinkInfo>>>,
    /// The certificate that it has shown last.
    peer: Mutex<Peer>,
    /// Whether the process has certainly ended.
    ended: watch::Sender<bool>,
    /// Sessions of all processes of the identity that wait for a tunnel.
    pub waiting: ConcurrencyLimit,
    /// Turns of idle sessions.
    pub idle_turns: Semaphore,
}

impl AgentProcesses {
    /// Knows no process. Each identity may have `waiting` sessions that wait for a tunnel.
    pub(crate) fn new(waiting: usize) -> Self {
        Self {
            known: Arc::default(),
            waiting,
        }
    }

    /// Notes a tunnel of process `instance`, whose certificate is `peer`'s. The identity is that of `link`. A higher
    /// `incarnation` than before ends the other tunnels: their process has ended, and connections go on over
    /// this one.
    pub(crate) fn arrived(
        &self,
        (instance, incarnation): (InstanceId, u64),
        peer: Peer,
        link: &Arc<LinkInfo>,
    ) {
        let (process, others) =
            lock(&self.known).arrived(link.identity.uri(), instance, self.waiting);
        *lock(&process.peer) = peer;
        process.ended.send_replace(false);
        process.is_expected.store(false, Ordering::Relaxed);
        match process
            .incarnation
            .fetch_max(incarnation, Ordering::Relaxed)
        {
            before if before < incarnation => process.end_links(),
            before if before > incarnation => link.replaced.notify_one(),
            _ => {}
        }
        // The tunnel arrives once.
        let _ = link.process.set(process.clone());
        process.links.send_modify(|links| links.push(link.clone()));
        // A later process has taken the place of those that are not heard.
        others
            .iter()
            .filter(|other| !other.is_heard() && !other.is_expected.load(Ordering::Relaxed))
            .for_each(|other| other.end());
        process.leave_silent();
    }

    /// Returns a process that a predecessor of this server knew. `None`: it is malformed.
    pub(crate) fn expect(&self, saved: &handover::Peer) -> Option<Arc<AgentProcess>> {
        let instance = InstanceId(<[u8; 16]>::try_from(&saved.instance[..]).ok()?);
        let identity = saved.identity.clone();
        let (process, _) = lock(&self.known).arrived(identity, instance, self.waiting);
        if process.links.borrow().is_empty() {
            process.is_expected.store(true, Ordering::Relaxed);
            *lock(&process.peer) = Peer::restore(saved.identity.clone(), &saved.serial);
        }
        Some(process)
    }
}

impl Known {
    /// Returns process `instance` of an identity, and the other ones.
    fn arrived(
        &mut self,
        identity: String,
        instance: InstanceId,
        waiting: usize,
    ) -> (Arc<AgentProcess>, Vec<Arc<AgentProcess>>) {
        self.forget();
        let agent = self
            .agents
            .entry(identity.clone())
            .or_insert_with(|| Agent {
                processes: Vec::new(),
                waiting: ConcurrencyLimit::new(waiting),
            });
        agent
            .processes
            .retain(|(_, process)| process.strong_count() > 0);
        let known = agent.processes.iter();
        let known = known.filter_map(|(known, process)| Some((*known, process.upgrade()?)));
        let (own, others): (Vec<_>, Vec<_>) = known.partition(|(known, _)| *known == instance);
        let process = match own.into_iter().next() {
            Some((_, process)) => process,
            None => {
                let process = Arc::new(AgentProcess {
                    identity,
                    instance,
                    is_expected: AtomicBool::default(),
                    incarnation: AtomicU64::default(),
                    links: watch::Sender::default(),
                    peer: Mutex::default(),
                    ended: watch::Sender::new(false),
                    waiting: agent.waiting.clone(),
                    idle_turns: Semaphore::new(IDLE_AT_ONCE),
                });
                agent.processes.push((instance, Arc::downgrade(&process)));
                process
            }
        };
        (process, others.into_iter().map(|(_, it)| it).collect())
    }

    /// Forgets agents without a process, when there are many.
    fn forget(&mut self) {
        if self.agents.len() < self.forget_at {
            return;
        }
        let is_live = |(_, process): &(_, Weak<AgentProcess>)| process.strong_count() > 0;
        self.agents
            .retain(|_, agent| agent.processes.iter().any(is_live) || agent.waiting.in_use() > 0);
        self.forget_at = 2 * self.agents.len() + 64;
    }
}

impl AgentProcess {
    /// Returns the process for a successor of this server.
    pub(crate) fn save(&self) -> handover::Peer {
        handover::Peer {
            identity: self.identity.clone(),
            instance: Bytes::copy_from_slice(&self.instance.0),
            serial: Bytes::copy_from_slice(self.peer().serial()),
        }
    }

    /// Removes a tunnel.
    pub(crate) fn left(&self, link: LinkId) {
        self.links
            .send_modify(|links| links.retain(|known| known.id != link));
    }

    /// Ends all tunnels of the process.
    fn end_links(&self) {
        for link in self.links.borrow().iter() {
            link.replaced.notify_one();
        }
    }

    /// Moves the sessions of silent tunnels of a process that has one which is heard. Connections that can't
    /// move stay where they are.
    pub(crate) fn leave_silent(&self) {
        let links = self.links.borrow();
        if links.iter().any(is_heard) {
            for link in links.iter().filter(|link| !is_heard(link)) {
                link.outlived.notify_one();
            }
        }
    }

    /// Notes that a tunnel was silent and is heard again.
    pub(crate) fn heard(&self) {
        self.links.send_modify(|_| {});
    }

    /// Returns the certificate that the process has shown last.
    pub(crate) fn peer(&self) -> Peer {
        lock(&self.peer).clone()
    }

    /// Notes that the process has ended: another one has taken its place.
    pub(crate) fn end(&self) {
        self.ended.send_replace(true);
    }

    /// Whether the process has ended.
    pub(crate) fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Waits until the process has ended.
    pub(crate) async fn ended(&self) {
        // The sender is borrowed.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Whether the process is heard over a tunnel.
    pub(crate) fn is_heard(&self) -> bool {
        self.heard_link().is_some()
    }

    /// Returns the newest tunnel that is heard.
    fn heard_link(&self) -> Option<Arc<LinkInfo>> {
        let links = self.links.borrow();
        let mut heard = links.iter().rev().filter(|link| is_heard(link));
        heard.next().cloned()
    }

    /// Waits for a tunnel that is heard, and returns the newest.
    pub(crate) async fn link(&self) -> Arc<LinkInfo> {
        let mut links = self.links.subscribe();
        loop {
            links.mark_unchanged();
            if let Some(link) = self.heard_link() {
                return link;
            }
            if links.changed().await.is_err() {
                // Not while `self` is borrowed.
                std::future::pending::<()>().await;
            }
        }
    }
}

fn is_heard(link: &Arc<LinkInfo>) -> bool {
    !link.silent.load(Ordering::Relaxed)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;
    use crate::registry::tests;

    fn link(id: u64, name: &str) -> Arc<LinkInfo> {
        tests::link(id, name, "192.0.2.1")
    }

    fn instance(n: u8) -> InstanceId {
        InstanceId([n; 16])
    }

    #[test]
    fn a_session_waits_for_a_tunnel_that_is_heard() {
        let processes = AgentProcesses::new(10);
        let [one, other] = [1, 2].map(|id| link(id, "w1"));
        processes.arrived((instance(1), 0), Peer::default(), &one);
        let process = one.process.get().unwrap().clone();
        assert_eq!(process.link().now_or_never().map(|it| it.id), Some(one.id));
        one.silent.store(true, Ordering::Relaxed);
        assert!(process.link().now_or_never().is_none());
        // The silent tunnel is left as soon as there is another one.
        processes.arrived((instance(1), 0), Peer::default(), &other);
        assert_eq!(
            process.link().now_or_never().map(|it| it.id),
            Some(other.id)
        );
        assert!(one.outlived.notified().now_or_never().is_some() && one.is_outlived());
        process.left(other.id);
        assert!(process.link().now_or_never().is_none() && !process.has_ended());
    }

    #[tokio::test]
    async fn a_tunnel_that_is_heard_again_wakes_who_waits() {
        let processes = AgentProcesses::new(10);
        let one = link(1, "w1");
        one.silent.store(true, Ordering::Relaxed);
        processes.arrived((instance(1), 0), Peer::default(), &one);
        let process = one.process.get().unwrap().clone();
        let mut waits = Box::pin(process.link());
        assert!((&mut waits).now_or_never().is_none());
        one.silent.store(false, Ordering::Relaxed);
        process.heard();
        assert!((&mut waits).now_or_never().is_some());
    }

    /// A later process takes the place of one without a tunnel, and leaves one that is heard.
    #[test]
    fn a_process_that_is_not_heard_ends_when_another_one_comes() {
        let processes = AgentProcesses::new(10);
        let [first, second, third, stranger] =
            [(1, "w1"), (2, "w1"), (3, "w1"), (4, "w2")].map(|(id, name)| link(id, name));
        processes.arrived((instance(1), 0), Peer::default(), &first);
        let process = first.process.get().unwrap().clone();
        processes.arrived((instance(4), 0), Peer::default(), &stranger);
        processes.arrived((instance(2), 0), Peer::default(), &second);
        assert!(!process.has_ended());
        process.left(first.id);
        processes.arrived((instance(3), 0), Peer::default(), &third);
        assert!(process.has_ended() && process.ended().now_or_never().is_some());
        let others = [&second, &third, &stranger].map(|it| it.process.get().unwrap().has_ended());
        assert_eq!(others, [false; 3]);
    }

    /// Follows a crash that the connections have survived.
    #[test]
    fn a_later_incarnation_of_a_process_ends_the_tunnels_of_the_earlier_one() {
        let processes = AgentProcesses::new(10);
        let [old, new, sibling, late] = [1, 2, 3, 4].map(|id| link(id, "w1"));
        processes.arrived((instance(1), 0), Peer::default(), &old);
        processes.arrived((instance(1), 1), Peer::default(), &new);
        processes.arrived((instance(1), 1), Peer::default(), &sibling);
        processes.arrived((instance(1), 0), Peer::default(), &late);
        let ended = [&old, &new, &sibling, &late];
        let ended = ended.map(|link| link.replaced.notified().now_or_never().is_some());
        assert_eq!(ended, [true, false, false, true]);
    }

    #[test]
    fn the_processes_of_one_identity_share_a_limit() {
        let processes = AgentProcesses::new(1);
        let [one, other, stranger] =
            [(1, "w1"), (2, "w1"), (3, "w2")].map(|(id, name)| link(id, name));
        for (at, link) in [&one, &other, &stranger].into_iter().enumerate() {
            processes.arrived((instance(at as u8), 0), Peer::default(), link);
        }
        let waiting = |link: &LinkInfo| link.process.get().unwrap().waiting.acquire();
        let held = waiting(&one);
        assert!(held.is_some() && waiting(&other).is_none() && waiting(&stranger).is_some());
    }
}
