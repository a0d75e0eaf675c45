//! The tunnels that are held, for people.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::tunnel::{About, Tunnel};

/// A tunnel, for people.
#[derive(Clone, Debug)]
pub(super) struct TunnelView {
    /// What it is.
    pub about: About,
    path: Option<quinn::Connection>,
}

impl TunnelView {
    /// Round-trip time, where the protocol measures it.
    pub(super) fn rtt(&self) -> Option<Duration> {
        self.path.as_ref().map(quinn::Connection::rtt)
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

    /// Whether a server is reached.
    pub(super) fn any_live(&self) -> bool {
        self.held()
            .values()
            .any(|tunnel| tunnel.about.stats.is_live())
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
    pub(super) fn insert(&self, number: u64, tunnel: &Tunnel) {
        let view = TunnelView {
            about: tunnel.about().clone(),
            path: tunnel.path(),
        };
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
