//! Test harness for either engine.

use tokio::runtime::Builder;
use tokio::task::LocalSet;

use super::Ring;
use super::thread::{before_park, leave, run};

/// Creates a ring. Returns `None` where the kernel refuses it, which fails in CI.
pub(crate) fn ring() -> Option<Ring> {
    let ring = Ring::new();
    if let Err(error) = &ring {
        let is_ci = std::env::var_os("CI").is_some();
        assert!(!is_ci, "CI has to test io_uring: {error}");
        eprintln!("skipped: no io_uring: {error}");
    }
    ring.ok()
}

/// Runs a test as a shard with `ring`, or on epoll, from start to end.
pub(crate) fn run_on<T>(ring: Option<Ring>, test: impl AsyncFnOnce() -> T) -> T {
    let mut builder = Builder::new_current_thread();
    let runtime = builder.on_thread_park(before_park).enable_all().build();
    let runtime = runtime.unwrap();
    let ran = LocalSet::new().block_on(&runtime, run(ring, test));
    leave();
    ran.unwrap()
}

/// Runs a test on both engines.
pub(crate) fn on_each(test: impl AsyncFn()) {
    run_on(None, &test);
    if let Some(ring) = ring() {
        run_on(Some(ring), &test);
    }
}
