//! The sessions of an agent: which there are, and those that wait for another tunnel. All shards share them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::time::sleep;
use tunnel_proto::close::CloseReason;
use tunnel_proto::resumption::SessionId;
use tunnel_proto::session::InstanceId;

use super::dialer::ParkedConnection;
use super::handover::Stage;
use super::plan::Health;
use super::stats::TunnelStats;
use super::worker::{WAITING_SESSIONS, Worker};
use cpc_host::concurrency::{ConcurrencyLimit, Permit};
use cpc_host::lifecycle::Phase;
use cpc_identity::revoked::Peer;
use cpc_observe::sessions::SessionMetrics;
use cpc_observe::sessions::WaitingGuard;
use cpc_session::{Bounds, Registration, SessionState, survives};

/// Interval of looks at waiting sessions: for those that have expired, and those whose server was revoked.
const LOOK: Duration = Duration::from_secs(1);

/// Time without a resumption, with a tunnel that is heard, after which a server has lost the sessions that wait. It
/// notices a lost tunnel within 3 s where it has another one.
const RETURN: Duration = Duration::from_secs(15);

/// A process of a server. Only the same one resumes a session.
#[derive(Debug)]
pub(super) struct ServerProcess {
    /// URI of its identity.
    pub identity: String,
    /// The process.
    pub instance: InstanceId,
    /// Number of processes that had this id before.
    pub incarnation: u64,
    /// Certificate of the process, as lists of revocations know it.
    pub peer: Peer,
}

impl PartialEq for ServerProcess {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity && self.instance == other.instance
    }
}

/// A session that waits for another tunnel.
pub(super) struct Parked {
    /// The session.
    pub state: Box<SessionState>,
    /// Connection to the target; `None` if that has ended and the server is yet to learn how.
    pub connection: Option<Box<ParkedConnection>>,
    /// Reason for which the tunnel was lost.
    pub cause: CloseReason,
    /// Time at which it was lost.
    pub at: Instant,
    /// Process of the server.
    pub server: Arc<ServerProcess>,
    /// Permit of the wait. One that a handover begins is bounded by the connections.
    _permit: Option<Permit>,
    _waiting: Option<WaitingGuard>,
}

enum Slot {
    /// A tunnel carries the session.
    Carried(Arc<ServerProcess>, Arc<TunnelStats>),
    /// No tunnel does.
    Parked(Box<Parked>),
}

impl Slot {
    fn server(&self) -> &ServerProcess {
        match self {
            Self::Carried(server, _) => server,
            Self::Parked(parked) => &parked.server,
        }
    }
}

/// Answer to a server that wants to continue a session.
pub(super) enum Found {
    /// The session waits.
    Parked(Box<Parked>),
    /// Another tunnel still carries it, for a moment.
    Carried,
    /// There is no such session of this server.
    Unknown,
}

/// A server that resumes sessions over a tunnel.
struct Returned {
    process: Arc<ServerProcess>,
    /// The tunnel, while there is one.
    tunnel: Weak<TunnelStats>,
    /// Last resumption, or the start of the tunnel.
    last: Instant,
}

impl Returned {
    /// Notes whether the server could resume something at `now`. Returns whether it had time for all sessions.
    fn is_done(&mut self, now: Instant) -> bool {
        let tunnel = self.tunnel.upgrade();
        if tunnel.is_none_or(|tunnel| tunnel.health() != Health::Live) {
            self.last = now;
        }
        now.saturating_duration_since(self.last) >= RETURN
    }
}

/// All sessions of an agent.
pub(super) struct Sessions {
    table: Mutex<HashMap<SessionId, Slot>>,
    /// Bounds on each.
    pub bounds: Arc<Bounds>,
    /// Servers with their newest tunnel, by the URI of the identity. There are few servers.
    returned: Mutex<HashMap<String, Returned>>,
    /// Metrics.
    pub metrics: SessionMetrics,
    /// Time for which a session waits for a tunnel.
    resume: Duration,
    /// Sessions that wait.
    pub waiting: ConcurrencyLimit,
}

