//! The held tunnels, for status and metrics.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::plan::Health;
use super::tunnel_info::TunnelInfo;
use cpc_transport::tunnel::Probe;

/// A tunnel, for status and metrics.
#[derive(Clone, Debug)]
pub(super) struct TunnelView {
    /// Description of the tunnel.
    pub info: TunnelInfo,
    /// Shard of the tunnel.
    pub shard: usize,
    probe: Option<Probe>,
}

impl TunnelView {
    /// Creates the view of a fresh tunnel.
    pub(super) fn new(info: TunnelInfo, probe: Option<Probe>, shard: usize) -> Self {
        Self { info, shard, probe }
    }

    /// Returns the round-trip time, where the protocol measures it.
    pub(super) fn rtt(&self) -> Option<Duration> {
        self.probe.as_ref().map(|probe| probe.path().rtt)
    }

    /// Returns the size of the largest sent IP packet, in bytes, where our transport decides on it.
    pub(super) fn mtu(&self) -> Option<u16> {
        self.probe.as_ref().and_then(|probe| probe.path().mtu)
    }
}

/// The held tunnels. The connector writes them, any thread reads.
#[derive(Debug, Default)]
pub(super) struct Tunnels {
    held: Mutex<HashMap<u64, TunnelView>>,
    server_count: AtomicU32,
}

impl Tunnels {
    /// Returns all tunnels, by server.
    pub(super) fn view(&self) -> Vec<TunnelView> {
        let mut view: Vec<_> = self.held().values().cloned().collect();
        view.sort_by(|a, b| {
            let key = |view: &TunnelView| (view.info.server_id.clone(), view.info.endpoint);
            key(a).cmp(&key(b))
        });
        view
    }

    /// Returns the number of connected servers, each over one tunnel or several.
    pub(super) fn live_servers(&self) -> usize {
        let held = self.held();
        // One that drains serves until it leaves.
        let heard = |t: &&TunnelView| t.info.stats.health() != Health::Silent;
        let live = held.values().filter(heard);
        live.map(|t| &t.info.server_id)
            .collect::<HashSet<_>>()
            .len()
    }

    /// Returns the number of servers, according to the servers or their leases.
    pub(super) fn server_count(&self) -> u32 {
        self.server_count.load(Ordering::Relaxed)
    }

    /// Sets the number of servers.
    pub(super) fn set_server_count(&self, count: u32) {
        self.server_count.store(count, Ordering::Relaxed);
    }

    /// Adds a tunnel.
    pub(super) fn insert(&self, number: u64, view: TunnelView) {
        self.held().insert(number, view);
    }

    /// Removes a tunnel.
    pub(super) fn remove(&self, number: u64) {
        self.held().remove(&number);
    }

    fn held(&self) -> MutexGuard<'_, HashMap<u64, TunnelView>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
