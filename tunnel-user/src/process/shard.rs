//! A shard: a thread with a runtime of its own, and everything that belongs to its tunnels. What
//! lives on a shard is `!Send` and never leaves it.

use std::io;
use std::thread::JoinHandle;

use tokio::runtime::Builder;
use tokio::task::LocalSet;

/// Starts a shard. `main` runs on its thread, may `spawn_local`, and ends the shard by returning.
///
/// # Errors
/// When no thread can be had.
pub fn spawn<F>(name: &str, main: impl FnOnce() -> F + Send + 'static) -> io::Result<JoinHandle<()>>
where
    F: Future<Output = ()>,
{
    let runtime = Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            LocalSet::new().block_on(&runtime, main());
            // Look-ups of names that still run on helper threads must not hold up the end.
            runtime.shutdown_background();
        })
}