impl Sessions {
    /// Has no session. Each waits `resume` for another tunnel, `waiting` at once.
    pub(super) fn new(
        bounds: Bounds,
        metrics: SessionMetrics,
        resume: Duration,
        waiting: usize,
    ) -> Arc<Self> {
        Arc::new(Self {
            table: Mutex::default(),
            returned: Mutex::default(),
            bounds: Arc::new(bounds),
            metrics,
            resume,
            waiting: ConcurrencyLimit::new(waiting),
        })
    }

    /// Whether a connection can outlive its tunnel at all.
    pub(super) fn are_held(&self) -> bool {
        !self.resume.is_zero()
    }

    /// Begins session `id` of `server`, over the tunnel of `stats`. Returns `None` if there is one of that
    /// name.
    pub(super) fn begin(
        self: &Arc<Self>,
        id: SessionId,
        server: &Arc<ServerProcess>,
        stats: &Arc<TunnelStats>,
    ) -> Option<Box<SessionState>> {
        {
            let mut table = self.lock();
            if table.contains_key(&id) {
                return None;
            }
            table.insert(id, Slot::Carried(server.clone(), stats.clone()));
        }
        let mut state = Box::new(SessionState::new(id, self.bounds.clone()));
        state.register(self.registration());
        Some(state)
    }

    /// Returns what removes a session from the table at its end.
    fn registration(self: &Arc<Self>) -> Registration {
        // A session that waits is in the table itself.
        let sessions = Arc::downgrade(self);
        Registration(Box::new(move |id| {
            let slot = sessions.upgrade().and_then(|it| it.lock().remove(&id));
            // Outside of the lock: what the slot holds may have an end of its own.
            drop(slot);
        }))
    }

    /// Whether a tunnel carries a session.
    pub(super) fn are_carried(&self) -> bool {
        let is_carried = |slot: &Slot| matches!(slot, Slot::Carried(..));
        self.lock().values().any(is_carried)
    }

    /// Takes all waiting sessions, for another process.
    pub(super) fn take_all(&self) -> Vec<Parked> {
        let slots = std::mem::take(&mut *self.lock());
        let parked = slots.into_values().filter_map(|slot| match slot {
            Slot::Parked(parked) => Some(*parked),
            Slot::Carried(..) => None,
        });
        parked.collect()
    }

    /// Returns a waiting session that another process has given away.
    pub(super) fn restored(
        self: &Arc<Self>,
        mut state: SessionState,
        connection: Option<Box<ParkedConnection>>,
        (cause, at): (CloseReason, Instant),
        server: Arc<ServerProcess>,
    ) -> Parked {
        state.register(self.registration());
        let is_connected = connection.is_some();
        Parked {
            state: Box::new(state),
            connection,
            cause,
            at,
            server,
            _permit: self.waiting.acquire(),
            _waiting: is_connected.then(|| self.metrics.waiting.add(at)),
        }
    }

    /// Adds waiting sessions.
    pub(super) fn insert(&self, restored: Vec<Parked>) {
        let slots = restored.into_iter();
        for parked in slots {
            let id = parked.state.session.id();
            let before = self.lock().insert(id, Slot::Parked(Box::new(parked)));
            // Outside of the lock: its end removes a name from the table.
            drop(before);
        }
    }

    /// Parks a session of `server` whose tunnel was lost for `cause`. Returns its connection if it ends with the
    /// tunnel.
    pub(super) fn park(
        &self,
        worker: &Worker,
        server: &Arc<ServerProcess>,
        cause: CloseReason,
        state: Box<SessionState>,
        connection: Option<Box<ParkedConnection>>,
    ) -> Result<(), Option<Box<ParkedConnection>>> {
        let is_handed_over = worker.handover.stage() != Stage::Serving;
        // A draining agent dials no server again.
        let goes_on = is_handed_over || *worker.phase.borrow() == Phase::Running;
        if !survives(cause) || !goes_on || !self.are_held() {
            return Err(connection);
        }
        let permit = self.waiting.acquire();
        if permit.is_none() && !is_handed_over {
            worker.limits.refuse(WAITING_SESSIONS);
            return Err(connection);
        }
        let id = state.session.id();
        let is_connected = connection.is_some();
        let at = Instant::now();
        let parked = Box::new(Parked {
            state,
            connection,
            cause,
            at,
            server: server.clone(),
            _permit: permit,
            _waiting: is_connected.then(|| self.metrics.waiting.add(at)),
        });
        let before = self.lock().insert(id, Slot::Parked(parked));
        drop(before);
        Ok(())
    }

