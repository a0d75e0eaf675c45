//! One connection: its state, its waiting tasks, and the handle that its users hold.

use std::cell::{RefCell, RefMut};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn_proto::{
    ApplicationClose, ConnectionError, ConnectionHandle, Dir, Event, StreamEvent, StreamId, VarInt,
};
use rustc_hash::FxBuildHasher;
use rustls::pki_types::CertificateDer;
use tokio::sync::Notify;
use tunnel_proto::close::CloseReason;

use super::config::SEND_WINDOW;
use super::endpoint::Shared;
use super::ledger::{Excess, Ledger};
use super::send_scheduler::SendScheduler;
use super::stream::{Recv, Send};
use super::timers::Timer;
use super::validation::Validation;
use super::waiting::{Interest, Waiting};
use super::{error_code, link_reason, path, reason_of};
use crate::tunnel::TunnelError;
use cpc_datapath::Budget;

/// UDP payload of a full packet on Ethernet, in bytes.
const USUAL_PACKET: u16 = 1472;

/// Maximum number of unacknowledged bytes on one tunnel over a long path.
const MAX_SEND_WINDOW: u64 = 64 << 20;

/// A connection. Dropping the last handle closes it, with all its streams.
#[derive(Clone)]
pub struct Connection(Rc<Handle>);

struct Handle(Rc<Inner>);

/// A connection as its endpoint and its streams know it.
pub(super) struct Inner {
    pub(super) handle: ConnectionHandle,
    /// Endpoint, gone when its driver is.
    endpoint: Weak<Shared>,
    state: RefCell<State>,
    view: Arc<PathView>,
    /// Notification of changes of the handshake, the connection or the peer's credit for streams.
    changed: Notify,
}

pub(super) struct State {
    pub(super) proto: quinn_proto::Connection,
    pub(super) timer: Timer,
    /// Packets that the socket has not taken yet, with their contents.
    pub(super) unsent: Option<(quinn_proto::Transmit, Vec<u8>)>,
    /// Validation of the peer's address.
    pub(super) validation: Validation,
    /// Packets that may not go to the peer's address yet, with their contents.
    pub(super) held_back: Option<(quinn_proto::Transmit, Vec<u8>)>,
    /// Error that ended the connection.
    error: Option<ConnectionError>,
    /// Reason for which it was closed here.
    closed_for: Option<CloseReason>,
    is_connected: bool,
    /// Whether the driver knows that there may be something to send.
    is_noted: bool,
    pub(super) send_scheduler: SendScheduler,
    /// Streams that wait for the next turn.
    late: Vec<StreamId>,
    /// Tasks that wait for a stream.
    waiting: HashMap<StreamId, Waiting, FxBuildHasher>,
    /// Memory held for the peer's data.
    pub(super) ledger: Ledger,
    /// Streams that we ended while their halves are in use, and the reason.
    ended: HashMap<StreamId, CloseReason, FxBuildHasher>,
    /// The stream that the connection can't do without.
    pub(super) vital: Option<StreamId>,
    /// Size of the packet that opened the peer's last stream.
    opened_by: usize,
    /// Number of sending halves in use.
    pub(super) senders: usize,
    /// Number of resets of streams that the ledger has seen.
    resets: u64,
}

/// The path as other threads see it. It follows the connection.
#[derive(Debug)]
pub struct PathView {
    rtt_micros: AtomicU64,
    payload: AtomicU16,
    /// Arrival of the last packet, in microseconds since [`START`].
    heard_micros: AtomicU64,
    remote: Mutex<SocketAddr>,
}

/// Origin of `heard_micros`.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

