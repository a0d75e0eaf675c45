//! The send queue of a stream that many connections share.
//!
//! A FIFO: the packets of a connection leave in the order in which they were queued. Data waits for
//! room, the longest waiting first. Control packets never wait, and a peer that makes us queue more of
//! them than it reads loses the stream.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, Semaphore};
use tunnel_proto::konnectivity::{MAX_DATA, Packet, data_head};

use super::{PacketSender, Status, StreamEnd};
use crate::metrics::{PacketKind, Tally};

/// Maximum queued payload, in bytes.
const MAX_QUEUED: usize = 128 << 10;

/// Maximum size of queued control packets, in bytes: about two for each of 8192 connections.
const MAX_CONTROL: usize = 512 << 10;

/// Size below which a payload is copied behind its head: a frame of its own costs more.
const COPY_BELOW: usize = 4 << 10;

/// A queue shared by the connections of one stream, and by the task that [drives](Self::drive) it.
#[derive(Debug)]
pub(crate) struct Outbox {
    queue: RefCell<VecDeque<Entry>>,
    /// Permits for bytes of payload, in fair order; closed with the outbox.
    room: Semaphore,
    /// Size of the control packets in the queue, in bytes.
    control: Cell<usize>,
    filled: Notify,
    state: RefCell<State>,
    ended: Notify,
    tally: Tally,
}

#[derive(Debug)]
struct Entry {
    /// A head and its payload, either of which may be empty.
    head: Bytes,
    payload: Bytes,
    /// Cost to be released when the packet has left.
    cost: Cost,
}

#[derive(Clone, Copy, Debug)]
enum Cost {
    Room(usize),
    Control(usize),
}

#[derive(Debug)]
enum State {
    Open,
    /// Nothing more is queued; the queue is sent, and then the half ends.
    Finishing(Status),
    Ended(StreamEnd),
}

impl Outbox {
    /// Creates an empty queue, to be [driven](Self::drive).
    pub(crate) fn new() -> Rc<Self> {
        Self::counting(Tally::default())
    }

    /// Creates a queue that counts its packets.
    pub(crate) fn counting(tally: Tally) -> Rc<Self> {
        Rc::new(Self {
            queue: RefCell::default(),
            room: Semaphore::new(MAX_QUEUED),
            control: Cell::new(0),
            filled: Notify::new(),
            state: RefCell::new(State::Open),
            ended: Notify::new(),
            tally,
        })
    }

    /// Queues `data` of a connection, in packets of [`MAX_DATA`], waiting for room before each; leaves
    /// it empty. Cancelling loses nothing: unqueued bytes are still in `data`.
    ///
    /// # Errors
    /// [`StreamEnd`]; the stream takes no more.
    pub(crate) async fn send(&self, connect_id: i64, data: &mut Bytes) -> Result<(), StreamEnd> {
        while !data.is_empty() {
            let length = data.len().min(MAX_DATA);
            // MAX_DATA fits in 32 bits.
            let room = self.room.acquire_many(length as u32).await;
            room.map_err(|_| self.end())?.forget();
            let payload = data.split_to(length);
            let head = data_head(connect_id, length);
            let (head, payload) = if length < COPY_BELOW {
                let mut both = BytesMut::with_capacity(head.len() + length);
                both.extend_from_slice(&head);
                both.extend_from_slice(&payload);
                (both.freeze(), Bytes::new())
            } else {
                (head, payload)
            };
            self.tally.count(PacketKind::Data);
            self.put(Entry {
                head,
                payload,
                cost: Cost::Room(length),
            });
        }
        Ok(())
    }

    /// Queues a control packet. Ends the stream where the peer has let too many pile up.
    pub(crate) fn push(&self, packet: &Packet) {
        if !matches!(*self.state.borrow(), State::Open) {
            return;
        }
        let head = packet.frame();
        let size = head.len();
        let control = self.control.get() + size;
        if control > MAX_CONTROL {
            self.close(StreamEnd::Unread);
            return;
        }
        self.control.set(control);
        self.tally.packet(packet);
        self.put(Entry {
            head,
            payload: Bytes::new(),
            cost: Cost::Control(size),
        });
    }

    fn put(&self, entry: Entry) {
        self.queue.borrow_mut().push_back(entry);
        self.filled.notify_one();
    }

    /// Refuses further packets. Once the queue is sent, the half ends with `status`.
    pub(crate) fn finish(&self, status: Status) {
        let mut state = self.state.borrow_mut();
        if matches!(*state, State::Open) {
            *state = State::Finishing(status);
            self.room.close();
            self.filled.notify_one();
        }
    }

    /// Ends the stream at once; the queue is discarded. The first end counts.
    pub(crate) fn close(&self, end: StreamEnd) {
        let mut state = self.state.borrow_mut();
        if !matches!(*state, State::Ended(_)) {
            *state = State::Ended(end);
            self.room.close();
            self.queue.borrow_mut().clear();
            self.ended.notify_waiters();
        }
    }

    /// Waits for the end of the stream.
    pub(crate) async fn ended(&self) -> StreamEnd {
        loop {
            let ended = self.ended.notified();
            if let State::Ended(end) = &*self.state.borrow() {
                return end.clone();
            }
            ended.await;
        }
    }

    /// Sends the queue until the stream ends, then closes it.
    pub(crate) async fn drive(&self, mut sender: PacketSender) -> StreamEnd {
        let end = tokio::select! {
            end = self.ended() => {
                sender.abort();
                end
            }
            end = self.pump(&mut sender) => end,
        };
        self.close(end.clone());
        end
    }

    async fn pump(&self, sender: &mut PacketSender) -> StreamEnd {
        loop {
            let entry = self.queue.borrow_mut().pop_front();
            let Some(mut entry) = entry else {
                if let State::Finishing(status) = &*self.state.borrow() {
                    sender.finish(status);
                    return StreamEnd::Closed;
                }
                tokio::select! {
                    () = self.filled.notified() => continue,
                    end = sender.reset() => return end,
                }
            };
            for part in [&mut entry.head, &mut entry.payload] {
                if let Err(end) = sender.send(part).await {
                    return end;
                }
            }
            match entry.cost {
                Cost::Room(bytes) => self.room.add_permits(bytes),
                Cost::Control(bytes) => self.control.set(self.control.get() - bytes),
            }
        }
    }

    fn end(&self) -> StreamEnd {
        match &*self.state.borrow() {
            State::Ended(end) => end.clone(),
            State::Open | State::Finishing(_) => StreamEnd::Closed,
        }
    }
}