    /// Takes session `id` for `server`, which wants to continue it over the tunnel of `stats`. Asks the
    /// tunnel that still carries the session to release it.
    pub(super) fn take(
        &self,
        id: SessionId,
        server: &Arc<ServerProcess>,
        stats: &Arc<TunnelStats>,
    ) -> Found {
        let mut table = self.lock();
        let Some(slot) = table.get_mut(&id).filter(|slot| slot.server() == &**server) else {
            return Found::Unknown;
        };
        if let Slot::Carried(_, carrier) = slot {
            if !Arc::ptr_eq(carrier, stats) {
                carrier.move_away(id);
            }
            return Found::Carried;
        }
        let carried = Slot::Carried(server.clone(), stats.clone());
        let before = std::mem::replace(slot, carried);
        drop(table);
        // As long as a server resumes sessions, the others wait for their turn.
        if let Some(returned) = self.lock_returned().get_mut(&server.identity) {
            returned.last = Instant::now();
        }
        match before {
            Slot::Parked(parked) => Found::Parked(parked),
            Slot::Carried(..) => Found::Carried,
        }
    }

    /// Ends the waiting sessions of earlier processes of the server that `process` is, to which there is a new
    /// `tunnel`. The process itself gets some time to resume what it has.
    pub(super) fn succeed(
        &self,
        worker: &Worker,
        process: &Arc<ServerProcess>,
        tunnel: &Arc<TunnelStats>,
    ) {
        self.note(process, tunnel, Instant::now());
        self.end(worker, CloseReason::LinkLost, |parked| {
            parked.server.identity == process.identity && parked.server.instance != process.instance
        });
    }

    /// Ends sessions that have waited too long, or whose server was revoked. Runs without end.
    pub(super) async fn watch(self: Arc<Self>, worker: Worker) {
        loop {
            sleep(LOOK).await;
            let now = Instant::now();
            self.end(&worker, CloseReason::LinkLost, |parked| {
                now.saturating_duration_since(parked.at) >= self.resume
            });
            self.end_forgotten(&worker, now);
            if let Some(material) = &worker.material {
                let revocations = material.revocations();
                self.end(&worker, CloseReason::IdentityRefused, |parked| {
                    revocations.check(&parked.server.peer).is_err()
                });
            }
        }
    }

    /// Ends the sessions that their server does not resume, although it has a tunnel: it has lost them, or has not
    /// waited so long.
    fn end_forgotten(&self, worker: &Worker, now: Instant) {
        for process in self.done(now) {
            self.end(worker, CloseReason::LinkLost, |parked| {
                *parked.server == *process && now.saturating_duration_since(parked.at) >= RETURN
            });
        }
    }

    /// Notes the newest tunnel of `process`. That of an earlier incarnation is late.
    fn note(&self, process: &Arc<ServerProcess>, tunnel: &Arc<TunnelStats>, now: Instant) {
        let mut returned = self.lock_returned();
        let is_late =
            |known: &ServerProcess| known == &**process && known.incarnation > process.incarnation;
        let known = returned.get(&process.identity);
        if !known.is_some_and(|known| is_late(&known.process)) {
            let current = Returned {
                process: process.clone(),
                tunnel: Arc::downgrade(tunnel),
                last: now,
            };
            returned.insert(process.identity.clone(), current);
        }
    }

    /// Returns the servers that had time to resume all sessions.
    fn done(&self, now: Instant) -> Vec<Arc<ServerProcess>> {
        let mut returned = self.lock_returned();
        let done = returned.values_mut().filter_map(|it| {
            let is_done = it.is_done(now);
            is_done.then(|| it.process.clone())
        });
        done.collect()
    }

