//! Engines: how a shard learns that bytes have come, and fetches them.
//!
//! * **epoll**, tokio's own: the kernel says that a socket is readable, and it is read. Always there.
//! * **io_uring**: one ring a shard, on which receives of its TCP and UDP sockets stay in flight. The
//!   kernel puts what arrives into buffers that it was given, and one system call fetches all of it.
//!
//! A relay sees neither: [`Socket`] is a [`LocalSocket`](super::LocalSocket) over the engine of its
//! shard. accept(2), connect(2), TLS and Unix sockets stay with epoll, and so does the sleeping: the
//! ring is one more file descriptor of tokio's.

mod buffers;
mod probe;
pub mod ring;
mod socket;
mod tcp;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod thread;

use std::fmt;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use cpc_config::datapath::EngineChoice;

pub use ring::Ring;
pub use socket::{Socket, packed};
pub use tcp::Packed;
pub use thread::current;
pub(crate) use thread::{before_park, leave, run};

/// System interface that moves bytes on the shards of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Readiness by epoll(7).
    Epoll,
    /// Completions by io_uring(7).
    IoUring,
}

impl Engine {
    /// Returns the name in configuration, status, metrics and log.
    pub fn label(self) -> &'static str {
        match self {
            Self::Epoll => "epoll",
            Self::IoUring => "io_uring",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// The engine of a process, with the resources of each shard.
#[derive(Debug)]
pub struct Engines {
    engine: Engine,
    /// Rings, one for each shard. All exist before the first shard runs, so that a socket which
    /// moves to another shard finds the same engine.
    rings: Vec<Ring>,
}

impl Engines {
    /// Chooses the engine of `shards` shards. Logs once, with the remedy, that the configured one
    /// is not available.
    pub fn choose(wanted: EngineChoice, shards: usize) -> Self {
        let rings = match wanted {
            // What `auto` picks, and why: docs/adr/0021.
            EngineChoice::Auto | EngineChoice::Epoll => Vec::new(),
            EngineChoice::IoUring => probe::rings(shards).unwrap_or_else(|refused| {
                tracing::warn!("io_uring can't be used, epoll takes its place: {refused}");
                Vec::new()
            }),
        };
        let engine = match rings.is_empty() {
            true => Engine::Epoll,
            false => Engine::IoUring,
        };
        tracing::info!(%engine, "datapath");
        Self { engine, rings }
    }

    /// Returns the chosen engine.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Returns the ring of one more shard.
    pub(crate) fn next_ring(&mut self) -> Option<Ring> {
        self.rings.pop()
    }

    /// Registers the metric of the engine.
    pub fn register(&self, registry: &mut Registry) {
        let family = Family::<Labels, Gauge>::default();
        let engine = self.engine.label();
        family.get_or_create(&Labels { engine }).set(1);
        registry.register(
            "datapath_engine",
            "1 for the engine that moves bytes",
            family,
        );
    }
}

impl Default for Engines {
    /// Returns epoll.
    fn default() -> Self {
        Self {
            engine: Engine::Epoll,
            rings: Vec::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    engine: &'static str,
}
