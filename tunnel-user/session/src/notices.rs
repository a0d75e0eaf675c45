//! The sessions of one tunnel, and the stream on which their ends exchange notices.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tunnel_proto::close::CloseReason;
use tunnel_proto::resumption::{Notice, NoticeError, SessionId, SessionKey};
use tunnel_proto::session::BUSY_WINDOW;
use tunnel_proto::varint::VarInt;

use super::carried::Carried;
use super::state::{Detached, SessionState};
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};

/// Age at which the server offers to hold a session.
const PLAIN: Duration = Duration::from_secs(1);

/// Time for which notices wait for others.
const DELAY: Duration = Duration::from_millis(10);

/// Maximum number of answers to notices about unknown sessions that wait to be sent.
const MAX_UNKNOWN: usize = 1024;

/// Time for the other end to settle a session whose relay has ended.
const SETTLE: Duration = Duration::from_secs(10);

/// Interval at which a tunnel with held sessions is said to be in use: a part of the time for which it then
/// counts as such.
const IN_USE: Duration = Duration::from_secs(BUSY_WINDOW.as_secs() / 3);

/// Reason why the notices of a tunnel end.
#[derive(Debug, thiserror::Error)]
pub enum NoticesEnd {
    /// The peer sent something else.
    #[error(transparent)]
    Malformed(#[from] NoticeError),
    /// The peer ended the stream and kept the tunnel, which violates the protocol.
    #[error("the peer closed the stream of notices")]
    Closed,
    /// The tunnel is gone.
    #[error("the tunnel is gone: {0}")]
    Tunnel(CloseReason),
}

/// The sessions of one tunnel.
pub struct Notices {
    sessions: RefCell<HashMap<VarInt, Rc<Carried>>>,
    last_number: Cell<u64>,
    /// Sessions that were not offered to be held yet, in order of age.
    young: RefCell<VecDeque<(Instant, VarInt)>>,
    /// Sessions whose relay has ended, in order of that end.
    orphans: RefCell<VecDeque<(Instant, VarInt)>>,
    /// Sessions of which there is something to tell; each is there once.
    queue: RefCell<Vec<VarInt>>,
    unknown: RefCell<Vec<VarInt>>,
    /// Time at which what is queued must be sent.
    due: Cell<Option<Instant>>,
    changed: Notify,
    /// Number of sessions that both ends hold.
    held: Cell<usize>,
    /// Reason for which the tunnel was lost, once it was.
    lost: Cell<Option<CloseReason>>,
    /// Whether sessions are offered to be held at once.
    is_eager: Cell<bool>,
    /// Time at which the tunnel was last said to be in use.
    used: Cell<Option<Instant>>,
    /// Round-trip time of the tunnel.
    rtt: Box<dyn Fn() -> Duration>,
}

impl fmt::Debug for Notices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notices")
            .field("sessions", &self.sessions.borrow().len())
            .field("held", &self.held.get())
            .field("lost", &self.lost.get())
            .finish_non_exhaustive()
    }
}

impl Notices {
    /// Creates the sessions of a fresh tunnel, whose round-trip time `rtt` returns.
    pub fn new(rtt: impl Fn() -> Duration + 'static) -> Rc<Self> {
        Rc::new(Self {
            sessions: RefCell::default(),
            last_number: Cell::new(0),
            young: RefCell::default(),
            orphans: RefCell::default(),
            queue: RefCell::default(),
            unknown: RefCell::default(),
            due: Cell::new(None),
            changed: Notify::new(),
            held: Cell::new(0),
            lost: Cell::new(None),
            is_eager: Cell::new(false),
            used: Cell::new(None),
            rtt: Box::new(rtt),
        })
    }

    /// Returns the round-trip time of the tunnel.
    pub(super) fn rtt(&self) -> Duration {
        (self.rtt)()
    }

