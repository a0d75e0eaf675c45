//! A keeper in a thread, and owners that can be killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::TempDir;
use tunnel_proto::keeper::request::Kind;
use tunnel_proto::keeper::{Hello, Keep};

use crate::connect::{connect, request};
use crate::table::Table;
use crate::{Keeper, KeeperError, Left, Service, take};

/// Time after which a test has failed.
pub(super) const LONG: Duration = Duration::from_secs(30);

/// A keeper, which ends with the test.
pub(super) struct Running {
    pub(super) path: PathBuf,
    pub(super) place: TempDir,
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub(super) fn start() -> Self {
        Self::start_with(|_| {})
    }

    pub(super) fn start_with(change: impl FnOnce(&mut Service)) -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("keeper.sock");
        let mut service = Service::open(&path).unwrap();
        change(&mut service);
        let (stopped, stop) = nix::unistd::pipe().unwrap();
        let thread = thread::spawn(move || service.serve(stopped.as_fd()).unwrap());
        Self {
            path,
            place,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Ends the keeper.
    pub(super) fn stop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A process that owns a set.
pub(super) struct Owner {
    child: Child,
    /// The other ends of its sockets, by number.
    pub(super) peers: Vec<TcpStream>,
}

impl Owner {
    /// Starts an owner with `count` sockets, and waits until all are kept.
    pub(super) fn start(path: &Path, count: usize, patience: Duration, how: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::running::owner", "--nocapture"])
            .env("CPC_KEEPER_PATH", path)
            .env("CPC_KEEPER_HOW", how)
            .env("CPC_KEEPER_COUNT", count.to_string())
            .env("CPC_KEEPER_PATIENCE", patience.as_millis().to_string())
            .env(
                "CPC_KEEPER_PEER",
                listener.local_addr().unwrap().to_string(),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut peers: Vec<Option<TcpStream>> = (0..count).map(|_| None).collect();
        for _ in 0..count {
            let (mut peer, _) = listener.accept().unwrap();
            peer.set_read_timeout(Some(LONG)).unwrap();
            let mut number = [0; 8];
            peer.read_exact(&mut number).unwrap();
            peers[usize::from_be_bytes(number)] = Some(peer);
        }
        let output = BufReader::new(child.stdout.take().unwrap());
        assert!(
            output
                .lines()
                .any(|line| line.unwrap().contains("all kept"))
        );
        let peers = peers.into_iter().map(Option::unwrap).collect();
        Self { child, peers }
    }

    /// Kills the process, and waits until it is dead.
    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The owner process, where [`Owner::start`] has started this binary. Does nothing otherwise.
#[test]
fn owner() {
    let Some(path) = std::env::var_os("CPC_KEEPER_PATH").map(PathBuf::from) else {
        return;
    };
    let get = |name: &str| std::env::var(format!("CPC_KEEPER_{name}")).unwrap();
    let count: u32 = get("COUNT").parse().unwrap();
    let patience = Duration::from_millis(get("PATIENCE").parse().unwrap());
    let dial = |number: u32| {
        let mut stream = TcpStream::connect(get("PEER")).unwrap();
        stream.write_all(&u64::from(number).to_be_bytes()).unwrap();
        stream
    };
    match get("HOW").as_str() {
        "silent" => silent_owner(&path, (0..count).map(dial)),
        _ => {
            let keeper = Keeper::open(&path, "server", b"the process", patience).unwrap();
            let kept: Vec<_> = (0..count)
                .map(|number| {
                    let stream = dial(number);
                    let description = format!("socket {number}").into_bytes();
                    let slot = keeper.keep(description, 0, stream.as_fd()).unwrap();
                    slot.consuming(u64::from(number) + 200);
                    slot.consumed(u64::from(number) + 100);
                    (slot, stream)
                })
                .collect();
            assert_eq!(keeper.kept(), kept.len());
            while !keeper.is_idle() {
                thread::sleep(Duration::from_millis(1));
            }
            wait_to_be_killed();
        }
    }
}

/// Owns a set without reading a single answer.
fn silent_owner(path: &Path, streams: impl Iterator<Item = TcpStream>) {
    let keeper = connect(path).unwrap();
    let table = Table::new().unwrap();
    let hello = Hello {
        role: "server".to_owned(),
        process: "silent".into(),
        patience_ms: 60_000,
    };
    request(&keeper, Kind::Hello(hello), Some(table.descriptor())).unwrap();
    let _streams: Vec<_> = (0..)
        .zip(streams)
        .map(|(slot, stream)| {
            let description = format!("socket {slot}").into();
            let keep = Kind::Keep(Keep { slot, description });
            request(&keeper, keep, Some(stream.as_fd())).unwrap();
            stream
        })
        .collect();
    wait_to_be_killed();
}

/// Ends with the test's process at the latest.
fn wait_to_be_killed() {
    println!("\nall kept");
    let _ = std::io::stdin().read(&mut [0]);
}

/// Takes all sets of a role, and keeps none of them.
pub(super) fn take_all(path: &Path, role: &str) -> Result<Vec<Left>, KeeperError> {
    let mut taken = take(path, role)?;
    let sets = std::mem::take(&mut taken.sets);
    taken.confirm().map(|()| sets)
}
