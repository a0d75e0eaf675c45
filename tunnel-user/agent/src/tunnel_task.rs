//! One tunnel on its shard, from the dial to its end. The [connector](super::connector) decides, this
//! task executes.

use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::mpsc;
use tunnel_proto::close::CloseReason;

use super::plan::{ServerEndpoint, ServerInfo};
use super::tunnel::{BoxError, EstablishedTunnel, ServerTunnel, TunnelEnd, TunnelInfo};
use super::worker::Worker;
use cpc_config::TunnelKind;
use cpc_host::concurrency::Permit;
use cpc_host::report::report;
use cpc_transport::quic::steering::Spread;
use cpc_transport::tunnel::Probe;

/// A task for a shard: to dial, and to serve the resulting tunnel.
pub(super) struct TunnelTask {
    /// Server to dial.
    pub target: DialTarget,
    /// Permit on the shard.
    pub permit: Option<Permit>,
}

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

/// There is no dialer for a kind of tunnel: its section of the configuration is missing, or its extension.
#[derive(Debug, thiserror::Error)]
#[error("there are no certificates or parameters for tunnels over {}", .0.label())]
struct NoDialer(TunnelKind);

/// Runs tasks until their sender is gone.
pub(super) async fn run(worker: Worker, mut tasks: mpsc::UnboundedReceiver<TunnelTask>) {
    let worker = Rc::new(worker);
    while let Some(task) = tasks.recv().await {
        let worker = worker.clone();
        tokio::task::spawn_local(async move { task.run(&worker).await });
    }
}

impl TunnelTask {
    async fn run(self, worker: &Rc<Worker>) {
        let Self {
            mut target,
            permit: _permit,
        } = self;
        let established = match dial(worker, &mut target).await {
            Ok(Some(established)) => established,
            Ok(None) => return,
            Err(error) => return target.tell(TaskEvent::Failed(report(&*error))),
        };
        let tunnel = established.tunnel();
        let view = Established {
            info: tunnel.info().clone(),
            probe: tunnel.probe(),
        };
        target.tell(TaskEvent::Welcomed(established.server(), view));
        if !target.may_proceed().await {
            return established.decline(CloseReason::DuplicateServer).await;
        }
        let (number, events) = (target.number, target.events.clone());
        let changed = move || drop(events.send((number, TaskEvent::Changed)));
        let end = tokio::select! {
            end = established.serve(Box::new(changed)) => end,
            end = run_commands(tunnel, &mut target.commands) => end,
        };
        target.tell(TaskEvent::Ended(end));
    }
}

async fn dial(
    worker: &Rc<Worker>,
    target: &mut DialTarget,
) -> Result<Option<Box<dyn EstablishedTunnel>>, BoxError> {
    let mut dialers = worker.dialers.iter();
    let kind = target.endpoint.kind;
    let dialer = dialers.find(|dialer| dialer.kind() == kind);
    dialer.ok_or(NoDialer(kind))?.dial(worker, target).await
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
    fn tell(&self, event: TaskEvent) {
        let _ = self.events.send((self.number, event));
    }

    /// Waits for the connector's answer.
    async fn may_proceed(&mut self) -> bool {
        matches!(self.commands.recv().await, Some(TunnelCommand::Proceed))
    }
}

/// Runs commands without end: the tunnel itself reports its end.
async fn run_commands(
    tunnel: Rc<dyn ServerTunnel>,
    commands: &mut mpsc::UnboundedReceiver<TunnelCommand>,
) -> TunnelEnd {
    while let Some(command) = commands.recv().await {
        match command {
            TunnelCommand::Close(reason) => tunnel.close(reason).await,
            TunnelCommand::Retire => drop(tokio::task::spawn_local(tunnel.clone().retire())),
            // Answers to questions, which have been asked.
            TunnelCommand::Proceed | TunnelCommand::Decline => {}
        }
    }
    std::future::pending().await
}