    /// Adds a session that the server begins, and returns it with its key.
    pub fn begin(self: &Rc<Self>, state: SessionState) -> (SessionKey, Rc<Carried>) {
        let carried = self.number(Box::new(state));
        let number = carried.number();
        let plain = if self.is_eager.get() {
            Duration::ZERO
        } else {
            PLAIN
        };
        let offered = Instant::now() + plain;
        let is_first = {
            let mut young = self.young.borrow_mut();
            young.push_back((offered, number));
            young.len() == 1
        };
        if is_first {
            self.changed.notify_one();
        }
        // It was added a moment ago.
        let id = carried.change(|state| state.session.id());
        let id = id.unwrap_or_else(|| unreachable!("a fresh session is attached"));
        (SessionKey { id, number }, carried)
    }

    /// Gives a session of the server a number on this tunnel.
    pub fn number(self: &Rc<Self>, state: Box<SessionState>) -> Rc<Carried> {
        let number = self.last_number.get() + 1;
        self.last_number.set(number);
        // No tunnel carries 2^62 sessions.
        let number = VarInt::try_from(number).unwrap_or(VarInt::MAX);
        self.insert(number, state)
    }

    /// Adds a session under the number that the server has given it. Returns `None` if another one has it.
    pub fn add(self: &Rc<Self>, number: VarInt, state: Box<SessionState>) -> Option<Rc<Carried>> {
        if self.sessions.borrow().contains_key(&number) {
            return None;
        }
        Some(self.insert(number, state))
    }

    fn insert(self: &Rc<Self>, number: VarInt, state: Box<SessionState>) -> Rc<Carried> {
        let carried = Carried::new(number, self, state);
        self.sessions.borrow_mut().insert(number, carried.clone());
        carried
    }

    pub(super) fn remove(&self, number: VarInt) {
        // Dropped outside of the borrow.
        let removed = self.sessions.borrow_mut().remove(&number);
        drop(removed);
    }

    pub(super) fn orphaned(&self, number: VarInt) {
        self.orphans
            .borrow_mut()
            .push_back((Instant::now() + SETTLE, number));
    }

    pub(super) fn queue(&self, number: VarInt, is_urgent: bool) {
        let mut queue = self.queue.borrow_mut();
        queue.push(number);
        let sessions = self.sessions.borrow();
        if queue.len() > 2 * sessions.len() + MAX_UNKNOWN {
            // A peer that takes no notices must not make this grow.
            queue.retain(|number| sessions.contains_key(number));
        }
        drop((queue, sessions));
        if is_urgent {
            self.hurry();
        } else if self.due.get().is_none() {
            self.due.set(Some(Instant::now() + DELAY));
            self.changed.notify_one();
        }
    }

    /// Sends what is queued at once.
    pub(super) fn hurry(&self) {
        let now = Instant::now();
        if self.due.get().is_none_or(|due| due > now) {
            self.due.set(Some(now));
            self.changed.notify_one();
        }
    }

    /// Offers to hold the young sessions too, and all later ones at once. Returns the number of relayed sessions that would end with the
    /// tunnel.
    pub fn hold_all(&self) -> usize {
        let now = Instant::now();
        self.is_eager.set(true);
        self.young
            .borrow_mut()
            .iter_mut()
            .for_each(|(at, _)| *at = now);
        self.offer();
        self.hurry();
        self.unsafe_ones()
    }

    /// Returns the number of relayed sessions that would end with the tunnel.
    pub fn unsafe_ones(&self) -> usize {
        let sessions = self.sessions.borrow();
        let is_unsafe = |session: &&Rc<Carried>| {
            !(session.is_orphan() || session.is_safe() && session.is_peer_safe())
        };
        sessions.values().filter(is_unsafe).count()
    }

    /// Moves every session that can go to another tunnel: its relay ends as if the tunnel were lost. Returns
    /// those that have no relay any more.
    pub fn evict_all(&self) -> Vec<SessionState> {
        self.evict(|session| match session.is_orphan() {
            true => session.is_held(),
            false => session.is_movable(),
        })
    }

    /// Does the same with the sessions of these names.
    pub fn evict_some(&self, ids: &HashSet<SessionId>) -> Vec<SessionState> {
        self.evict(|session| {
            let id = session.change(|state| state.session.id());
            id.is_some_and(|id| ids.contains(&id))
        })
    }

