//! Assignment of tunnels to shards.

use std::io;
use std::net::SocketAddr;

use tokio::sync::mpsc;

use super::tunnel_task::{self, Dialers, TunnelTask};
use super::worker::Worker;
use cpc_datapath::shard::Shards;
use cpc_host::concurrency::{ConcurrencyLimit, Permit};

/// Channels to an agent's shards.
pub(super) struct Dispatch(Vec<ShardQueue>);

struct ShardQueue {
    tasks: mpsc::UnboundedSender<TunnelTask>,
    /// Tunnels on the shard, or on their way to it.
    tunnels: ConcurrencyLimit,
}

impl Dispatch {
    /// Starts `count` shards, each with its own `worker` and `dialers`.
    ///
    /// # Errors
    /// A thread can't be started.
    pub(super) fn start(
        shards: &mut Shards,
        count: usize,
        worker: &Worker,
        dialers: &Dialers,
    ) -> io::Result<Self> {
        let queues = (0..count).map(|_| {
            let (tasks, inbox) = mpsc::unbounded_channel();
            let (worker, dialers) = (worker.clone(), dialers.clone());
            shards.spawn(move || tunnel_task::run(worker, dialers, inbox))?;
            let tunnels = ConcurrencyLimit::new(usize::MAX);
            Ok(ShardQueue { tasks, tunnels })
        });
        Ok(Self(queues.collect::<io::Result<_>>()?))
    }

    /// Reserves a place for a tunnel to `address`: on a shard with the fewest of those in `held` to
    /// that address, and among these with the fewest of all. `held` has the address and shard of each
    /// tunnel.
    pub(super) fn place(
        &self,
        address: SocketAddr,
        held: impl Iterator<Item = (SocketAddr, usize)>,
    ) -> (usize, Option<Permit>) {
        let mut there = vec![0; self.0.len()];
        for (_, shard) in held.filter(|(to, _)| *to == address) {
            there[shard] += 1;
        }
        let load = |index: &usize| (there[*index], self.0[*index].tunnels.in_use());
        let index = (0..self.0.len()).min_by_key(load).unwrap_or_default();
        let permit = self.0.get(index).and_then(|queue| queue.tunnels.acquire());
        (index, permit)
    }

    /// Sends a task to shard `index`. A shard that has ended drops it: then the process is ending.
    pub(super) fn send(&self, index: usize, task: TunnelTask) {
        if let Some(queue) = self.0.get(index) {
            let _ = queue.tasks.send(task);
        }
    }
}
