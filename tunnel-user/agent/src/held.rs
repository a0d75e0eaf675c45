//! The tunnels that are held, for people.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::plan::Health;
use super::tunnel::About;
use cpc_transport::quic::PathView;

/// A tunnel, for people.
#[derive(Clone, Debug)]
pub(super) struct TunnelView {
    /// What it is.
    pub about: About,
    /// Where it lives.
    pub shard: usize,
    path: Option<Arc<PathView>>,
}

impl TunnelView {
    /// A fresh one.
    pub(super) fn new(about: About, path: Option<Arc<PathView>>, shard: usize) -> Self {
        Self { about, shard, path }
    }

    /// Round-trip time, where the protocol measures it.
    pub(super) fn rtt(&self) -> Option<Duration> {
        self.path.as_ref().map(|path| path.rtt())
    }

    /// The largest IP packet that is sent, in bytes, where we decide on it.
    pub(super) fn mtu(&self) -> Option<u16> {
        self.path.as_ref().map(|path| path.mtu())
    }
}

/// The tunnels that are held. Written by the connector, read anywhere.
#[derive(Debug, Default)]
pub(super) struct Tunnels {
    held: Mutex<HashMap<u64, TunnelView>>,
    server_count: AtomicU32,
}

impl Tunnels {
    /// All of them, by server.
    pub(super) fn view(&self) -> Vec<TunnelView> {
        let mut view: Vec<_> = self.held().values().cloned().collect();
        view.sort_by(|a, b| {
            let key = |view: &TunnelView| (view.about.server_id.clone(), view.about.way);
            key(a).cmp(&key(b))
        });
        view
    }

    /// How many servers are reached, each over one tunnel or several.
    pub(super) fn live_servers(&self) -> usize {
        let held = self.held();
        // One that drains serves until it leaves.
        let heard = |t: &&TunnelView| t.about.stats.health() != Health::Silent;
        let live = held.values().filter(heard);
        live.map(|t| &t.about.server_id)
            .collect::<HashSet<_>>()
            .len()
    }

    /// How many servers there are, as they say or by their leases.
    pub(super) fn server_count(&self) -> u32 {
        self.server_count.load(Ordering::Relaxed)
    }

    /// Notes how many servers there are.
    pub(super) fn set_server_count(&self, count: u32) {
        self.server_count.store(count, Ordering::Relaxed);
    }

    /// Notes a tunnel.
    pub(super) fn insert(&self, number: u64, view: TunnelView) {
        self.held().insert(number, view);
    }

    /// Notes its end.
    pub(super) fn remove(&self, number: u64) {
        self.held().remove(&number);
    }

    fn held(&self) -> MutexGuard<'_, HashMap<u64, TunnelView>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