    fn evict(&self, is_meant: impl Fn(&Carried) -> bool) -> Vec<SessionState> {
        let sessions: Vec<_> = self.sessions.borrow().values().cloned().collect();
        let meant = sessions.iter().filter(|session| is_meant(session));
        let (orphans, relayed): (Vec<_>, Vec<_>) = meant.partition(|session| session.is_orphan());
        relayed.into_iter().for_each(|session| session.evict());
        detach(orphans.into_iter(), CloseReason::Replaced)
    }

    /// Returns the reason for which the tunnel was lost, once it was.
    pub fn lost(&self) -> Option<CloseReason> {
        self.lost.get()
    }

    /// Takes the sessions that have no relay any more, when the tunnel was lost.
    pub fn detach_orphans(&self, reason: CloseReason) -> Vec<SessionState> {
        let sessions: Vec<_> = self.sessions.borrow().values().cloned().collect();
        let orphans = sessions.iter().filter(|session| session.is_orphan());
        detach(orphans, reason)
    }

    /// Exchanges notices over a stream until the tunnel ends. Calls `in_use` from time to time while there are
    /// sessions that both ends hold: for them, the loss of the tunnel has to be noticed soon.
    pub async fn run(
        &self,
        halves: (impl SendHalf, impl RecvHalf),
        in_use: impl Fn(),
    ) -> NoticesEnd {
        let end = self.exchange(halves, in_use).await;
        let reason = match end {
            NoticesEnd::Tunnel(reason) => reason,
            NoticesEnd::Malformed(_) | NoticesEnd::Closed => CloseReason::ProtocolError,
        };
        self.lose(reason);
        end
    }

    /// Tells the sessions that the tunnel was lost. The first reason counts.
    pub fn lose(&self, reason: CloseReason) {
        let reason = self.lost.get().unwrap_or(reason);
        self.lost.set(Some(reason));
        let sessions: Vec<_> = self.sessions.borrow().values().cloned().collect();
        sessions.iter().for_each(|session| session.lose(reason));
    }

    async fn exchange(
        &self,
        (mut send, mut recv): (impl SendHalf, impl RecvHalf),
        in_use: impl Fn(),
    ) -> NoticesEnd {
        let mut outgoing = Bytes::new();
        let mut rest = BytesMut::new();
        let mut chunks = Vec::new();
        loop {
            self.offer();
            self.expire();
            if self.is_use_due() {
                self.used.set(Some(Instant::now()));
                in_use();
            }
            if outgoing.is_empty() {
                outgoing = self.take_due();
            }
            let wake = self.next_time(!outgoing.is_empty());
            tokio::select! {
                sent = send.send(&mut outgoing), if !outgoing.is_empty() => match sent {
                    Ok(()) => {}
                    Err(SendEnd::Link(reason)) => return NoticesEnd::Tunnel(reason),
                    Err(SendEnd::Acknowledged | SendEnd::Stopped(_)) => return NoticesEnd::Closed,
                },
                received = recv.recv(&mut chunks) => match received {
                    Ok(()) => {
                        chunks.drain(..).for_each(|chunk| rest.extend_from_slice(&chunk));
                        if let Err(error) = self.take_in(&mut rest) {
                            return error.into();
                        }
                        // One that says much gives way to its neighbours on the shard.
                        tokio::task::coop::consume_budget().await;
                    }
                    Err(RecvEnd::Link(reason)) => return NoticesEnd::Tunnel(reason),
                    Err(RecvEnd::Finished | RecvEnd::Reset(_)) => return NoticesEnd::Closed,
                },
                () = self.changed.notified() => {}
                () = sleep_until_some(wake) => {}
            }
        }
    }

