//! What belongs to one shard of a server: its endpoint, its links, and what dials need.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use tokio::time::Instant;
use tunnel_proto::close::CloseReason;
use tunnel_proto::session::InstanceId;

use super::control::ControlHandle;
use super::link::Link;
use super::metrics::ServerMetrics;
use super::routes::LinkId;
use crate::config::server::LimitsConfig;
use crate::datapath::Budget;
use crate::process::gate::{Entered, Gate};
use crate::process::lifecycle::Phase;

/// What every shard of a server knows.
#[derive(Clone)]
pub(super) struct Common {
    /// The control task.
    pub control: ControlHandle,
    /// Counters.
    pub metrics: ServerMetrics,
    /// The bound on stopped readers.
    pub budget: Budget,
    /// Bounds.
    pub limits: LimitsConfig,
    /// Our name.
    pub server_id: Arc<str>,
    /// How many of us there are.
    pub server_count: u32,
    /// This process.
    pub instance: InstanceId,
    /// Since when it runs.
    pub started: Instant,
    /// Where the process is in its life.
    pub phase: watch::Receiver<Phase>,
    /// The last link id that was given out.
    pub last_link: Arc<AtomicU64>,
}

/// One shard. Dereferences to what all of them know.
pub(super) struct Shard {
    /// Which one.
    pub index: usize,
    /// The agents that are connected to it.
    pub links: RefCell<HashMap<LinkId, Link>>,
    connections: Gate,
    common: Common,
}

impl std::ops::Deref for Shard {
    type Target = Common;

    fn deref(&self) -> &Common {
        &self.common
    }
}

impl Shard {
    /// A shard without links.
    pub(super) fn new(index: usize, common: Common) -> Rc<Self> {
        Rc::new(Self {
            index,
            links: RefCell::default(),
            connections: Gate::new(common.limits.connections),
            common,
        })
    }

    /// A link id that was never used.
    pub(super) fn next_link(&self) -> LinkId {
        LinkId(self.last_link.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Counts a connection; `None` at a bound.
    pub(super) fn admit(&self) -> Option<Admitted> {
        let entered = self
            .connections
            .enter()
            .filter(|_| self.budget.has_room())?;
        self.metrics.dials.open.inc();
        Some(Admitted {
            _entered: entered,
            open: self.metrics.dials.open.clone(),
        })
    }

    /// Whether no connection is open.
    pub(super) fn is_idle(&self) -> bool {
        self.connections.inside() == 0
    }

    /// Ends every link, and what lives on it.
    pub(super) fn close_links(&self, reason: CloseReason) {
        for link in self.links.borrow().values() {
            link.close(reason);
        }
    }
}

/// One connection that counts until it is dropped.
pub(super) struct Admitted {
    _entered: Entered,
    open: Gauge,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.open.dec();
    }
}