impl PathView {
    /// Returns the smoothed round-trip time.
    pub fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_micros.load(Ordering::Relaxed))
    }

    /// Returns the size of the largest IP packet sent to the peer, in bytes.
    pub fn mtu(&self) -> u16 {
        let payload = self.payload.load(Ordering::Relaxed);
        payload.saturating_add(path::overhead(self.remote().ip()))
    }

    /// Returns the time since the last packet from the peer.
    pub fn since_packet(&self) -> Duration {
        let heard = Duration::from_micros(self.heard_micros.load(Ordering::Relaxed));
        START.elapsed().saturating_sub(heard)
    }

    fn heard(&self, now: Instant) {
        let micros = now.saturating_duration_since(*START).as_micros();
        let micros = u64::try_from(micros).unwrap_or(u64::MAX);
        self.heard_micros.store(micros, Ordering::Relaxed);
    }

    /// Returns the peer's current address.
    pub fn remote(&self) -> SocketAddr {
        *self.remote.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_remote(&self, remote: SocketAddr) {
        *self.remote.lock().unwrap_or_else(PoisonError::into_inner) = remote;
    }
}

impl State {
    /// Checks that the connection is usable.
    pub(super) fn check(&self) -> Result<(), ConnectionError> {
        match &self.error {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Returns the end of the tunnel, once it has ended.
    pub(super) fn tunnel_error(&self) -> Option<TunnelError> {
        self.error.clone().map(|error| self.ended_by(error))
    }

    fn ended_by(&self, error: ConnectionError) -> TunnelError {
        TunnelError::of(self.reason_of(&error), error)
    }

    /// Returns the reason with which streams end that `error` ends: of a connection that was closed here, the
    /// given one.
    pub(super) fn reason_of(&self, error: &ConnectionError) -> CloseReason {
        match (error, self.closed_for) {
            (ConnectionError::LocallyClosed, Some(reason)) => reason,
            _ => link_reason(error),
        }
    }

    /// Registers `waker` for `interest` in a stream.
    pub(super) fn wait(&mut self, id: StreamId, interest: Interest, waker: &Waker) {
        match self.waiting.entry(id) {
            Entry::Occupied(mut waiting) => waiting.get_mut().add(interest, waker),
            Entry::Vacant(place) => drop(place.insert(Waiting::new(interest, waker))),
        }
    }

    /// Whether `waker` is still registered: nothing has happened since.
    pub(super) fn still_waits(&self, id: StreamId, interest: Interest, waker: &Waker) -> bool {
        let waiting = self.waiting.get(&id);
        waiting.is_some_and(|waiting| waiting.is_for(interest, waker))
    }

    /// Removes the registration.
    pub(super) fn forget(&mut self, id: StreamId, interest: Interest) {
        if let Entry::Occupied(mut waiting) = self.waiting.entry(id)
            && waiting.get_mut().remove(interest)
        {
            waiting.remove();
        }
    }

    fn wake(&mut self, id: StreamId, interest: Interest) {
        if let Some(waiting) = self.waiting.get_mut(&id) {
            waiting.wake(interest);
        }
    }

    /// Registers `waker` for the next turn.
    pub(super) fn wait_for_turn(&mut self, id: StreamId, waker: &Waker) {
        self.late.push(id);
        self.wait(id, Interest::Write, waker);
    }

    /// Starts the next turn after everything has been sent: streams that had their turn may write
    /// again.
    pub(super) fn next_turn(&mut self) {
        let window = self.proto.congestion_state().window();
        self.send_scheduler.next(window, self.proto.rtt());
        // What is in flight, and as much again for the next round trip.
        let unacknowledged = (2 * window).clamp(SEND_WINDOW, MAX_SEND_WINDOW);
        self.proto.set_send_window(unacknowledged);
        while let Some(id) = self.late.pop() {
            self.wake(id, Interest::Write);
        }
    }

    fn end(&mut self, error: ConnectionError) {
        self.error.get_or_insert(error);
        self.waiting.drain().for_each(|(_, waiting)| waiting.end());
    }

    /// Returns the reason with which we ended a stream whose halves are in use.
    pub(super) fn ended(&self, id: StreamId) -> Option<CloseReason> {
        self.ended.get(&id).copied()
    }

    /// Opens a stream, where the peer permits another one.
    fn open(&mut self) -> Option<StreamId> {
        let id = self.proto.streams().open(Dir::Bi)?;
        self.ledger.opened(id);
        Some(id)
    }

    /// Forgets a stream whose receiving half has gone.
    pub(super) fn forget_stream(&mut self, id: StreamId) {
        self.forget(id, Interest::Read);
        self.ledger.forget(id);
        self.ended.remove(&id);
    }

    /// Ends a stream in both directions, whatever its users do.
    pub(super) fn end_stream(&mut self, id: StreamId, reason: CloseReason) {
        let code = error_code(reason);
        // Either fails only when that half has ended.
        if self.proto.recv_stream(id).stop(code).is_ok() {
            self.ledger.stopped(id);
        }
        let _ = self.proto.send_stream(id).reset(code);
        self.ledger.forget(id);
        self.ended.insert(id, reason);
        for interest in [Interest::Read, Interest::Write, Interest::Ended] {
            self.wake(id, interest);
        }
    }

    /// Returns the number of streams without writer whose end the peer has not acknowledged.
    fn unacknowledged(&mut self) -> usize {
        let senders = self.proto.streams().send_streams();
        senders.saturating_sub(self.senders)
    }

    /// Counts the stopped streams that the peer has ended. Streams that it has reset by itself count
    /// for some of them: their reader ends them without a stop.
    fn count_ended(&mut self) {
        let resets = self.proto.stats().frame_rx.reset_stream;
        let new = resets - std::mem::replace(&mut self.resets, resets);
        self.ledger.ended(new);
    }
}

impl Inner {
    pub(super) fn new(
        handle: ConnectionHandle,
        proto: quinn_proto::Connection,
        endpoint: Weak<Shared>,
        ledger: Ledger,
    ) -> Rc<Self> {
        let view = PathView {
            rtt_micros: AtomicU64::new(0),
            payload: AtomicU16::new(proto.current_mtu()),
            heard_micros: AtomicU64::new(0),
            remote: Mutex::new(proto.remote_address()),
        };
        view.heard(Instant::now());
        let state = State {
            proto,
            timer: Timer::default(),
            unsent: None,
            validation: Validation::new(view.remote()),
            held_back: None,
            error: None,
            closed_for: None,
            is_connected: false,
            is_noted: false,
            send_scheduler: SendScheduler::default(),
            late: Vec::new(),
            waiting: HashMap::default(),
            ledger,
            ended: HashMap::default(),
            vital: None,
            opened_by: 0,
            senders: 0,
            resets: 0,
        };
        Rc::new(Self {
            handle,
            endpoint,
            state: state.into(),
            view: view.into(),
            changed: Notify::new(),
        })
    }

    /// Borrows the state. Must not be held while something else runs.
    pub(super) fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// Notes that a packet has arrived.
    pub(super) fn heard(&self, now: Instant) {
        self.view.heard(now);
    }

    /// Notes that there may be something to send, for the driver's next pass.
    pub(super) fn note(&self, state: &mut State) {
        if !std::mem::replace(&mut state.is_noted, true)
            && let Some(endpoint) = self.endpoint.upgrade()
        {
            endpoint.note(self.handle);
        }
    }

    /// Borrows the state for the driver, and clears the note.
    pub(super) fn taken_note(&self) -> RefMut<'_, State> {
        let mut state = self.state();
        state.is_noted = false;
        state
    }

    /// Handles a packet of `size` bytes from `from`.
    pub(super) fn take_in(
        &self,
        state: &mut State,
        event: quinn_proto::ConnectionEvent,
        (from, size): (SocketAddr, usize),
    ) {
        state.proto.handle_event(event);
        let current = state.proto.remote_address();
        let was_proven = state.validation.is_proven();
        state.validation.arrived(from, size, current);
        if was_proven && !state.validation.is_proven() && state.proto.current_mtu() > USUAL_PACKET {
            // A challenge is as large as the path's packets where there is something to send: of that size
            // it would wait for long.
            state.proto.path_changed(Instant::now());
        }
        self.arrived(state, size);
        self.note(state);
    }

    /// Handles a timer.
    pub(super) fn time_out(&self, state: &mut State, now: Instant) {
        state.proto.handle_timeout(now);
        state.validation.restored(state.proto.remote_address());
        self.note(state);
    }

    /// Wakes the tasks that a packet of `size` bytes concerns, and keeps held memory within its bounds.
    fn arrived(&self, state: &mut State, size: usize) {
        self.pass_on(state, size);
        if state.error.is_some() {
            return;
        }
        if state.ledger.has_unended() {
            state.count_ended();
        }
        let unacknowledged = state.unacknowledged();
        state.ledger.unacknowledged(unacknowledged as u64);
        while let Some(excess) = state.ledger.settle() {
            match excess {
                Excess::Stream(id) if state.vital != Some(id) => {
                    state.end_stream(id, CloseReason::MemoryLimit);
                }
                _ => {
                    self.end_for(state, CloseReason::MemoryLimit);
                    break;
                }
            }
        }
    }

    /// Ends the connection and everything on it for `reason`, which is then the reason here as well.
    fn end_for(&self, state: &mut State, reason: CloseReason) {
        let (code, text) = (error_code(reason), reason.label());
        state
            .proto
            .close(Instant::now(), code, Bytes::from_static(text.as_bytes()));
        state.end(ConnectionError::ApplicationClosed(ApplicationClose {
            error_code: code,
            reason: Bytes::from_static(text.as_bytes()),
        }));
        self.changed.notify_waiters();
        self.note(state);
    }

    fn pass_on(&self, state: &mut State, size: usize) {
        while let Some(event) = state.proto.poll() {
            match event {
                Event::Connected => {
                    state.is_connected = true;
                    self.changed.notify_waiters();
                }
                Event::ConnectionLost { reason } => {
                    state.end(reason);
                    self.changed.notify_waiters();
                }
                Event::Stream(StreamEvent::Readable { id }) => {
                    state.ledger.arrived(id, size);
                    state.wake(id, Interest::Read);
                }
                Event::Stream(StreamEvent::Writable { id }) => state.wake(id, Interest::Write),
                Event::Stream(StreamEvent::Finished { id }) => state.wake(id, Interest::Ended),
                Event::Stream(StreamEvent::Stopped { id, .. }) => {
                    state.wake(id, Interest::Ended);
                    state.wake(id, Interest::Write);
                }
                Event::Stream(StreamEvent::Opened { .. }) => {
                    state.opened_by = size;
                    self.changed.notify_waiters();
                }
                Event::Stream(StreamEvent::Available { .. }) => self.changed.notify_waiters(),
                // No task waits before the handshake is done, and there are no datagrams.
                Event::HandshakeDataReady | Event::DatagramReceived | Event::DatagramsUnblocked => {
                }
            }
        }
    }

    /// Wakes tasks after a change of the connection.
    pub(super) fn announce(&self, state: &mut State) {
        // What packets bring was passed on with them.
        self.pass_on(state, 0);
        let rtt = u64::try_from(state.proto.rtt().as_micros()).unwrap_or(u64::MAX);
        self.view.rtt_micros.store(rtt, Ordering::Relaxed);
        let payload = state.proto.current_mtu();
        self.view.payload.store(payload, Ordering::Relaxed);
        let remote = state.proto.remote_address();
        if remote != self.view.remote() {
            self.view.set_remote(remote);
        }
    }

    /// Closes the connection and everything on it; no effect on a closed one.
    pub(super) fn close(&self, code: VarInt, reason: Bytes) {
        let mut state = self.state();
        if state.error.is_some() {
            return;
        }
        state.proto.close(Instant::now(), code, reason);
        state.closed_for = Some(reason_of(code));
        state.end(ConnectionError::LocallyClosed);
        self.changed.notify_waiters();
        self.note(&mut state);
    }

    /// Handles the end of the endpoint.
    pub(super) fn abandon(&self) {
        self.state().end(ConnectionError::LocallyClosed);
        self.changed.notify_waiters();
    }

    /// Waits until `ready` gives a value, polling it after each change.
    async fn when<T>(
        &self,
        mut ready: impl FnMut(&mut State) -> Poll<T>,
    ) -> Result<T, ConnectionError> {
        loop {
            // Nothing else runs between the look and the wait.
            let changed = self.changed.notified();
            {
                let mut state = self.state();
                if let Poll::Ready(done) = ready(&mut state) {
                    self.note(&mut state);
                    return Ok(done);
                }
                state.check()?;
            }
            changed.await;
        }
    }
}

impl Connection {
    /// Waits until the handshake of a connection is done.
    ///
    /// # Errors
    /// The error of the handshake.
    pub(super) async fn established(inner: Rc<Inner>) -> Result<Self, ConnectionError> {
        // From here on giving up closes it.
        let connection = Self(Rc::new(Handle(inner)));
        let connected = |state: &mut State| match state.is_connected {
            true => Poll::Ready(()),
            false => Poll::Pending,
        };
        connection.inner().when(connected).await?;
        Ok(connection)
    }

