//! The path of a tunnel, as any thread may read it.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// State of a path, which may change at any time.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// Address of the peer as this side sees it.
    pub remote: SocketAddr,
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Size of the largest sent IP packet, in bytes, where the tunnel decides on it.
    pub mtu: Option<u16>,
    /// Time since the last packet from the peer, including acknowledgements.
    pub since_packet: Duration,
    /// Time since the last message of the peer.
    pub since_data: Duration,
}

/// Reads a path, from any thread. Clones read the same path.
#[derive(Clone)]
pub struct Probe(Arc<dyn Fn() -> Path + Send + Sync>);

impl Probe {
    /// Creates a probe that calls `read`.
    pub fn new(read: impl Fn() -> Path + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    /// Returns the present state of the path.
    pub fn path(&self) -> Path {
        (self.0)()
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path().fmt(f)
    }
}
