//! Shards: threads with a runtime of their own each, and everything that belongs to their tunnels.
//! Values on a shard are `!Send` and never leave it. Where several processes share a thread, as in the
//! simulation, a shard is a task on the thread of its process.

use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::Poll;
use std::thread::JoinHandle;

use tokio::runtime::Builder;
use tokio::sync::watch;
use tokio::task::LocalSet;

use super::engine::{self, Engines, Ring};
use cpc_host::lifecycle::Pulse;
use cpc_host::report::report;

/// The shards of a process.
#[derive(Debug, Default)]
pub struct Shards {
    threads: Vec<JoinHandle<()>>,
    /// Whether the shards are tasks on the current thread.
    is_local: bool,
    /// Channels that close with their shard, however it ends.
    alive: Vec<watch::Receiver<()>>,
    /// Life signs of the shards.
    pulses: Vec<Pulse>,
    /// Engines of the shards that are not started yet.
    engines: Engines,
}

impl Shards {
    /// Creates an empty set; `engines` has enough for all shards.
    pub fn new(engines: Engines) -> Self {
        Self {
            engines,
            ..Self::default()
        }
    }

    /// Creates an empty set whose shards are tasks on the current thread's `LocalSet`.
    pub fn on_this_thread() -> Self {
        Self {
            is_local: true,
            ..Self::default()
        }
    }

    /// Returns the engines of the shards that are not started yet.
    pub fn engines(&self) -> &Engines {
        &self.engines
    }

    /// Starts another shard. `main` runs on its thread, may `spawn_local`, and ends the shard by
    /// returning.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn spawn<F>(&mut self, main: impl FnOnce() -> F + Send + 'static) -> io::Result<()>
    where
        F: Future<Output = ()> + 'static,
    {
        let (alive, ended) = watch::channel(());
        let pulse = Pulse::default();
        self.pulses.push(pulse.clone());
        self.alive.push(ended);
        let main = move || async move {
            let _alive = alive;
            pulse.start();
            main().await;
        };
        if self.is_local {
            tokio::task::spawn_local(main());
            return Ok(());
        }
        let name = format!("shard-{}", self.threads.len());
        let ring = self.engines.next_ring();
        self.threads.push(spawn(&name, ring, main)?);
        Ok(())
    }

    /// Returns the life signs of all shards.
    pub fn pulses(&self) -> Vec<Pulse> {
        self.pulses.clone()
    }

    /// Waits for the end of any shard.
    pub fn any_ended(&self) -> impl Future<Output = ()> + use<> {
        let ends = self.alive.iter().cloned().map(ended).map(Box::pin);
        let mut ends: Vec<_> = ends.collect();
        poll_fn(move |cx| {
            let is_over = ends.iter_mut().any(|end| end.as_mut().poll(cx).is_ready());
            if is_over {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
    }

    /// Waits for the end of all shards, which must be ending.
    pub async fn join(self) {
        if self.is_local {
            for alive in self.alive {
                ended(alive).await;
            }
        }
        for thread in self.threads {
            // A panic of the thread is already on standard error.
            let _ = thread.join();
        }
    }
}

async fn ended(mut alive: watch::Receiver<()>) {
    let mut changed = pin!(alive.changed());
    // Nothing is ever sent, so this is the end of the sender.
    let _ = changed.as_mut().await;
}

fn spawn<F>(
    name: &str,
    ring: Option<Ring>,
    main: impl FnOnce() -> F + Send + 'static,
) -> io::Result<JoinHandle<()>>
where
    F: Future<Output = ()>,
{
    let mut builder = Builder::new_current_thread();
    if ring.is_some() {
        builder.on_thread_park(engine::before_park);
    }
    let runtime = builder.enable_all().build()?;
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let ran =
                LocalSet::new().block_on(&runtime, engine::run(ring, async move || main().await));
            engine::leave();
            if let Err(error) = ran {
                // The end of a shard ends the process.
                tracing::error!(error = report(&error), "the shard's ring can't be used");
            }
            // Look-ups of names that still run on helper threads must not hold up the end.
            runtime.shutdown_background();
        })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn the_end_of_one_is_noticed() {
        let mut shards = Shards::default();
        let (first, gone) = oneshot::channel::<()>();
        let (second, gone_too) = oneshot::channel::<()>();
        for end in [gone, gone_too] {
            shards
                .spawn(move || async move { drop(end.await) })
                .unwrap();
        }
        let mut any = pin!(shards.any_ended());
        let early = timeout(Duration::from_millis(20), any.as_mut()).await;
        assert!(early.is_err());
        drop(first);
        any.await;
        drop(second);
        shards.join().await;
    }
}
