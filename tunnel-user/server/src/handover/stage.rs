//! The stage of a handover, which accept loops and waiting connections watch.

use tokio::sync::{mpsc, watch};

use super::collected::Collected;

/// Stage of a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The server serves.
    Serving,
    /// The server accepts nothing new.
    Pausing,
    /// The server gives away what it has.
    Collecting,
}

/// Handle of the stage, for any thread.
#[derive(Clone)]
pub(crate) struct Handover {
    stage: watch::Sender<Stage>,
    /// Bounded by the connections of the server.
    collected: mpsc::UnboundedSender<Collected>,
}

impl Handover {
    /// Creates the handle of a serving server, and the receiver of what is collected.
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<Collected>) {
        let (collected, collection) = mpsc::unbounded_channel();
        let stage = watch::Sender::new(Stage::Serving);
        (Self { stage, collected }, collection)
    }

    /// Sets the stage.
    pub(super) fn set(&self, stage: Stage) {
        self.stage.send_replace(stage);
    }

    /// Whether no handover is under way.
    pub(crate) fn is_serving(&self) -> bool {
        *self.stage.borrow() == Stage::Serving
    }

    /// Whether the server gives away what it has, or has done so.
    pub(crate) fn is_collecting(&self) -> bool {
        *self.stage.borrow() == Stage::Collecting
    }

    /// Waits until the server gives away what it has.
    pub(crate) async fn collecting(&self) {
        let mut stage = self.stage.subscribe();
        // The sender is borrowed.
        let _ = stage.wait_for(|stage| *stage == Stage::Collecting).await;
    }

    /// Gives a connection away.
    pub(crate) fn give(&self, collected: Collected) {
        // Without a receiver the process is ending.
        let _ = self.collected.send(collected);
    }

    /// Accepts, but only while the server serves. `accept` accepts nothing if it is given up.
    pub(crate) async fn accept<T>(&self, mut accept: impl AsyncFnMut() -> T) -> T {
        let mut stage = self.stage.subscribe();
        loop {
            let _ = stage.wait_for(|stage| *stage == Stage::Serving).await;
            tokio::select! {
                biased;
                _ = stage.wait_for(|stage| *stage != Stage::Serving) => {}
                accepted = accept() => return accepted,
            }
        }
    }
}
