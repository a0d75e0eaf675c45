//! The task that moves an endpoint's packets.
//!
//! A pass receives up to a bound, fires timers, and then sends for every connection that has something
//! to send. Streams wake up meanwhile and run after the pass. The next pass sends their writes, all of
//! them together.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Instant;

use quinn_proto::{ConnectionHandle, DatagramEvent};
use quinn_udp::RecvMeta;
use tokio::time::Sleep;

use super::connection::State;
use super::endpoint::Shared;
use super::timers::Timers;
use super::validation::Verdict;
use super::{send_scheduler, udp};

/// Approximate number of bytes received per pass, before connections answer and streams run.
const RECEIVE: usize = 256 << 10;

/// Maximum number of sends of one connection per pass, before others have their turn.
const SENDS: usize = 8;

/// Driver of an endpoint, until its last handle and connection are gone.
pub(super) struct Driver {
    shared: Rc<Shared>,
    timers: Timers,
    sleep: Pin<Box<Sleep>>,
    /// End of `sleep`, if it matters.
    alarm: Option<Instant>,
    /// Buffer of the packets being sent.
    packets: Vec<u8>,
    /// Connections whose packets the socket has not taken, in order.
    blocked: Vec<ConnectionHandle>,
}

impl Driver {
    pub(super) fn new(shared: Rc<Shared>) -> Self {
        Self {
            shared,
            timers: Timers::default(),
            sleep: Box::pin(tokio::time::sleep_until(tokio::time::Instant::now())),
            alarm: None,
            packets: Vec::new(),
            blocked: Vec::new(),
        }
    }

    /// Receives packets. Returns `true` if there may be more.
    fn receive(&mut self, cx: &mut Context<'_>, now: Instant) -> bool {
        if self.shared.has_left.get() {
            return false;
        }
        let mut taken = 0;
        while taken < RECEIVE {
            match self.shared.udp.poll_recv(cx) {
                Poll::Ready(Ok((meta, mut packets))) => {
                    taken += meta.len;
                    while !packets.is_empty() {
                        let packet = packets.split_to(meta.stride.clamp(1, packets.len()));
                        self.take_in(packet, &meta, now);
                    }
                }
                // An error is that of an earlier send, such as a port that is closed: it has been
                // taken off the socket, and QUIC finds out by itself. One that stays leaves others
                // their turn.
                Poll::Ready(Err(_)) => taken += RECEIVE / 8,
                Poll::Pending => return false,
            }
        }
        true
    }

