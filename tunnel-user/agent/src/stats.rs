//! Statistics of a tunnel.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::Notify;
use tunnel_proto::resumption::SessionId;
use tunnel_proto::route::Claim;
use tunnel_proto::session::Refusal;

use super::plan::Health;
use cpc_observe::access::Totals;

/// Statistics of a tunnel. Its task writes them, any thread reads.
#[derive(Debug)]
pub struct TunnelStats {
    /// Start of the tunnel.
    pub(super) since: SystemTime,
    /// Whether the server has not been heard for too long.
    pub(super) silent: AtomicBool,
    /// Whether the server drains.
    pub(super) draining: AtomicBool,
    /// Open streams.
    pub(super) streams: AtomicI64,
    /// Bytes over the tunnel.
    pub(super) totals: Totals,
    /// Claims that the server refused.
    pub(super) refused: Mutex<Vec<Refusal>>,
    /// Claims that the server accepted.
    pub(super) accepted: Mutex<Vec<String>>,
    /// Sessions that the server wants to continue over another tunnel.
    moved: Mutex<HashSet<SessionId>>,
    /// Notification of these.
    has_moved: Notify,
}

impl TunnelStats {
    /// Creates the statistics of a fresh tunnel, with the server's verdict on our offer.
    pub fn new(accepted: &[Claim], refused: Vec<Refusal>) -> Self {
        let stats = Self {
            since: SystemTime::now(),
            silent: AtomicBool::default(),
            draining: AtomicBool::default(),
            streams: AtomicI64::default(),
            totals: Totals::default(),
            refused: Mutex::default(),
            accepted: Mutex::default(),
            moved: Mutex::default(),
            has_moved: Notify::new(),
        };
        stats.set_verdict(accepted, refused);
        stats
    }

    /// Sets the server's verdict on our offer.
    pub(super) fn set_verdict(&self, accepted: &[Claim], refused: Vec<Refusal>) {
        let accepted = accepted.iter().map(ToString::to_string).collect();
        *self.accepted.lock().unwrap_or_else(PoisonError::into_inner) = accepted;
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = refused;
    }

    /// Notes that the server, or the agent for its part, drains.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Notes a session that the server wants to continue over another tunnel.
    pub(super) fn move_away(&self, id: SessionId) {
        let mut moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        moved.insert(id);
        self.has_moved.notify_one();
    }

    /// Waits for such sessions.
    pub(super) async fn moved(&self) -> HashSet<SessionId> {
        self.has_moved.notified().await;
        std::mem::take(&mut *self.moved.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the state of the server.
    pub(super) fn health(&self) -> Health {
        if self.silent.load(Ordering::Relaxed) {
            Health::Silent
        } else if self.draining.load(Ordering::Relaxed) {
            Health::Draining
        } else {
            Health::Live
        }
    }
}

/// One stream, counted on its tunnel until dropped.
pub(super) struct OnTunnel(Arc<TunnelStats>);

impl OnTunnel {
    /// Counts one stream.
    pub(super) fn new(stats: Arc<TunnelStats>) -> Self {
        stats.streams.fetch_add(1, Ordering::Relaxed);
        Self(stats)
    }
}

impl std::ops::Deref for OnTunnel {
    type Target = TunnelStats;

    fn deref(&self) -> &TunnelStats {
        &self.0
    }
}

impl Drop for OnTunnel {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}
