//! The keeper of this process, which may come and go.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Once};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use prost::Message;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tunnel_proto::handover::KeptProcess;

use super::error::HandoverError;
use super::kept::Survivor;
use super::restored::understood;
use super::store::{nanoseconds, since_boot};
use cpc_datapath::kept::entry;
use cpc_datapath::peek::{Peeking, probe};
use cpc_host::report::report;
use cpc_keeper::{Keeper, KeeperError, Slot, Taken, take};
use cpc_observe::admin::status::{Keeper as KeeperState, PeekOffset};

/// Interval of looks at the keeper.
const LOOK: Duration = Duration::from_secs(1);

/// Number of sockets that are given to the keeper before it is waited for.
const PORTION: usize = 1024;

/// Lifetime in nanoseconds below which a process may have been killed by what it took from the keeper.
const SHORT: u64 = 500_000_000;

/// Maximum number of such processes in a row.
const MAX_FAILURES: u32 = 5;

/// Maximum length of a role in bytes.
const MAX_ROLE: usize = 64;

/// Place of a keeper, and the promises to it.
#[derive(Clone, Debug)]
pub struct KeeperSpec {
    path: PathBuf,
    role: String,
    patience: Duration,
}

impl KeeperSpec {
    /// Names the keeper at `path` to a process of `role` with the identity `name`. It keeps the sockets of a dead
    /// process for `patience`.
    pub fn new(path: PathBuf, role: &str, name: &str, patience: Duration) -> Self {
        let mut role = format!("{role} {name}");
        role.truncate(role.floor_char_boundary(MAX_ROLE));
        Self {
            path,
            role,
            patience,
        }
    }

    /// Names the same keeper to the listeners of the process, which it keeps for at most `patience`.
    pub(super) fn for_listeners(mut self, patience: Duration) -> Self {
        self.role.insert_str(0, "listeners of ");
        self.role.truncate(self.role.floor_char_boundary(MAX_ROLE));
        self.patience = self.patience.min(patience);
        self
    }

    /// Returns the path of the keeper's socket.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the role under which the keeper knows the sockets.
    pub(super) fn role(&self) -> &str {
        &self.role
    }

    /// Returns the time for which the keeper holds the sockets of a dead process.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }
}

/// Handle of the keeper, for any thread.
#[derive(Clone, Debug, Default)]
pub struct KeeperHandle {
    spec: Option<Arc<KeeperSpec>>,
    current: Arc<ArcSwapOption<Keeper>>,
    /// Whether nothing is to be kept any more.
    is_closed: Arc<AtomicBool>,
    /// Number of processes in a row that were killed as soon as they had begun.
    failures: Arc<AtomicU32>,
}

impl KeeperHandle {
    /// Creates the handle of a keeper that is not there yet.
    pub fn new(spec: Option<KeeperSpec>) -> Self {
        Self {
            spec: spec.map(Arc::new),
            current: Arc::default(),
            is_closed: Arc::default(),
            failures: Arc::default(),
        }
    }

    /// Whether the keeper is there, as far as this process has noticed. Costs no system call.
    pub fn is_there(&self) -> bool {
        self.spec.is_some() && self.current.load().as_ref().is_some_and(|it| !it.is_gone())
    }

    /// Returns the state of the keeper, and the number of sockets that it has of this process.
    pub fn state(&self) -> (KeeperState, usize) {
        match (&self.spec, &*self.current.load()) {
            (None, _) => (KeeperState::Unconfigured, 0),
            (Some(_), Some(keeper)) if keeper.is_there() => (KeeperState::Live, keeper.kept()),
            (Some(_), _) => (KeeperState::Missing, 0),
        }
    }

    /// Gives the keeper a copy of a socket of which so many bytes were taken, and whose end of file was passed on or
    /// not. Returns `None` if it is not kept.
    pub fn keep(
        &self,
        description: Vec<u8>,
        (consumed, is_finished): (u64, bool),
        socket: BorrowedFd<'_>,
    ) -> Option<Slot> {
        let current = self.current.load();
        let keeper = current.as_ref()?;
        keeper.keep(description, entry(consumed, is_finished), socket)
    }