    fn take_in(&mut self, packet: bytes::BytesMut, meta: &RecvMeta, now: Instant) {
        self.packets.clear();
        let size = packet.len();
        let mut proto = self.shared.proto.borrow_mut();
        let event = proto.handle(
            now,
            meta.addr,
            meta.dst_ip,
            udp::ecn(meta),
            packet,
            &mut self.packets,
        );
        match event {
            Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                if let Some(connection) = self.shared.connection(handle) {
                    connection.heard(now);
                    let mut state = connection.state();
                    connection.take_in(&mut state, event, (meta.addr, size));
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => self.shared.arrive(incoming),
            Some(DatagramEvent::Response(transmit)) => {
                // Lost as on any network when the socket takes no more.
                let _ = self.shared.udp.try_send(&transmit, &self.packets);
            }
            None => {}
        }
    }

    fn fire(&mut self, now: Instant) {
        while let Some((entry, handle)) = self.timers.pop(now) {
            let Some(connection) = self.shared.connection(handle) else {
                continue;
            };
            let mut state = connection.state();
            if self.timers.is_due(handle, &mut state.timer, entry, now) {
                connection.time_out(&mut state, now);
            }
        }
    }

    /// Lets a connection announce events and send. Returns `true` if it has more.
    fn drive(&mut self, handle: ConnectionHandle, now: Instant) -> bool {
        let Some(connection) = self.shared.connection(handle) else {
            return false;
        };
        let mut state = connection.taken_note();
        connection.announce(&mut state);
        let more = self.send(handle, &mut state, now);
        while let Some(event) = state.proto.poll_endpoint_events() {
            let is_last = event.is_drained();
            let answer = self.shared.proto.borrow_mut().handle_event(handle, event);
            if let Some(event) = answer {
                state.proto.handle_event(event);
                connection.note(&mut state);
            }
            if is_last {
                drop(state);
                // What it still had to announce is its end.
                connection.announce(&mut connection.state());
                self.shared.remove(handle);
                return false;
            }
        }
        let at = state.proto.poll_timeout();
        self.timers.set(handle, &mut state.timer, at);
        more
    }

    fn send(&mut self, handle: ConnectionHandle, state: &mut State, now: Instant) -> bool {
        if state.unsent.is_some() {
            // In its turn, when the socket takes packets again.
            return false;
        }
        if !self.send_held_back(handle, state) {
            return false;
        }
        for _ in 0..SENDS {
            self.packets.clear();
            let is_proven = state.validation.is_proven();
            let batch = match is_proven {
                true => self
                    .shared
                    .udp
                    .batch(usize::from(state.proto.current_mtu())),
                false => 1,
            };
            let probes = |state: &State| match is_proven {
                true => 0,
                false => state.proto.stats().path.sent_plpmtud_probes,
            };
            let probes_before = probes(state);
            let (transmit, wants_more) =
                send_scheduler::watch(|| state.proto.poll_transmit(now, batch, &mut self.packets));
            let Some(transmit) = transmit else {
                if !wants_more {
                    state.next_turn();
                }
                return false;
            };
            let is_probe = probes(state) > probes_before;
            let to = transmit.destination;
            match state.validation.judge(to, transmit.size, is_probe) {
                Verdict::Send => {}
                Verdict::Wait => {
                    // Whether anything follows tells whether the address is validated.
                    state.held_back = Some((transmit, std::mem::take(&mut self.packets)));
                    continue;
                }
                // Lost as on any network.
                Verdict::Drop => continue,
            }
            if state.validation.is_proven()
                && let Some((held_back, packets)) = state.held_back.take()
            {
                // Lost as on any network when the socket takes no more.
                let _ = self.shared.udp.try_send(&held_back, &packets);
            }
            if !self.send_now(handle, state, transmit) {
                return false;
            }
        }
        true
    }

    /// Sends the contents of `packets`. Returns `false` if the socket takes no more.
    fn send_now(
        &mut self,
        handle: ConnectionHandle,
        state: &mut State,
        transmit: quinn_proto::Transmit,
    ) -> bool {
        let is_sent = self.shared.udp.try_send(&transmit, &self.packets);
        if !is_sent {
            state.unsent = Some((transmit, std::mem::take(&mut self.packets)));
            self.blocked.push(handle);
        }
        is_sent
    }

    /// Sends packets that waited for the validation of their address. Returns `false` if no others may
    /// follow.
    fn send_held_back(&mut self, handle: ConnectionHandle, state: &mut State) -> bool {
        let Some((transmit, packets)) = state.held_back.take() else {
            return true;
        };
        let to = transmit.destination;
        match state.validation.judge_again(to, transmit.size) {
            Verdict::Send => {
                self.packets = packets;
                self.send_now(handle, state, transmit)
            }
            Verdict::Wait => {
                state.held_back = Some((transmit, packets));
                state.validation.is_used_up()
            }
            Verdict::Drop => true,
        }
    }

    /// Sends the packets that the socket did not take before.
    fn send_blocked(&mut self, cx: &mut Context<'_>) {
        while !self.blocked.is_empty() && self.shared.udp.poll_send_ready(cx).is_ready() {
            let blocked = std::mem::take(&mut self.blocked);
            let mut blocked = blocked.into_iter();
            for handle in blocked.by_ref() {
                let Some(connection) = self.shared.connection(handle) else {
                    continue;
                };
                let mut state = connection.state();
                if let Some((transmit, packets)) = state.unsent.take() {
                    if !self.shared.udp.try_send(&transmit, &packets) {
                        state.unsent = Some((transmit, packets));
                        self.blocked.push(handle);
                        break;
                    }
                    connection.note(&mut state);
                }
            }
            self.blocked.extend(blocked);
        }
    }

    /// Registers the task for the next timer.
    fn poll_alarm(&mut self, cx: &mut Context<'_>) -> bool {
        let next = self.timers.next();
        if let Some(at) = next
            && self.alarm != next
        {
            self.sleep.as_mut().reset(at.into());
            self.alarm = next;
        }
        next.is_some() && self.sleep.as_mut().poll(cx).is_ready()
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let now = Instant::now();
        let mut more = this.receive(cx, now);
        this.fire(now);
        this.send_blocked(cx);
        let noted = this.shared.noted.borrow().len();
        for _ in 0..noted {
            let Some(handle) = this.shared.noted.borrow_mut().pop_front() else {
                break;
            };
            if this.drive(handle, now)
                && let Some(connection) = this.shared.connection(handle)
            {
                connection.note(&mut connection.state());
            }
        }
        if this.shared.is_over() {
            return Poll::Ready(());
        }
        more |= !this.shared.noted.borrow().is_empty();
        more |= !this.blocked.is_empty() && this.shared.udp.poll_send_ready(cx).is_ready();
        more |= this.poll_alarm(cx);
        if more {
            cx.waker().wake_by_ref();
        } else {
            this.shared.set_driver(cx.waker());
        }
        Poll::Pending
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.shared.abandon();
    }
}
