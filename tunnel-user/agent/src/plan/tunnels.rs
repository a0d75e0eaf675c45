//! The tunnels that a plan holds.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tunnel_proto::session::InstanceId;

/// A tunnel.
#[derive(Debug)]
pub(super) struct Held {
    pub tunnel: u64,
    pub instance: Option<InstanceId>,
    pub address: SocketAddr,
    pub since: Instant,
    /// It is no longer wanted once QUIC reaches the same server.
    pub fallback: bool,
    /// Its server is heard.
    pub live: bool,
    /// Its server is about to leave.
    pub draining: bool,
}

/// The tunnels that are held, by server; for none there is no entry.
pub(super) type Tunnels = HashMap<Arc<str>, Vec<Held>>;

/// Every tunnel and its server.
pub(super) fn all(tunnels: &Tunnels) -> impl Iterator<Item = (&Arc<str>, &Held)> {
    let each = |(server, held)| std::iter::repeat(server).zip(held);
    tunnels.iter().flat_map(each)
}

pub(super) fn live(tunnels: &Tunnels) -> impl Iterator<Item = (&Arc<str>, &Held)> {
    all(tunnels).filter(|(_, held)| held.live)
}

/// Servers with a live tunnel.
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

/// Takes a tunnel out.
pub(super) fn take(tunnels: &mut Tunnels, server: &str, tunnel: u64) -> Option<Held> {
    let held = tunnels.get_mut(server)?;
    let at = held.iter().position(|held| held.tunnel == tunnel)?;
    let taken = held.remove(at);
    if held.is_empty() {
        tunnels.remove(server);
    }
    Some(taken)
}
