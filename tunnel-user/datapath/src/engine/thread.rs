//! The ring of a thread: its lookup, the delivery of its completions, and its end.
//!
//! tokio sleeps in epoll, which wakes up when the ring has completions or work for the kernel to
//! finish. The queue is submitted right before the thread sleeps.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::ring::Ring;

thread_local! {
    static RING: RefCell<Option<Rc<Ring>>> = const { RefCell::new(None) };
}

/// Returns the current thread's ring, if io_uring is its engine.
pub fn current() -> Option<Rc<Ring>> {
    RING.with_borrow(Clone::clone)
}

/// Submits the queue and fetches available completions, so that the thread need not sleep for them. For
/// tokio's `on_thread_park`.
pub(crate) fn before_park() {
    // `try_with`: tokio may park while the thread's own data is being dropped.
    let ring = RING.try_with(|ring| ring.borrow().clone()).ok().flatten();
    if let Some(ring) = ring {
        ring.turn();
    }
}

/// Runs `main` with `ring` as the thread's engine, on a `LocalSet` of a current-thread runtime that
/// calls [`before_park`]. After the `LocalSet` and all its sockets have been dropped, call
/// [`leave`].
pub(crate) async fn run<T>(ring: Option<Ring>, main: impl AsyncFnOnce() -> T) -> io::Result<T> {
    let Some(ring) = ring else {
        return Ok(main().await);
    };
    ring.enable()?;
    let ring = Rc::new(ring);
    RING.replace(Some(ring.clone()));
    // SAFETY: the ring keeps its descriptor for as long as it lives, and is held here.
    let readable = unsafe { AsyncFd::register_with_interest(Readable(ring), Interest::READABLE) };
    let reaper = tokio::task::spawn_local(reap(readable?));
    let done = main().await;
    reaper.abort();
    Ok(done)
}

/// Ends the thread's ring, after its sockets: cancels the operations in flight and waits for them.
pub(crate) fn leave() {
    RING.replace(None);
}

async fn reap(ring: AsyncFd<Readable>) {
    // An error means that the reactor is gone, and then so is everything else.
    while let Ok(mut ready) = ring.readable().await {
        // Before the ring is read: later completions wake again (epoll(7), edge-triggered).
        ready.clear_ready();
        ring.get_ref().0.turn();
    }
}

struct Readable(Rc<Ring>);

impl AsRawFd for Readable {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
