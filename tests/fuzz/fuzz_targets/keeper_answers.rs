//! The process that takes sockets from a keeper that answers anything: it takes no more than there can be, and no
//! descriptor of a set that it refuses stays open.
#![no_main]

use std::io::IoSlice;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use prost::Message;
use rustix::fs::{MemfdFlags, memfd_create};
use socket2::{Domain, Socket, Type};
use tunnel_fuzz::{blank, open_descriptors, take_byte, take_piece};
use tunnel_proto::keeper::answer::Kind;
use tunnel_proto::keeper::{Answer, Done, Kept, Left, Nothing, Refused};

// Without the crates that they belong to, which bring everything else along.
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/connect.rs"]
mod connect;
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/error.rs"]
mod error;
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/message.rs"]
mod message;
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/owner.rs"]
mod owner;
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/table.rs"]
mod table;
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/taking.rs"]
mod taking;

use message::MAX_MESSAGE;
use table::{Entry, SLOTS, Table};
use taking::take_one;

/// Number of sets that a process takes at most.
const TAKEN: usize = 16;

/// Sends bytes with copies of a descriptor. Returns `None` once the queue is full.
fn send(to: &Socket, bytes: &[u8], descriptor: &impl AsFd, count: u8) -> Option<()> {
    let raw = vec![descriptor.as_fd().as_raw_fd(); usize::from(count)];
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let sent = sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
    sent.ok().map(drop)
}

/// Answers as `data` says. Returns `None` once the queue is full.
fn answer(far: &Socket, some: &OwnedFd, table: &Table, mut data: &[u8]) -> Option<()> {
    while let Some(action) = take_byte(&mut data) {
        let mut take = || take_byte(&mut data).unwrap_or_default();
        let kind = match action % 8 {
            0 | 1 => {
                let count = u32::from(take());
                let left = Left {
                    process: blank(usize::from(take())),
                    // Mostly as many as follow.
                    count: if count < 250 {
                        count
                    } else {
                        SLOTS + count - 252
                    },
                    dead_ms: u64::MAX >> (action / 8),
                };
                let left = Answer {
                    kind: Some(Kind::Left(left)),
                }
                .encode_to_vec();
                match action / 8 % 4 {
                    0 => send(far, &left, some, 1)?,
                    1 => send(far, &left, some, 0)?,
                    _ => send(far, &left, &table.descriptor(), 1)?,
                }
                continue;
            }
            2..5 => Kind::Kept(Kept {
                slot: u32::from(take()) << (action / 8 % 16),
                description: blank(usize::from(take())),
            }),
            5 => Kind::Nothing(Nothing {}),
            6 => match action / 8 % 2 {
                0 => Kind::Done(Done {}),
                _ => Kind::Refused(Refused {
                    reason: "no".to_owned(),
                }),
            },
            _ => {
                let count = take() % 6;
                send(far, take_piece(&mut data).unwrap_or_default(), some, count)?;
                continue;
            }
        };
        let descriptors = if action < 240 { 1 } else { action % 4 };
        send(
            far,
            &Answer { kind: Some(kind) }.encode_to_vec(),
            some,
            descriptors,
        )?;
    }
    Some(())
}

fn run(data: &[u8]) -> Option<()> {
    let (near, far) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).ok()?;
    let some = memfd_create("fuzz", MemfdFlags::CLOEXEC).ok()?;
    let table = Table::new().ok()?;
    table.set_consumed(1, u64::MAX);
    answer(&far, &some, &table, data);
    // The reader comes to an end, and can still ask.
    far.shutdown(Shutdown::Write).ok()?;
    for _ in 0..TAKEN {
        let Ok(Some(left)) = take_one(&near, "server") else {
            break;
        };
        for kept in &left.kept {
            assert!(kept.description.len() <= MAX_MESSAGE);
            let entry = left.table.entry(kept.slot);
            assert!(entry.is_none() || kept.slot < SLOTS);
            let expected = Entry {
                consumed: if kept.slot == 1 { u64::MAX } else { 0 },
                intended: 0,
            };
            assert!(entry.is_none_or(|it| it == expected));
        }
    }
    Some(())
}

fuzz_target!(|data: &[u8]| {
    let open = open_descriptors();
    run(data);
    assert_eq!(open_descriptors(), open, "a descriptor stays open");
});