    /// Takes what dead processes of this role have left with the keeper. Returns `None` if there is none, or no
    /// keeper. `is_client` tells whether local sockets are those of clients, or of targets; of each at most `most`
    /// bytes were kept.
    pub fn take(&self, is_client: bool, most: u64) -> Option<Found> {
        let spec = self.spec.as_ref()?;
        let found = take(&spec.path, &spec.role).map_err(HandoverError::from);
        found
            .and_then(|taken| self.open_sets(taken, (is_client, most)))
            .unwrap_or_else(|error| {
                tracing::warn!(
                    error = report(&error),
                    "no connection of an earlier process is found"
                );
                None
            })
    }

    /// Begins to keep the sockets of this process. A keeper that is not there is only logged: it may come.
    pub fn open(&self, process: &KeptProcess) {
        self.is_closed.store(false, Ordering::Relaxed);
        if let Err(error) = self.try_open(process) {
            tracing::warn!(
                error = report(&error),
                "no keeper: a crash of this process would end its connections"
            );
        }
    }

    fn try_open(&self, process: &KeptProcess) -> Result<(), KeeperError> {
        let Some(spec) = &self.spec else {
            return Ok(());
        };
        let process = KeptProcess {
            began_at: since_boot().map_or(0, nanoseconds),
            failures: self.failures.load(Ordering::Relaxed),
            ..process.clone()
        };
        let process = process.encode_to_vec();
        let keeper = Keeper::open(&spec.path, &spec.role, &process, spec.patience)?;
        tell_versions();
        self.current.store(Some(Arc::new(keeper)));
        Ok(())
    }

    /// Connects again to a keeper that was restarted, until dropped.
    pub async fn watch(self, process: KeptProcess) {
        while self.spec.is_some() {
            sleep(LOOK).await;
            let is_there = self.current.load().as_ref().is_some_and(|it| it.is_there());
            if is_there || self.is_closed.load(Ordering::Relaxed) {
                continue;
            }
            let (handle, process) = (self.clone(), process.clone());
            let opened = spawn_blocking(move || handle.try_open(&process)).await;
            if self.is_closed.load(Ordering::Relaxed) {
                // Meanwhile a handover has begun.
                self.discard();
            } else if matches!(opened, Ok(Ok(()))) {
                tracing::info!("the keeper is there");
            }
        }
    }

    /// Ends the keeping, before another process uses the sockets or this one ends. Waits until the keeper has
    /// closed them.
    pub fn discard(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
        if let Some(keeper) = self.current.swap(None)
            && !keeper.discard()
        {
            tracing::warn!("the keeper has not closed its copies of the sockets in time");
        }
    }

    /// Waits until the keeper has what it was given.
    fn flush(&self) {
        if let Some(keeper) = &*self.current.load() {
            keeper.flush();
        }
    }
}

/// The connections of a process that was killed.
#[derive(Debug)]
pub struct Found {
    /// Id of the process.
    pub instance: Bytes,
    /// Number of processes that had the id before.
    pub incarnation: u64,
    /// The connections.
    pub survivors: Vec<Survivor>,
    taken: Taken,
}

impl Found {
    /// Keeps the connections for this process, which `keeper` knows. Returns them with their copies in the keeper.
    pub fn keep(self, keeper: &KeeperHandle) -> Vec<(Survivor, Option<Slot>)> {
        let mut kept = Vec::with_capacity(self.survivors.len());
        for survivor in self.survivors {
            let description = survivor.description.to_vec();
            let is_open = survivor.connection.socket.is_some();
            let socket = survivor.descriptor.as_fd();
            let slot = is_open.then(|| keeper.keep(description, survivor.consumed, socket));
            kept.push((survivor, slot.flatten()));
            if kept.len() % PORTION == 0 {
                keeper.flush();
            }
        }
        keeper.flush();
        if let Err(error) = self.taken.confirm() {
            let error = report(&error);
            tracing::warn!(error, "the keeper may hold sockets of an earlier process");
        }
        kept
    }
}

