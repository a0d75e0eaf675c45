//! Clients that keep to no rule.

use std::fs::{self, Permissions};
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::geteuid;
use prost::Message;
use socket2::Socket;
use tunnel_proto::keeper::answer::Kind as AnswerKind;
use tunnel_proto::keeper::request::Kind;
use tunnel_proto::keeper::{Discard, Drop as DropSlot, Hello, Keep, Request, Take};

use super::running::{LONG, Running, take_all};
use crate::connect::{answer, connect, request};
use crate::connection::MAX_CONNECTIONS;
use crate::sets::MAX_SETS;
use crate::table::{SLOTS, Table};
use crate::{Keeper, KeeperError};

/// User without privileges.
const STRANGER: libc::uid_t = 65_534;

fn hello() -> Kind {
    Kind::Hello(Hello {
        role: "server".to_owned(),
        process: "hostile".into(),
        patience_ms: 1000,
    })
}

fn keep(slot: u32, length: usize) -> Kind {
    let description = vec![0; length].into();
    Kind::Keep(Keep { slot, description })
}

/// Connects, and owns a set.
fn owner(keeper: &Running) -> Socket {
    let socket = connect(&keeper.path).unwrap();
    let table = Table::new().unwrap();
    request(&socket, hello(), Some(table.descriptor())).unwrap();
    assert!(matches!(answer(&socket), Ok((AnswerKind::Done(_), _))));
    socket
}

fn send_bytes(to: &Socket, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let control = match raw.is_empty() {
        true => &control[..0],
        false => &control[..],
    };
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None).unwrap();
}

fn assert_refused(socket: &Socket, what: &str) {
    let refused = answer(socket);
    assert!(
        matches!(refused, Err(KeeperError::Refused(_))),
        "{what}: {refused:?}"
    );
    let end = answer(socket);
    assert!(matches!(end, Err(KeeperError::Io(_))), "{what}: {end:?}");
}

#[test]
fn malformed_messages_end_their_connection_alone() {
    let keeper = Running::start();
    let honest = Keeper::open(&keeper.path, "agent", b"", LONG).unwrap();
    let unknown = [0x7a, 0x01, 0x00];
    let long = vec![0; 9 << 10];
    let malformed: [(&str, &[u8]); 4] = [
        ("too long", &long),
        ("garbage", b"GET / HTTP/1.1\r\n\r\n"),
        ("cut off", &[0x0a, 0x7f, 0x01]),
        ("of an unknown kind", &unknown),
    ];
    let (near, far) = UnixStream::pair().unwrap();
    for (what, bytes) in malformed {
        for socket in [connect(&keeper.path).unwrap(), owner(&keeper)] {
            send_bytes(&socket, bytes, &[]);
            assert_refused(&socket, what);
        }
        // With descriptors, which are closed.
        let socket = owner(&keeper);
        send_bytes(&socket, bytes, &[far.as_fd(), far.as_fd(), far.as_fd()]);
        assert_refused(&socket, what);
    }
    let empty = owner(&keeper);
    send_bytes(&empty, b"", &[]);
    assert!(matches!(answer(&empty), Err(KeeperError::Io(_))));
    drop(far);
    near.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!((&near).read(&mut [0]).unwrap(), 0);
    assert!(honest.is_there());
    assert!(honest.discard());
}

#[test]
fn requests_out_of_turn_are_refused() {
    let keeper = Running::start();
    let table = Table::new().unwrap();
    let some = Some(table.descriptor());
    let take_one = Kind::Take(Take {
        role: "server".to_owned(),
    });
    let early = [
        ("Keep", keep(0, 0), some),
        ("Drop", Kind::Drop(DropSlot { slot: 0 }), None),
        ("Discard", Kind::Discard(Discard {}), None),
        ("no table", hello(), None),
    ];
    for (what, kind, descriptor) in early {
        let socket = connect(&keeper.path).unwrap();
        request(&socket, kind, descriptor).unwrap();
        assert_refused(&socket, what);
    }
    let late = [
        ("Hello", hello(), some),
        ("Take", take_one, None),
        ("high number", keep(SLOTS, 0), some),
        ("long description", keep(0, 4097), some),
        ("no descriptor", keep(0, 0), None),
    ];
    for (what, kind, descriptor) in late {
        let socket = owner(&keeper);
        request(&socket, kind, descriptor).unwrap();
        assert_refused(&socket, what);
    }
    for role in [String::new(), "x".repeat(65)] {
        let socket = connect(&keeper.path).unwrap();
        let Kind::Hello(hello) = hello() else {
            unreachable!()
        };
        request(&socket, Kind::Hello(Hello { role, ..hello }), some).unwrap();
        assert_refused(&socket, "role");
    }
}

