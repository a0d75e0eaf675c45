//! Sockets whose owner is killed.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tunnel_proto::keeper::Take;
use tunnel_proto::keeper::answer::Kind as AnswerKind;
use tunnel_proto::keeper::request::Kind;

use super::running::{LONG, Owner, Running, take_all};
use crate::connect::{answer, connect, request};
use crate::{Entry, Left};

/// Checks that a process was left with all sockets, and that bytes flow over them.
pub(super) fn check(owner: &mut Owner, left: Left) {
    assert_eq!(left.process, b"the process"[..]);
    assert!(left.dead_for < LONG);
    assert_eq!(left.kept.len(), owner.peers.len());
    for (number, (kept, peer)) in left.kept.into_iter().zip(&mut owner.peers).enumerate() {
        assert_eq!(kept.slot as usize, number);
        assert_eq!(kept.description, format!("socket {number}").as_bytes());
        let entry = Entry {
            consumed: number as u64 + 100,
            intended: number as u64 + 200,
        };
        assert_eq!(left.table.entry(kept.slot), Some(entry));
        let mut stream = TcpStream::from(kept.descriptor);
        stream.set_read_timeout(Some(LONG)).unwrap();
        peer.write_all(b" and after").unwrap();
        let mut read = [0; 17];
        stream.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"between and after");
        stream.write_all(b"answer").unwrap();
        drop(stream);
        // Its end too: the keeper holds no duplicate any more.
        let mut all = Vec::new();
        peer.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"answer");
    }
}

pub(super) fn write_between(owner: &mut Owner) {
    for peer in &mut owner.peers {
        peer.write_all(b"between").unwrap();
    }
}

/// Waits for the end of a connection, orderly or not.
fn assert_ended(mut peer: &TcpStream) {
    match peer.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_kept_socket_survives_its_owner() {
    let keeper = Running::start();
    let mut owner = Owner::start(&keeper.path, 3, LONG * 10, "");
    assert!(
        take_all(&keeper.path, "server").unwrap().is_empty(),
        "it lives"
    );
    owner.kill();
    write_between(&mut owner);
    assert!(take_all(&keeper.path, "agent").unwrap().is_empty());
    let left = take_all(&keeper.path, "server").unwrap();
    let [left] = <[Left; 1]>::try_from(left).unwrap();
    check(&mut owner, left);
    assert!(take_all(&keeper.path, "server").unwrap().is_empty());
}

#[test]
fn two_thousand_sockets_survive_their_owner() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if most < 10_000 {
        assert!(std::env::var_os("CI").is_none(), "CI allows descriptors");
        println!("skipped: RLIMIT_NOFILE is {most}");
        return;
    }
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let keeper = Running::start();
    let mut owner = Owner::start(&keeper.path, 2000, LONG * 10, "");
    owner.kill();
    write_between(&mut owner);
    let left = take_all(&keeper.path, "server").unwrap();
    let [left] = <[Left; 1]>::try_from(left).unwrap();
    check(&mut owner, left);
}

/// The kernel reports the end of such a process as a reset, in front of everything that it has sent.
#[test]
fn nothing_is_lost_of_an_owner_that_reads_no_answer() {
    let keeper = Running::start();
    for _ in 0..3 {
        let mut owner = Owner::start(&keeper.path, 20, LONG, "silent");
        owner.kill();
        let left = take_all(&keeper.path, "server").unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].process, b"silent"[..]);
        assert_eq!(left[0].kept.len(), 20);
    }
}

#[test]
fn sets_are_taken_oldest_first() {
    let keeper = Running::start();
    let mut older = Owner::start(&keeper.path, 1, LONG, "silent");
    let mut younger = Owner::start(&keeper.path, 2, LONG, "");
    younger.kill();
    older.kill();
    let left = take_all(&keeper.path, "server").unwrap();
    let counts: Vec<_> = left.iter().map(|it| it.kept.len()).collect();
    assert_eq!(counts, [1, 2]);
}

#[test]
fn one_of_two_processes_gets_a_set() {
    let keeper = Running::start();
    let mut owner = Owner::start(&keeper.path, 50, LONG, "");
    owner.kill();
    let takers: Vec<_> = (0..2)
        .map(|_| {
            let path = keeper.path.clone();
            thread::spawn(move || take_all(&path, "server").unwrap())
        })
        .collect();
    let taken = takers.into_iter().flat_map(|it| it.join().unwrap());
    let counts: Vec<_> = taken.map(|left| left.kept.len()).collect();
    assert_eq!(counts, [50]);
}

/// Before the first socket, after some, and after all of them.
#[test]
fn a_process_that_dies_while_taking_loses_nothing() {
    let keeper = Running::start();
    let mut owner = Owner::start(&keeper.path, 20, LONG * 10, "");
    owner.kill();
    write_between(&mut owner);
    for received in [0, 1, 5, 21] {
        let taker = connect(&keeper.path).unwrap();
        let role = "server".to_owned();
        request(&taker, Kind::Take(Take { role }), None).unwrap();
        for number in 0..received {
            match answer(&taker).unwrap() {
                (AnswerKind::Left(_), _) if number == 0 => {}
                (AnswerKind::Kept(_), _) if number > 0 => {}
                other => panic!("{other:?}"),
            }
        }
    }
    let left = take_all(&keeper.path, "server").unwrap();
    let [left] = <[Left; 1]>::try_from(left).unwrap();
    check(&mut owner, left);
}

#[test]
fn a_set_that_no_process_takes_is_closed() {
    let keeper = Running::start();
    let mut owner = Owner::start(&keeper.path, 2, Duration::from_millis(100), "");
    owner.kill();
    owner.peers.iter().for_each(assert_ended);
    assert!(take_all(&keeper.path, "server").unwrap().is_empty());
}

#[test]
fn everything_is_closed_at_the_end_of_the_keeper() {
    let mut keeper = Running::start();
    let mut owner = Owner::start(&keeper.path, 2, LONG * 10, "");
    owner.kill();
    keeper.stop();
    owner.peers.iter().for_each(assert_ended);
    assert!(take_all(&keeper.path, "server").is_err());
}
