//! Parcels, messages with descriptors, of a process that sends anything: a copy in the queue is the same, and no
//! descriptor stays open.
#![no_main]

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::fs::{MemfdFlags, memfd_create};
use tunnel_fuzz::{open_descriptors, take_byte, take_piece};
use tunnel_proto::handover::State;

// Without the crates that they belong to, which bring everything else along.
#[allow(dead_code)]
#[path = "../../../tunnel-user/handover/src/error.rs"]
mod error;
#[allow(dead_code)]
#[path = "../../../tunnel-user/keeper/src/error.rs"]
mod keeper_error;
#[allow(dead_code)]
#[path = "../../../tunnel-user/handover/src/parcel.rs"]
mod parcel;

// A file names the crate of another one.
extern crate self as cpc_keeper;

pub use keeper_error::KeeperError;

use parcel::Parcel;

/// Sends bytes with descriptors. Returns `None` once the queue is full.
fn send(to: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Option<()> {
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let sent = sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
    sent.ok().map(drop)
}

/// Returns a file in memory.
fn memory(content: &[u8]) -> Option<OwnedFd> {
    let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).ok()?;
    rustix::io::write(&memory, content).ok()?;
    Some(memory)
}

/// Sends what `data` says, until the queue is full.
fn send_all(near: &UnixStream, mut data: &[u8]) -> Option<()> {
    let some = memory(&[])?;
    while let Some(action) = take_byte(&mut data) {
        let amount = usize::from(take_byte(&mut data)?);
        match action % 4 {
            // A valid beginning, and a message.
            0 | 1 => {
                let count = u32::try_from(amount).unwrap_or_default();
                let head = [*b"cpc1", count.to_be_bytes()].concat();
                let memory = memory(take_piece(&mut data).unwrap_or_default())?;
                send(near, &head, &[memory.as_fd()])?;
            }
            2 => send(near, &[0], &vec![some.as_fd(); amount])?,
            _ => {
                let bytes = take_piece(&mut data).unwrap_or_default();
                send(near, bytes, &vec![some.as_fd(); amount % 4])?;
            }
        }
    }
    Some(())
}

type Read = Result<(State, usize), String>;

fn read(parcel: Result<Parcel, error::HandoverError>) -> Read {
    let opened = parcel.and_then(Parcel::open::<State>);
    let opened = opened.map(|(state, descriptors)| (state, descriptors.len()));
    opened.map_err(|error| error.to_string())
}

fuzz_target!(|data: &[u8]| {
    let open = open_descriptors();
    let (near, far) = UnixStream::pair().expect("descriptors are left");
    send_all(&near, data);
    // The reader must come to the end.
    drop(near);
    loop {
        let [copy, again] = [(); 2].map(|()| read(Parcel::peek(&far)));
        assert_eq!(copy, again);
        let parcel = read(Parcel::receive(&far));
        // The kernel copies descriptors once more for each part of a message, of which a parcel has none.
        if parcel.is_err() {
            break;
        }
        assert_eq!(copy, parcel);
    }
    drop(far);
    assert_eq!(open_descriptors(), open, "a descriptor stays open");
});