    fn inner(&self) -> &Rc<Inner> {
        &self.0.0
    }

    /// Opens a bidirectional stream. Waits for the peer's permission.
    ///
    /// # Errors
    /// The error that ended the connection.
    pub async fn open_bi(&self) -> Result<(Send, Recv), ConnectionError> {
        let open = |state: &mut State| match state.check().is_ok() {
            true => state.open().into_poll(),
            false => Poll::Pending,
        };
        let id = self.inner().when(open).await?;
        Ok(self.halves(id))
    }

    /// Waits for a bidirectional stream of the peer.
    ///
    /// # Errors
    /// The error that ended the connection.
    pub async fn accept_bi(&self) -> Result<(Send, Recv), ConnectionError> {
        let accept = |state: &mut State| {
            let id = state.proto.streams().accept(Dir::Bi)?;
            // Its first frame is told of by its being opened.
            state.ledger.arrived(id, state.opened_by);
            Some(id)
        };
        let accept = |state: &mut State| accept(state).into_poll();
        let id = self.inner().when(accept).await?;
        Ok(self.halves(id))
    }

    fn halves(&self, id: StreamId) -> (Send, Recv) {
        let inner = self.inner();
        (Send::new(inner.clone(), id), Recv::new(inner.clone(), id))
    }

    /// Returns the end of the tunnel by `error`.
    pub(super) fn ended_by(&self, error: ConnectionError) -> TunnelError {
        self.inner().state().ended_by(error)
    }

