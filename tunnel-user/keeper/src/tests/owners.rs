//! Owners that live, in this process.

use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use super::running::{LONG, Running, take_all};
use crate::{Keeper, KeeperError, Service, Slot};

fn open(keeper: &Running) -> Keeper {
    Keeper::open(&keeper.path, "server", b"the process", LONG).unwrap()
}

/// Has a new socket kept by the keeper alone. Returns its peer.
fn keep(keeper: &Keeper) -> (Slot, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(LONG)).unwrap();
    let slot = keeper.keep(b"a socket".to_vec(), 0, far.as_fd()).unwrap();
    (slot, near)
}

fn assert_closed(mut peer: &UnixStream) {
    assert_eq!(peer.read(&mut [0]).unwrap(), 0);
}

fn assert_open(mut peer: &UnixStream) {
    peer.set_nonblocking(true).unwrap();
    let error = peer.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    peer.set_nonblocking(false).unwrap();
}

fn wait_until(is_so: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_dropped_slot_is_closed() {
    let running = Running::start();
    let keeper = open(&running);
    let (first, first_peer) = keep(&keeper);
    let (second, second_peer) = keep(&keeper);
    assert_eq!(keeper.kept(), 2);
    drop(first);
    assert_closed(&first_peer);
    assert_open(&second_peer);
    assert_eq!(keeper.kept(), 1);
    for _ in 0..100 {
        let (slot, peer) = keep(&keeper);
        drop(slot);
        assert_closed(&peer);
    }
    assert_open(&second_peer);
    let clone = keeper.clone();
    drop(keeper);
    assert!(clone.is_there());
    drop((clone, second));
    assert_closed(&second_peer);
}

#[test]
fn discard_closes_everything() {
    let running = Running::start();
    let keeper = open(&running);
    let kept: Vec<_> = (0..100).map(|_| keep(&keeper)).collect();
    assert!(keeper.is_there());
    assert!(keeper.discard());
    for (_, peer) in &kept {
        assert_closed(peer);
    }
    assert!(!keeper.is_there());
    let (near, _far) = UnixStream::pair().unwrap();
    assert!(keeper.keep(Vec::new(), 0, near.as_fd()).is_none());
    assert!(keeper.discard(), "it is done");
    drop(kept);
    assert_eq!(keeper.kept(), 0);
}

/// The process uses the sockets still.
#[test]
fn a_lost_set_of_a_living_process_is_not_given_away() {
    let running = Running::start();
    let keeper = open(&running);
    let (near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(LONG)).unwrap();
    let slot = keeper.keep(Vec::new(), 0, far.as_fd()).unwrap();
    drop(far);
    wait_until(|| keeper.is_idle());
    assert!(take_all(&running.path, "server").unwrap().is_empty());
    // Without an order to close it, as if its connection had broken.
    let socket = keeper.shared_socket();
    socket.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(take_all(&running.path, "server").unwrap().is_empty());
    assert_open(&near);
    wait_until(|| !keeper.is_there());
    drop(slot);
    // The owner can't have it closed any more: the keeper does, after a while.
    assert_closed(&near);
}

#[test]
fn an_owner_without_its_keeper_keeps_nothing() {
    let mut running = Running::start();
    let keeper = open(&running);
    let (slot, peer) = keep(&keeper);
    running.stop();
    assert_closed(&peer);
    assert!(!keeper.is_there());
    let (near, _far) = UnixStream::pair().unwrap();
    assert!(keeper.keep(Vec::new(), 0, near.as_fd()).is_none());
    assert!(!keeper.discard());
    slot.consumed(1);
    drop(slot);
    let again = Keeper::open(&running.path, "server", b"", LONG);
    assert!(matches!(again, Err(KeeperError::Unreachable { .. })));
}

#[test]
fn a_long_description_is_not_kept() {
    let running = Running::start();
    let keeper = open(&running);
    let (near, _far) = UnixStream::pair().unwrap();
    assert!(keeper.keep(vec![0; 4097], 0, near.as_fd()).is_none());
    let slot = keeper.keep(vec![0; 4096], 0, near.as_fd());
    assert!(slot.is_some());
    assert!(keeper.discard(), "the keeper has accepted it");
}

#[test]
fn a_full_keeper_serves_on() {
    let running = Running::start_with(|service| service.room = 2);
    let keeper = open(&running);
    let first = keep(&keeper);
    let second = keep(&keeper);
    let third = keep(&keeper);
    assert_closed(&third.1);
    assert_open(&second.1);
    drop(first.0);
    assert_closed(&first.1);
    let fourth = keep(&keeper);
    assert!(take_all(&running.path, "server").unwrap().is_empty());
    assert_open(&fourth.1);
}

#[test]
fn a_path_has_one_keeper() {
    let mut running = Running::start();
    let second = Service::open(&running.path);
    assert!(matches!(second, Err(KeeperError::Busy(_))));
    assert!(take_all(&running.path, "server").unwrap().is_empty());
    running.stop();
    assert!(running.path.exists(), "as after a kill");
    Service::open(&running.path).unwrap();
}
