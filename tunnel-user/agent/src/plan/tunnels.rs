//! The tunnels that a plan holds.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tunnel_proto::session::InstanceId;

/// A tunnel.
#[derive(Debug)]
pub(super) struct TunnelEntry {
    pub tunnel: u64,
    pub instance: Option<InstanceId>,
    pub address: SocketAddr,
    pub since: Instant,
    /// Whether the tunnel is obsolete once a native one reaches the same server.
    pub fallback: bool,
    /// Whether its server is heard.
    pub live: bool,
    /// Whether its server drains.
    pub draining: bool,
}

/// Tunnels by server; a server without tunnels has no entry.
pub(super) type Tunnels = BTreeMap<Arc<str>, Vec<TunnelEntry>>;

/// Iterates over all tunnels with their server.
pub(super) fn all(tunnels: &Tunnels) -> impl Iterator<Item = (&Arc<str>, &TunnelEntry)> {
    let each = |(server, held)| std::iter::repeat(server).zip(held);
    tunnels.iter().flat_map(each)
}

pub(super) fn live(tunnels: &Tunnels) -> impl Iterator<Item = (&Arc<str>, &TunnelEntry)> {
    all(tunnels).filter(|(_, held)| held.live)
}

/// Iterates over servers with a live tunnel.
pub(super) fn reached(tunnels: &Tunnels) -> impl Iterator<Item = &Arc<str>> {
    let live = tunnels
        .iter()
        .filter(|(_, held)| held.iter().any(|held| held.live));
    live.map(|(server, _)| server)
}

pub(super) fn is_reached(tunnels: &Tunnels, server: &str) -> bool {
    let mut held = tunnels.get(server).into_iter().flatten();
    held.any(|held| held.live)
}

/// Removes a tunnel.
pub(super) fn take(tunnels: &mut Tunnels, server: &str, tunnel: u64) -> Option<TunnelEntry> {
    let held = tunnels.get_mut(server)?;
    let at = held.iter().position(|held| held.tunnel == tunnel)?;
    let taken = held.remove(at);
    if held.is_empty() {
        tunnels.remove(server);
    }
    Some(taken)
}