    /// Charges the memory held for the peer to a part of the process's budget.
    pub fn charge_to(&self, budget: &Budget) {
        let inner = self.inner();
        let mut state = inner.state();
        if !state.ledger.charge_to(budget) {
            inner.end_for(&mut state, CloseReason::MemoryLimit);
        }
    }

    /// Returns the number of bytes held for the peer.
    #[cfg(test)]
    pub(super) fn held(&self) -> u64 {
        self.inner().state().ledger.held()
    }

    /// Returns the number of resets of streams that have arrived.
    #[cfg(test)]
    pub(super) fn resets(&self) -> u64 {
        self.inner().state().proto.stats().frame_rx.reset_stream
    }

    /// Whether there is a stream without writer of which the peer may lack a part: answer, end or reset
    /// may be lost with the connection.
    pub fn has_unacknowledged(&self) -> bool {
        self.inner().state().unacknowledged() > 0
    }

    /// Closes the connection and everything on it.
    pub fn close(&self, code: VarInt, reason: &[u8]) {
        self.inner().close(code, Bytes::copy_from_slice(reason));
    }

    /// Returns the peer's address.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner().view.remote()
    }

    /// Returns the path, for other threads.
    pub fn path(&self) -> Arc<PathView> {
        self.inner().view.clone()
    }

    /// Returns the peer's certificate, which its verifier has accepted.
    pub fn peer_certificate(&self) -> Option<CertificateDer<'static>> {
        let state = self.inner().state();
        // As rustls hands it on.
        let chain = state.proto.crypto_session().peer_identity()?;
        let chain = chain.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        chain.into_iter().next()
    }
}

trait IntoPoll<T> {
    fn into_poll(self) -> Poll<T>;
}

impl<T> IntoPoll<T> for Option<T> {
    fn into_poll(self) -> Poll<T> {
        self.map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close(VarInt::from_u32(0), Bytes::new());
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.inner(), f)
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("remote", &self.view.remote())
            .finish_non_exhaustive()
    }
}
