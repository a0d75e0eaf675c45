//! A keeper with clients that send anything at any time: what it holds is bounded, a set is given to one process
//! at a time and after the death of its owner alone, and no descriptor stays open.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use nix::poll::PollFlags;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::fs::{MemfdFlags, memfd_create};
use socket2::{Domain, Socket, Type};
use tunnel_fuzz::{blank, open_descriptors, take_byte, take_piece};
use tunnel_proto::keeper::answer::Kind as AnswerKind;
use tunnel_proto::keeper::request::Kind;
use tunnel_proto::keeper::{Confirm, Discard, Drop, Hello, Keep, Request, Take};

// Without the crates that they belong to, which bring everything else along.
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/connect.rs"]
mod connect;
#[path = "../../../tunnel-user/keeper/src/connection.rs"]
mod connection;
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/error.rs"]
mod error;
#[path = "../../../tunnel-user/keeper/src/listener.rs"]
mod listener;
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/message.rs"]
mod message;
#[path = "../../../tunnel-user/keeper/src/owner.rs"]
mod owner;
#[path = "../../../tunnel-user/host/src/report.rs"]
pub mod report;
#[path = "../../../tunnel-user/keeper/src/requests.rs"]
mod requests;
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/service.rs"]
mod service;
#[path = "../../../tunnel-user/keeper/src/sets.rs"]
mod sets;
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/table.rs"]
mod table;

// The files name the crate of another one.
extern crate self as cpc_host;

/// The part of the keeper that restricts its process. The target is none.
mod filter {
    /// Restricts nothing.
    pub(crate) fn confine() {}
}

/// The part of `cpc-host` that counts descriptors. The target gives the room itself.
pub mod descriptors {
    /// Returns no number: there is no service here.
    pub fn limit() -> usize {
        0
    }
}

