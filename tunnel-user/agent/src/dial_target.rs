//! A server to dial, with the channels between the connector, which decides, and the task of the tunnel.

use std::sync::Arc;

use tokio::sync::mpsc;
use tunnel_proto::close::CloseReason;

use super::plan::{ServerEndpoint, ServerInfo};
use super::tunnel_info::{TunnelEnd, TunnelInfo};
use cpc_transport::quic::steering::Spread;
use cpc_transport::tunnel::Probe;

/// A server to dial.
pub struct DialTarget {
    /// Number of the tunnel.
    pub(super) number: u64,
    /// Address and protocol.
    pub(super) endpoint: ServerEndpoint,
    /// Server name that the endpoint was resolved from, "host:port".
    pub(super) server: Arc<str>,
    /// Number of the tunnel among those at this address.
    pub(super) spread: (Spread, u8),
    /// Receiver of the events, each with the number of the tunnel.
    pub(super) events: mpsc::UnboundedSender<(u64, TaskEvent)>,
    /// Commands for the tunnel.
    pub(super) commands: mpsc::UnboundedReceiver<TunnelCommand>,
}

/// Event of a task, for the connector.
pub(super) enum TaskEvent {
    /// A server has shown its certificate, with this name. Waits for [`TunnelCommand::Proceed`] before
    /// Hello.
    Reached(Arc<str>),
    /// The dial failed.
    Failed(String),
    /// The server has welcomed the agent. Waits for [`TunnelCommand::Proceed`] before serving.
    Welcomed(ServerInfo, Established),
    /// The server fell silent, drains, or is heard again.
    Changed,
    /// A kept tunnel has ended.
    Ended(TunnelEnd),
}

/// An established tunnel, for status and metrics.
#[derive(Debug)]
pub(super) struct Established {
    /// Description of the tunnel.
    pub info: TunnelInfo,
    /// Probe of the path, where the protocol measures it.
    pub probe: Option<Probe>,
}

/// Command for a tunnel.
#[derive(Clone, Copy, Debug)]
pub(super) enum TunnelCommand {
    /// Go on, after [`TaskEvent::Reached`] and [`TaskEvent::Welcomed`].
    Proceed,
    /// End, after either.
    Decline,
    /// End at once, with everything on the tunnel.
    Close(CloseReason),
    /// End with the last stream.
    Retire,
}

impl DialTarget {
    /// Returns address and protocol of the server.
    pub fn endpoint(&self) -> ServerEndpoint {
        self.endpoint
    }

    /// Returns the configured name of the server, "host:port", which was resolved.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Asks whether the server is wanted whose certificate has this name. An unwanted one is left before
    /// the agent introduces itself, or it would send connections into a tunnel that is about to end.
    pub async fn is_wanted(&mut self, name: Arc<str>) -> bool {
        self.tell(TaskEvent::Reached(name));
        self.may_proceed().await
    }

    /// Tells the connector, which outlives its tasks except at the very end.
    pub(super) fn tell(&self, event: TaskEvent) {
        let _ = self.events.send((self.number, event));
    }

    /// Waits for the connector's answer.
    pub(super) async fn may_proceed(&mut self) -> bool {
        matches!(self.commands.recv().await, Some(TunnelCommand::Proceed))
    }
}
