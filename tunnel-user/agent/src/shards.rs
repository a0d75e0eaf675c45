//! Assignment of tunnels to shards.

use std::io;
use std::net::SocketAddr;

use tokio::sync::mpsc;

use super::tunnel_task::{self, Errand};
use super::worker::Worker;
use cpc_datapath::shard::Shards;
use cpc_host::concurrency::{Entered, Gate};

/// Channels to an agent's shards.
pub(super) struct Dispatch(Vec<Way>);

struct Way {
    errands: mpsc::UnboundedSender<Errand>,
    /// Tunnels on the shard, or on their way to it.
    tunnels: Gate,
}

impl Dispatch {
    /// Starts `count` shards, each with its own `worker`.
    ///
    /// # Errors
    /// A thread can't be started.
    pub(super) fn start(shards: &mut Shards, count: usize, worker: &Worker) -> io::Result<Self> {
        let ways = (0..count).map(|_| {
            let (errands, inbox) = mpsc::unbounded_channel();
            let worker = worker.clone();
            shards.spawn(move || tunnel_task::run(worker, inbox))?;
            let tunnels = Gate::new(usize::MAX);
            Ok(Way { errands, tunnels })
        });
        Ok(Self(ways.collect::<io::Result<_>>()?))
    }

    /// Reserves a place for a tunnel to `address`: on a shard with the fewest of those in `held` to
    /// that address, and among these with the fewest of all. `held` has the address and shard of each
    /// tunnel.
    pub(super) fn place(
        &self,
        address: SocketAddr,
        held: impl Iterator<Item = (SocketAddr, usize)>,
    ) -> (usize, Option<Entered>) {
        let mut there = vec![0; self.0.len()];
        for (_, shard) in held.filter(|(to, _)| *to == address) {
            there[shard] += 1;
        }
        let load = |index: &usize| (there[*index], self.0[*index].tunnels.inside());
        let index = (0..self.0.len()).min_by_key(load).unwrap_or_default();
        let entered = self.0.get(index).and_then(|way| way.tunnels.enter());
        (index, entered)
    }

    /// Sends an errand to shard `index`. A shard that has ended drops it: then the process is ending.
    pub(super) fn send(&self, index: usize, errand: Errand) {
        if let Some(way) = self.0.get(index) {
            let _ = way.errands.send(errand);
        }
    }
}