/// The part of `cpc-host` that talks to systemd.
pub mod lifecycle {
    /// Notifies no service manager.
    pub fn notify(_: &[sd_notify::NotifyState<'_>]) {}
}

use connect::answer;
use connection::{ConnectionId, MAX_CONNECTIONS, Phase};
use error::KeeperError;
use message::{Attached, MAX_DESCRIPTION, send};
use service::Driver;
use sets::{MAX_SETS, SetId};
use table::SLOTS;

/// Room for kept sockets: soon full.
const ROOM: usize = 12;

/// More than the patience of the keeper.
const LONG: Duration = Duration::from_secs(3600);

/// A client, as the driver of the keeper knows it.
struct Client {
    socket: Socket,
    /// Number of `Kept` that are still to come.
    expected: u32,
}

struct World {
    keeper: Driver,
    now: Instant,
    clients: BTreeMap<ConnectionId, Client>,
    /// Number of the next connection.
    next: ConnectionId,
    /// A descriptor to send.
    some: OwnedFd,
}

impl World {
    fn new() -> Option<Self> {
        Some(Self {
            some: memfd_create("fuzz", MemfdFlags::CLOEXEC).ok()?,
            keeper: Driver::new(ROOM),
            now: Instant::now(),
            clients: BTreeMap::new(),
            next: 0,
        })
    }

    fn connect(&mut self) {
        let Ok((near, far)) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None) else {
            return;
        };
        if near.set_nonblocking(true).is_err() {
            return;
        }
        let is_full = self.keeper.connections.len() >= MAX_CONNECTIONS;
        self.keeper.greet(far, self.now);
        if is_full {
            assert!(matches!(answer(&near), Err(KeeperError::Refused(_))));
            return;
        }
        let (socket, expected) = (near, 0);
        self.clients.insert(self.next, Client { socket, expected });
        self.next += 1;
    }

    /// Sends a request of client `id`, which the keeper serves at once.
    fn ask(&mut self, id: ConnectionId, kind: Kind, descriptor: u8) {
        let kind = Some(kind);
        let Some(client) = self.clients.get(&id) else {
            return;
        };
        let descriptor = (!descriptor.is_multiple_of(8)).then_some(self.some.as_fd());
        // The queue may be full, or the connection at its end.
        let _ = send(&client.socket, &Request { kind }, descriptor);
        self.serve(id, PollFlags::POLLIN);
    }

    fn send_raw(&self, id: ConnectionId, bytes: &[u8], count: u8) {
        let Some(client) = self.clients.get(&id) else {
            return;
        };
        let raw = vec![self.some.as_raw_fd(); usize::from(count)];
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        let (to, bytes) = (client.socket.as_raw_fd(), [IoSlice::new(bytes)]);
        let _ = sendmsg::<()>(to, &bytes, control, flags, None);
    }

    fn serve(&mut self, id: ConnectionId, events: PollFlags) {
        self.keeper.serve(id, events, self.now);
    }

    /// Reads an answer for client `id`. Returns whether there was one.
    fn read(&mut self, id: ConnectionId) -> bool {
        let Some(client) = self.clients.get_mut(&id) else {
            return false;
        };
        let (kind, descriptor) = match answer(&client.socket) {
            Ok(answer) => answer,
            Err(KeeperError::Refused(_)) => {
                assert!(!self.keeper.connections.contains_key(&id));
                self.clients.remove(&id);
                return false;
            }
            Err(KeeperError::Io(_)) => return false,
            Err(error) => panic!("a keeper said {error}"),
        };
        let is_one = matches!(descriptor, Attached::One(_));
        match kind {
            AnswerKind::Left(left) => {
                assert!(is_one && client.expected == 0);
                client.expected = left.count;
            }
            AnswerKind::Kept(kept) => {
                assert!(is_one && client.expected > 0);
                assert!(kept.slot < SLOTS && kept.description.len() <= MAX_DESCRIPTION);
                client.expected -= 1;
            }
            AnswerKind::Done(_) | AnswerKind::Nothing(_) => {
                assert!(!is_one && client.expected == 0);
            }
            AnswerKind::Refused(_) => unreachable!("an error"),
        }
        true
    }

    fn end(&mut self, id: ConnectionId) {
        self.clients.remove(&id);
        // Earlier requests are still read, a limited number at once.
        while self.keeper.connections.contains_key(&id) {
            self.serve(id, PollFlags::POLLIN | PollFlags::POLLHUP);
            self.check();
        }
    }

    /// Does what is due. A connection that ends may uncover a set that is due too, and no more.
    fn settle(&mut self) {
        self.keeper.settle(self.now);
        self.keeper.settle(self.now);
        let next = self.keeper.sets.next_expiry();
        assert!(next.is_none_or(|it| it > self.now), "due again and again");
    }

    fn act(&mut self, action: u8, data: &mut &[u8]) {
        let mut take = || take_byte(data).unwrap_or_default();
        let id = match action % 16 {
            0 => return self.connect(),
            1 => {
                self.now += Duration::from_millis(u64::from(take()) << (action / 16));
                return self.settle();
            }
            2 => {
                // An owner dies; the keeper sees that when it looks again.
                let set = SetId::from(take() % 32);
                return self.keeper.sets.die(set, self.now);
            }
            _ => {
                let known = self.clients.len().max(1);
                { self.clients.keys() }.nth(usize::from(take()) % known)
            }
        };
        let Some(id) = id.copied() else {
            return;
        };
        let role =
            |number: u8| ["server", "agent", "", "other"][usize::from(number % 4)].to_owned();
        match action % 16 {
            3 | 4 => {
                let hello = Hello {
                    role: role(take()),
                    process: blank(usize::from(take())),
                    patience_ms: u64::from(take()) << 12,
                };
                self.ask(id, Kind::Hello(hello), action / 16);
            }
            5..8 => {
                let slot = u32::from(take() % 8) * (SLOTS / 7);
                // Too long at the end alone.
                let description = blank(usize::from(take()) * (MAX_DESCRIPTION / 254));
                let keep = Keep { slot, description };
                self.ask(id, Kind::Keep(keep), action / 16);
            }
            8 => {
                let slot = u32::from(take() % 8) * (SLOTS / 7);
                self.ask(id, Kind::Drop(Drop { slot }), 0);
            }
            9 => self.ask(id, Kind::Discard(Discard {}), 0),
            10 => {
                let take = Take { role: role(take()) };
                self.ask(id, Kind::Take(take), 0);
            }
            11 => self.ask(id, Kind::Confirm(Confirm {}), 0),
            12 => {
                let count = take() % 6;
                self.send_raw(id, take_piece(data).unwrap_or_default(), count);
                self.serve(id, PollFlags::POLLIN);
            }
            13 => while self.read(id) {},
            14 => self.serve(id, PollFlags::POLLOUT),
            _ => self.end(id),
        }
    }

    /// Checks what holds at any time.
    fn check(&self) {
        let keeper = &self.keeper;
        assert!(keeper.connections.len() <= MAX_CONNECTIONS);
        assert!(keeper.sets.iter().count() <= MAX_SETS);
        assert!(keeper.kept() <= ROOM);
        let (mut owned, mut given) = (BTreeSet::new(), BTreeSet::new());
        for connection in keeper.connections.values() {
            match &connection.phase {
                Phase::Owning(set) => {
                    let is_lost = keeper.sets.get(*set).map(|set| set.is_lost());
                    assert_eq!(is_lost, Some(false), "an owner without its set");
                    assert!(owned.insert(*set), "a set has two owners");
                }
                Phase::Giving { set, .. } => assert!(given.insert(*set), "given twice"),
                Phase::Asking { .. } | Phase::Discarded | Phase::Waiting { .. } => {}
            }
            for set in &connection.given {
                assert!(given.insert(*set), "given twice");
            }
        }
        for set in given {
            let set = keeper.sets.get(set).expect("what is given is held");
            assert!(set.is_lost() && set.is_dead(), "its owner lives");
        }
        for (_, set) in keeper.sets.iter() {
            let of_bounds = |(slot, (text, _)): (&u32, &(prost::bytes::Bytes, OwnedFd))| {
                *slot >= SLOTS || text.len() > MAX_DESCRIPTION
            };
            assert!(!set.contents.kept.iter().any(of_bounds));
        }
    }

    /// Lets everything come to its end.
    fn finish(mut self) {
        let clients: Vec<_> = self.clients.keys().copied().collect();
        clients.into_iter().for_each(|id| self.end(id));
        assert!(self.keeper.connections.is_empty());
        self.now += LONG;
        self.settle();
        assert_eq!(self.keeper.sets.iter().count(), 0, "a set without an end");
        assert_eq!(self.keeper.sets.next_expiry(), None);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    let open = open_descriptors();
    let Some(mut world) = World::new() else {
        return;
    };
    while let Some(action) = take_byte(&mut data) {
        world.act(action, &mut data);
        world.check();
    }
    world.finish();
    assert_eq!(open_descriptors(), open, "a descriptor stays open");
});