    fn lock_returned(&self) -> MutexGuard<'_, HashMap<String, Returned>> {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends waiting sessions with `reason`.
    fn end(&self, worker: &Worker, reason: CloseReason, is_meant: impl Fn(&Parked) -> bool) {
        let ended: Vec<_> = {
            let mut table = self.lock();
            let is_ended = |slot: &Slot| match slot {
                Slot::Parked(parked) => is_meant(parked),
                Slot::Carried(..) => false,
            };
            table.extract_if(|_, slot| is_ended(slot)).collect()
        };
        for (_, slot) in ended {
            if let Slot::Parked(parked) = slot
                && let Some(connection) = parked.connection
            {
                self.metrics.lost(reason);
                connection.end(worker, reason);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, Slot>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::Ordering;

    use cpc_datapath::Budget;
    use prometheus_client::registry::Registry;

    use super::*;

    fn sessions() -> Arc<Sessions> {
        let metrics = SessionMetrics::register(&mut Registry::default());
        let bounds = Bounds {
            bytes: 1000,
            window: 1000,
            budget: Budget::new(1000),
            held: metrics.held.clone(),
        };
        Sessions::new(bounds, metrics, Duration::from_secs(1), 10)
    }

    fn server(name: &str, instance: u8) -> Arc<ServerProcess> {
        Arc::new(ServerProcess {
            identity: format!("spiffe://cluster.local/server/{name}"),
            instance: InstanceId([instance; 16]),
            incarnation: 0,
            peer: Peer::default(),
        })
    }

    fn tunnel() -> Arc<TunnelStats> {
        Arc::new(TunnelStats::new(&[], Vec::new()))
    }

    #[test]
    fn a_session_has_one_owner_and_one_name() {
        let (sessions, id) = (sessions(), SessionId::new([1; 16]));
        let state = sessions.begin(id, &server("s1", 1), &tunnel());
        assert!(state.is_some());
        for other in [server("s1", 1), server("s2", 1)] {
            let again = sessions.begin(id, &other, &tunnel());
            assert!(again.is_none(), "a server that knows the name takes it");
        }
        drop(state);
        assert!(sessions.begin(id, &server("s2", 1), &tunnel()).is_some());
    }

    /// Neither another server with the name of a session nor another process of the same one gets it.
    #[test]
    fn only_the_same_process_of_the_same_server_resumes_a_session() {
        let (sessions, id) = (sessions(), SessionId::new([1; 16]));
        let _state = sessions.begin(id, &server("s1", 1), &tunnel());
        for other in [server("s2", 1), server("s1", 2)] {
            let found = sessions.take(id, &other, &tunnel());
            assert!(matches!(found, Found::Unknown), "{other:?}");
        }
        let unknown = SessionId::new([2; 16]);
        let found = sessions.take(unknown, &server("s1", 1), &tunnel());
        assert!(matches!(found, Found::Unknown));
    }

    /// A server has time to resume its sessions, but only while its tunnel is heard.
    #[test]
    fn a_server_forgets_what_it_does_not_resume() {
        let sessions = sessions();
        let (process, lost, now) = (server("s1", 1), tunnel(), Instant::now());
        let second = Duration::from_secs(1);
        sessions.note(&process, &lost, now);
        assert!(sessions.done(now + RETURN - second).is_empty());
        lost.silent.store(true, Ordering::Relaxed);
        assert!(sessions.done(now + RETURN).is_empty(), "silent");
        drop(lost);
        let later = now + 5 * RETURN;
        assert!(sessions.done(later).is_empty(), "no tunnel");
        let next = tunnel();
        sessions.note(&process, &next, later);
        assert!(sessions.done(later + RETURN - second).is_empty());
        let done = sessions.done(later + RETURN);
        assert_eq!(done, [process]);
    }

    #[tokio::test]
    async fn a_tunnel_gives_up_the_sessions_that_the_server_continues_elsewhere() {
        let (sessions, id) = (sessions(), SessionId::new([1; 16]));
        let (server, carrier) = (server("s1", 1), tunnel());
        let _state = sessions.begin(id, &server, &carrier);
        for _ in 0..2 {
            let found = sessions.take(id, &server, &tunnel());
            assert!(matches!(found, Found::Carried));
        }
        assert_eq!(carrier.moved().await, HashSet::from([id]));
    }
}