/// Returns the number of failures in a row, with the process that is dead for `dead` nanoseconds.
fn failures(process: &KeptProcess, now: u64, dead: u64) -> u32 {
    let lifetime = now.saturating_sub(dead).saturating_sub(process.began_at);
    match lifetime < SHORT {
        true => process.failures.saturating_add(1),
        false => 0,
    }
}

/// Returns the address families over which kept bytes are copied once.
pub fn peek_offset() -> PeekOffset {
    static FOUND: LazyLock<PeekOffset> = LazyLock::new(|| {
        let (ipv4, ipv6) = probe();
        PeekOffset {
            ipv4: ipv4 == Peeking::Offset,
            ipv6: ipv6 == Peeking::Offset,
        }
    });
    *FOUND
}

/// Logs, once, how the kernel keeps bytes.
fn tell_versions() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        tracing::info!("connections outlive a crash: a keeper has copies of them");
        let PeekOffset { ipv4, ipv6 } = peek_offset();
        if !ipv4 || !ipv6 {
            tracing::info!(
                ipv4,
                ipv6,
                "the kernel copies the bytes of kept connections more than once (SO_PEEK_OFF: Linux 6.10 for \
                 IPv4, 6.12 for IPv6)"
            );
        }
    });
}

impl KeeperHandle {
    fn open_sets(
        &self,
        mut taken: Taken,
        limits: (bool, u64),
    ) -> Result<Option<Found>, HandoverError> {
        let mut sets = std::mem::take(&mut taken.sets);
        let Some(last) = sets.last() else {
            return Ok(None);
        };
        let process = KeptProcess::decode(&*last.process)?;
        let dead = nanoseconds(last.dead_for);
        let failures = failures(&process, since_boot().map_or(0, nanoseconds), dead);
        self.failures.store(failures, Ordering::Relaxed);
        if failures > MAX_FAILURES {
            tracing::error!(
                processes = failures,
                "processes were killed as soon as they had taken the connections: these end"
            );
            self.failures.store(0, Ordering::Relaxed);
            drop(sets);
            taken.confirm()?;
            return Ok(None);
        }
        let KeptProcess {
            instance,
            incarnation,
            ..
        } = process;
        // Two sets have the same connection where a process was killed before it had confirmed what it took.
        let mut ids = HashSet::new();
        let mut survivors = Vec::new();
        while let Some(left) = sets.pop() {
            let process = KeptProcess::decode(&*left.process)?;
            if process.instance != instance {
                continue;
            }
            let waited = nanoseconds(left.dead_for);
            let table = left.table;
            let restored = left.kept.into_iter().map(|kept| {
                let entry = table.entry(kept.slot).unwrap_or_default();
                Survivor::restore(kept, entry, waited, limits)
            });
            let restored = understood(restored).into_iter();
            survivors.extend(restored.filter(|it| ids.insert(it.id())));
        }
        if survivors.is_empty() {
            // A process without connections needs no name of another one.
            taken.confirm()?;
            return Ok(None);
        }
        Ok(Some(Found {
            instance,
            incarnation: incarnation.saturating_add(1),
            survivors,
            taken,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_that_are_killed_at_once_are_counted() {
        let process = |failures| KeptProcess {
            began_at: 10 * SHORT,
            failures,
            ..KeptProcess::default()
        };
        let now = 13 * SHORT;
        assert_eq!(failures(&process(2), now, 3 * SHORT - 1), 3);
        assert_eq!(failures(&process(2), now, 2 * SHORT), 0);
        // A clock that went back is no reason to give up.
        assert_eq!(failures(&process(0), 0, SHORT), 1);
    }

    #[test]
    fn a_role_fits() {
        let spec = |name: &str| KeeperSpec::new("/k".into(), "agent", name, LOOK).role;
        assert_eq!(spec("w1"), "agent w1");
        assert!(spec(&"\u{e4}".repeat(64)).len() <= MAX_ROLE);
    }
}
