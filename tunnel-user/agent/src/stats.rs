//! Statistics of a tunnel.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tunnel_proto::route::Claim;
use tunnel_proto::session::Refusal;

use super::plan::Health;
use cpc_observe::access::Totals;

/// Statistics of a tunnel. Its task writes them, any thread reads.
#[derive(Debug)]
pub(super) struct TunnelStats {
    /// Start of the tunnel.
    pub since: SystemTime,
    /// Whether the server has not been heard for too long.
    pub silent: AtomicBool,
    /// Whether the server drains.
    pub draining: AtomicBool,
    /// Open streams.
    pub streams: AtomicI64,
    /// Bytes over the tunnel.
    pub totals: Totals,
    /// Claims that the server refused.
    pub refused: Mutex<Vec<Refusal>>,
    /// Claims that the server accepted.
    pub accepted: Mutex<Vec<String>>,
}

impl TunnelStats {
    /// Creates the statistics of a fresh tunnel, with the server's verdict on our offer.
    pub(super) fn new(accepted: &[Claim], refused: Vec<Refusal>) -> Self {
        let stats = Self {
            since: SystemTime::now(),
            silent: AtomicBool::default(),
            draining: AtomicBool::default(),
            streams: AtomicI64::default(),
            totals: Totals::default(),
            refused: Mutex::default(),
            accepted: Mutex::default(),
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