    /// Reads whole notices from `bytes`; what is left is shorter than one.
    fn take_in(&self, bytes: &mut BytesMut) -> Result<(), NoticeError> {
        while let Some((notice, size)) = Notice::decode(bytes)? {
            let _ = bytes.split_to(size);
            let (number, confirmation) = match &notice {
                Notice::Confirm(number, confirmation) => (*number, Some(confirmation)),
                Notice::Unknown(number) => (*number, None),
            };
            let session = self.sessions.borrow().get(&number).cloned();
            match session {
                Some(session) => session.heard(confirmation),
                // An answer to an answer would never end.
                None if confirmation.is_some() => self.answer_unknown(number),
                None => {}
            }
        }
        Ok(())
    }

    fn answer_unknown(&self, number: VarInt) {
        let mut unknown = self.unknown.borrow_mut();
        if unknown.len() < MAX_UNKNOWN {
            unknown.push(number);
        }
        drop(unknown);
        self.hurry();
    }

    /// Offers to hold the sessions that are old enough.
    fn offer(&self) {
        while let Some(number) = take_passed(&self.young) {
            let session = self.sessions.borrow().get(&number).cloned();
            if let Some(session) = session
                && session.change(SessionState::offer).is_some()
            {
                session.queue(false);
            }
        }
    }

    /// Ends orphans that the other end has not settled in time.
    fn expire(&self) {
        while let Some(number) = take_passed(&self.orphans) {
            let session = self.sessions.borrow().get(&number).cloned();
            if let Some(session) = session {
                session.expire();
            }
        }
    }

    /// Returns the notices that are to be sent now.
    fn take_due(&self) -> Bytes {
        if self.due.get().is_none_or(|due| due > Instant::now()) {
            return Bytes::new();
        }
        self.due.set(None);
        let mut bytes = BytesMut::new();
        for number in self.queue.take() {
            let session = self.sessions.borrow().get(&number).cloned();
            let Some(session) = session else {
                continue;
            };
            if let Some(confirmation) = session.take_notice() {
                Notice::Confirm(number, confirmation).encode(&mut bytes);
            }
            session.remove_if_over();
        }
        for number in self.unknown.take() {
            Notice::Unknown(number).encode(&mut bytes);
        }
        bytes.freeze()
    }

    /// Counts a session that both ends hold.
    pub(super) fn count_held(&self) {
        self.held.set(self.held.get() + 1);
        self.changed.notify_one();
    }

    /// Counts the end of such a session.
    pub(super) fn discount_held(&self) {
        self.held.set(self.held.get().saturating_sub(1));
    }

    fn next_use(&self) -> Option<Instant> {
        let used = self.used.get();
        (self.held.get() > 0).then(|| used.map_or_else(Instant::now, |used| used + IN_USE))
    }

    fn is_use_due(&self) -> bool {
        self.next_use().is_some_and(|at| at <= Instant::now())
    }

    /// Returns the time of the next thing to do.
    fn next_time(&self, is_sending: bool) -> Option<Instant> {
        let front = |queue: &RefCell<VecDeque<(Instant, VarInt)>>| {
            queue.borrow().front().map(|(at, _)| *at)
        };
        let due = self.due.get().filter(|_| !is_sending);
        let times = [
            front(&self.young),
            front(&self.orphans),
            due,
            self.next_use(),
        ];
        times.into_iter().flatten().min()
    }
}

/// Takes sessions from their tunnel. Returns those of which the other end has something to learn.
fn detach<'a>(
    sessions: impl Iterator<Item = &'a Rc<Carried>>,
    reason: CloseReason,
) -> Vec<SessionState> {
    let now = Instant::now().into_std();
    let detached = sessions.map(|session| session.detach(reason, now));
    let states = detached.filter_map(|detached| match detached {
        Detached::Safe(state) | Detached::Ended(state) => Some(*state),
        Detached::Finished | Detached::Plain => None,
    });
    states.collect()
}

/// Takes the first number of a queue whose time has passed.
fn take_passed(queue: &RefCell<VecDeque<(Instant, VarInt)>>) -> Option<VarInt> {
    let mut queue = queue.borrow_mut();
    let first = queue.pop_front_if(|(at, _)| *at <= Instant::now());
    first.map(|(_, number)| number)
}

async fn sleep_until_some(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests;
