//! The stage of a handover, which tunnels and the connector watch.

use tokio::sync::watch;

use cpc_host::concurrency::{ConcurrencyLimit, Permit};

/// Stage of a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The agent serves.
    Serving,
    /// The agent serves its connections, and has its servers send no new dials.
    Pausing,
    /// The agent has left its tunnels.
    Left,
}

/// Handle of the stage, for any thread.
#[derive(Clone, Debug)]
pub(crate) struct Handover {
    stage: watch::Sender<Stage>,
    /// Dials under way.
    dials: ConcurrencyLimit,
    /// Native tunnels with connections that would end with them.
    unready: ConcurrencyLimit,
}

impl Handover {
    /// Creates the handle of a serving agent.
    pub(crate) fn new() -> Self {
        Self {
            stage: watch::Sender::new(Stage::Serving),
            dials: ConcurrencyLimit::new(usize::MAX),
            unready: ConcurrencyLimit::new(usize::MAX),
        }
    }

    /// Sets the stage.
    pub(super) fn set(&self, stage: Stage) {
        self.stage.send_replace(stage);
    }

    /// Returns the stage.
    pub(crate) fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// Whether connections are about to be handed over.
    pub(crate) fn is_pausing(&self) -> bool {
        self.stage() == Stage::Pausing
    }

    /// Returns a receiver of the stage.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Stage> {
        self.stage.subscribe()
    }

    /// Counts a dial under way.
    pub(crate) fn dial(&self) -> Option<Permit> {
        self.dials.acquire()
    }

    /// Returns `true` while dials are under way.
    pub(crate) fn has_dials(&self) -> bool {
        self.dials.in_use() > 0
    }

    /// Counts a tunnel until all its connections outlive it.
    pub(crate) fn tunnel(&self) -> Option<Permit> {
        self.unready.acquire()
    }

    /// Whether the agent can leave its tunnels without ending a connection.
    pub(super) fn is_ready(&self) -> bool {
        !self.has_dials() && self.unready.in_use() == 0
    }
}
