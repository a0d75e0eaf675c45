//! File descriptors: the share of `RLIMIT_NOFILE` of each part of a process, and the refusal of
//! connections when none is left.
//!
//! Every listener has a share of its own, so that clients take nothing from the admin port. The process
//! keeps one spare descriptor. A listener that fails to accept for want of a descriptor closes the
//! spare, accepts the waiting connections and closes them. So clients are refused instead of hanging.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};
use tokio::time::sleep;

use crate::report::report;

/// Pause of a listener after a failed accept.
const REST: Duration = Duration::from_millis(100);

/// Pause of a listener after it refused the waiting connections.
const SHORT_REST: Duration = Duration::from_millis(10);

/// Maximum number of connections that one failed accept refuses.
const REFUSED_AT_ONCE: usize = 256;

/// Shares of the parts of a process, in descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Connections of clients (server) or to targets (agent).
    pub connections: usize,
    /// Clients whose request has not arrived yet.
    pub waiting: usize,
    /// Concurrent handshakes at a TCP port.
    pub handshakes: usize,
    /// Connections of an HTTP listener.
    pub http: usize,
}

/// Listeners beside the frontends, each of which takes a share.
#[derive(Clone, Copy, Debug, Default)]
pub struct Listeners {
    /// HTTP: admin, health.
    pub http: usize,
    /// TCP with TLS.
    pub tls: usize,
}

/// Descriptors of an idle process, and of the files that it opens now and then.
const OWN: usize = 64;

/// Maximum number of connections of an HTTP listener.
const MOST_HTTP: usize = 256;

/// Divisor: each of several purposes gets this part of all descriptors.
const PART: usize = 32;

impl Shares {
    /// Divides `limit` descriptors.
    pub fn of(limit: usize, listeners: Listeners) -> Self {
        let part = limit / PART;
        let http = part.clamp(4, MOST_HTTP);
        let handshakes = (part / 2).clamp(4, 1024);
        let waiting = (4 * part).clamp(8, 1024);
        let others = http * listeners.http + handshakes * listeners.tls + waiting;
        let own = OWN + limit / 64;
        Self {
            connections: limit.saturating_sub(own + others).max(1),
            waiting,
            handshakes,
            http,
        }
    }

    /// Divides the descriptors that this process may open.
    pub fn of_process(listeners: Listeners) -> Self {
        Self::of(limit(), listeners)
    }
}

/// Returns the number of descriptors that this process may open.
pub fn limit() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).ok();
    let soft = limit.and_then(|(soft, _)| usize::try_from(soft).ok());
    soft.unwrap_or(usize::MAX)
}

static SPARE: Mutex<Option<OwnedFd>> = Mutex::new(None);

static REFUSED: AtomicU64 = AtomicU64::new(0);

/// Opens the spare descriptor. Called before the process serves.
pub fn set_spare_aside() {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    if spare.is_none() {
        *spare = io::stderr().as_fd().try_clone_to_owned().ok();
    }
}

/// Closes the spare descriptor, so that `take` can open another one. Returns `None` without a
/// spare. The next [`set_spare_aside`] opens it again.
pub fn lend_spare<T>(take: impl FnOnce() -> T) -> Option<T> {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    spare.take()?;
    Some(take())
}

/// Returns the number of connections that were refused because no descriptor was left.
pub fn refused() -> u64 {
    REFUSED.load(Ordering::Relaxed)
}

/// Whether a call failed because no descriptor was left.
pub fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Pauses after a failed accept, which would otherwise repeat in a busy loop. Without free descriptors
/// the connections that wait at `listener` get `answer` and are closed.
pub async fn after_failed_accept(
    listener: &impl AsFd,
    name: &str,
    error: &io::Error,
    answer: &[u8],
) {
    if !is_exhausted(error) {
        tracing::warn!(name, error = report(error), "can't accept");
        return sleep(REST).await;
    }
    let refused = refuse_waiting(listener, answer);
    REFUSED.fetch_add(refused, Ordering::Relaxed);
    tracing::warn!(
        name,
        refused,
        error = report(error),
        "no file descriptor is left for a connection; raise LimitNOFILE (ulimit -n), or lower limits.connections"
    );
    sleep(if refused > 0 { SHORT_REST } else { REST }).await;
}

/// Closes the spare descriptor, then accepts and closes the waiting connections. Returns their number.
fn refuse_waiting(listener: &impl AsFd, answer: &[u8]) -> u64 {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    let listener = listener.as_fd().as_raw_fd();
    spare.take();
    let refused = (0..REFUSED_AT_ONCE).map_while(|_| {
        let socket = accept(listener)?;
        if !answer.is_empty() {
            // One that takes nothing is not waited for.
            let _ = nix::sys::socket::send(
                socket.as_raw_fd(),
                answer,
                nix::sys::socket::MsgFlags::MSG_DONTWAIT | nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
            );
        }
        Some(())
    });
    let refused = refused.count() as u64;
    *spare = io::stderr().as_fd().try_clone_to_owned().ok();
    refused
}

fn accept(listener: i32) -> Option<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: without an address the call writes no memory.
    let accepted =
        unsafe { libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), flags) };
    // SAFETY: the descriptor is new and has no other owner.
    (accepted >= 0).then(|| unsafe { OwnedFd::from_raw_fd(accepted) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: Listeners = Listeners { http: 3, tls: 3 };

    fn sum(shares: &Shares, listeners: Listeners) -> usize {
        shares.connections
            + shares.waiting
            + shares.http * listeners.http
            + shares.handshakes * listeners.tls
    }

    #[test]
    fn shares_leave_room_for_the_process_itself() {
        for limit in [256, 512, 1024, 20_000, 65_536, 1 << 20] {
            for listeners in [SERVER, Listeners::default()] {
                let shares = Shares::of(limit, listeners);
                let own = limit - sum(&shares, listeners);
                assert!(own >= OWN, "{limit}: {shares:?} leave {own}");
                assert!(shares.connections > limit / 8, "{limit}: {shares:?}");
            }
        }
    }

    #[test]
    fn the_defaults_fit_into_the_usual_limits() {
        let two = Listeners { http: 2, tls: 1 };
        assert!(Shares::of(20_000, two).connections >= 16_000);
        assert!(Shares::of(65_536, SERVER).connections >= 48_000);
    }

    #[test]
    fn a_tiny_limit_still_serves_somebody() {
        let shares = Shares::of(16, SERVER);
        assert_eq!(shares.connections, 1);
        assert!(shares.http > 0 && shares.handshakes > 0);
    }

    #[tokio::test]
    async fn who_waits_is_refused_with_an_answer() {
        use std::io::Read;
        use std::os::unix::net::{UnixListener, UnixStream};
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        set_spare_aside();
        let mut waiting: Vec<_> = (0..3)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        let before = refused();
        let error = io::Error::from_raw_os_error(libc::EMFILE);
        after_failed_accept(&listener, "x", &error, b"no").await;
        for socket in &mut waiting {
            let mut answer = String::new();
            socket.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "no");
        }
        assert_eq!(refused() - before, 3);
        assert!(SPARE.lock().unwrap().is_some());
    }
}