#[test]
fn a_message_with_several_descriptors_keeps_none() {
    let keeper = Running::start();
    let socket = owner(&keeper);
    for count in [2, 3, 4, 5, 100] {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_read_timeout(Some(LONG)).unwrap();
        let kind = Some(keep(0, 10));
        let descriptors = vec![far.as_fd(); count];
        send_bytes(&socket, &Request { kind }.encode_to_vec(), &descriptors);
        drop(far);
        assert_eq!((&near).read(&mut [0]).unwrap(), 0, "{count}");
    }
    // The connection goes on.
    let (near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(LONG)).unwrap();
    request(&socket, keep(0, 10), Some(far.as_fd())).unwrap();
    request(&socket, Kind::Drop(DropSlot { slot: 7 }), None).unwrap();
    request(&socket, Kind::Discard(Discard {}), None).unwrap();
    assert!(matches!(answer(&socket), Ok((AnswerKind::Done(_), _))));
    request(&socket, keep(0, 10), Some(far.as_fd())).unwrap();
    request(&socket, Kind::Drop(DropSlot { slot: 0 }), None).unwrap();
    request(&socket, Kind::Discard(Discard {}), None).unwrap();
    assert!(matches!(answer(&socket), Ok((AnswerKind::Done(_), _))));
    drop(far);
    assert_eq!((&near).read(&mut [0]).unwrap(), 0);
}

#[test]
fn connections_and_sets_are_bounded() {
    let keeper = Running::start();
    let mut owners: Vec<_> = (0..MAX_CONNECTIONS).map(|_| owner(&keeper)).collect();
    let more = connect(&keeper.path).unwrap();
    assert_refused(&more, "a connection too many");
    // A lost set counts for as long as it is there.
    const { assert!(MAX_SETS == MAX_CONNECTIONS) };
    owners.pop();
    let table = Table::new().unwrap();
    let refusal = loop {
        let more = connect(&keeper.path).unwrap();
        let _ = request(&more, hello(), Some(table.descriptor()));
        match answer(&more) {
            // Its end is not seen yet.
            Err(KeeperError::Refused(why)) if why.contains("connections") => {}
            other => break other.unwrap_err(),
        }
    };
    assert!(refusal.to_string().contains("sets"), "{refusal}");
    let last = owners.pop().unwrap();
    request(&last, Kind::Discard(Discard {}), None).unwrap();
    assert!(matches!(answer(&last), Ok((AnswerKind::Done(_), _))));
    owner(&keeper);
}

#[test]
fn a_flood_stops_no_other_client() {
    let keeper = Running::start();
    let socket = owner(&keeper);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                request(&socket, Kind::Drop(DropSlot { slot: 0 }), None).unwrap();
            }
        });
        for _ in 0..20 {
            let done = take_all(&keeper.path, "agent").map(|left| left.len());
            let other = Keeper::open(&keeper.path, "agent", b"", LONG).map(|it| it.discard());
            is_over.store(
                !matches!((&done, &other), (Ok(0), Ok(true))),
                Ordering::Relaxed,
            );
            assert!(!is_over.load(Ordering::Relaxed), "{done:?} {other:?}");
        }
        is_over.store(true, Ordering::Relaxed);
    });
}

/// Checks the user of the process, and not the mode of the socket alone.
#[test]
fn a_stranger_is_refused() {
    if !geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "CI runs tests as root");
        println!("skipped: only root can be another user");
        return;
    }
    let keeper = Running::start();
    for path in [keeper.place.path(), &keeper.path] {
        fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
    }
    let path = keeper.path.clone();
    let refused = thread::spawn(move || {
        // SAFETY: a bare system call, which changes this thread alone.
        let done = unsafe { libc::syscall(libc::SYS_setresuid, -1, STRANGER, -1) };
        assert_eq!(done, 0);
        take_all(&path, "server").map(|left| left.len())
    });
    let refused = refused.join().unwrap();
    assert!(
        matches!(refused, Err(KeeperError::Refused(_))),
        "{refused:?}"
    );
    assert!(take_all(&keeper.path, "server").unwrap().is_empty());
}
