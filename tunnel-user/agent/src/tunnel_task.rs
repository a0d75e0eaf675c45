//! One tunnel on its shard, from the dial to its end. The [connector](super::connector) decides, this
//! task executes.

use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::mpsc;
use tunnel_proto::close::CloseReason;

use super::plan::{ServerEndpoint, ServerInfo};
use super::tunnel::{DialError, Dialled, End, Tunnel, TunnelInfo};
use super::worker::Worker;
use super::{konnectivity, quic};
use cpc_config::TunnelKind;
use cpc_host::concurrency::Permit;
use cpc_host::report::report;
use cpc_observe::audit::events as audit;
use cpc_transport::quic::steering::Spread;
use cpc_transport::tunnel::Probe;

/// A task for a shard: to dial, and to serve the resulting tunnel.
pub(super) struct TunnelTask {
    /// Number of the tunnel.
    pub number: u64,
    /// Address and protocol.
    pub endpoint: ServerEndpoint,
    /// Server name that the endpoint was resolved from.
    pub server: Option<Arc<str>>,
    /// Number of the tunnel among those at this address.
    pub spread: (Spread, u8),
    /// Receiver of the events, each with the number of the tunnel.
    pub events: mpsc::UnboundedSender<(u64, TaskEvent)>,
    /// Commands for the tunnel.
    pub commands: mpsc::UnboundedReceiver<TunnelCommand>,
    /// Permit on the shard.
    pub permit: Option<Permit>,
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
    Ended(End),
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

/// Runs tasks until their sender is gone.
pub(super) async fn run(worker: Worker, mut tasks: mpsc::UnboundedReceiver<TunnelTask>) {
    let worker = Rc::new(worker);
    while let Some(task) = tasks.recv().await {
        let worker = worker.clone();
        tokio::task::spawn_local(async move { task.run(&worker).await });
    }
}

impl TunnelTask {
    async fn run(mut self, worker: &Rc<Worker>) {
        let _permit = self.permit.take();
        let dialled = match self.dial(worker).await {
            Ok(Some(dialled)) => dialled,
            Ok(None) => return,
            Err(error) => return self.tell(TaskEvent::Failed(report(&error))),
        };
        let tunnel = dialled.tunnel();
        let established = Established {
            info: tunnel.info().clone(),
            probe: tunnel.probe(),
        };
        self.tell(TaskEvent::Welcomed(dialled.server_info(), established));
        if !self.may_proceed().await {
            let reason = CloseReason::DuplicateServer;
            return dialled.decline(worker.clone(), reason).await;
        }
        let (number, events) = (self.number, self.events.clone());
        let changed = || drop(events.send((number, TaskEvent::Changed)));
        let revoked = revoked(worker, tunnel.clone());
        let end = tokio::select! {
            end = dialled.serve(worker.clone(), changed) => end,
            end = run_commands(tunnel, &mut self.commands) => end,
            end = revoked => end,
        };
        self.tell(TaskEvent::Ended(end));
    }

    /// Tells the connector, which outlives its tasks except at the very end.
    fn tell(&self, event: TaskEvent) {
        let _ = self.events.send((self.number, event));
    }

    /// Waits for the connector's answer.
    async fn may_proceed(&mut self) -> bool {
        matches!(self.commands.recv().await, Some(TunnelCommand::Proceed))
    }

    /// Dials. Returns `None` if the connector does not want the tunnel any more.
    async fn dial(&mut self, worker: &Worker) -> Result<Option<Dialled>, DialError> {
        let ServerEndpoint { address, kind } = self.endpoint;
        match (kind, &worker.material, &worker.konnectivity, &self.server) {
            (TunnelKind::Quic, Some(material), _, _) => {
                let reached = quic::reach(material, &worker.setup, address, self.spread).await?;
                self.tell(TaskEvent::Reached(reached.identity.name.clone()));
                if !self.may_proceed().await {
                    reached.decline(CloseReason::DuplicateServer).await;
                    return Ok(None);
                }
                Ok(Some(Dialled::Quic(reached.introduce(worker).await?)))
            }
            (TunnelKind::Konnectivity, _, Some(client), Some(server)) => {
                let metrics = &worker.proxy_metrics.streams;
                let dialled = konnectivity::dial(client, self.endpoint, server, metrics).await?;
                Ok(Some(Dialled::Grpc(dialled)))
            }
            _ => Err(DialError::NotConfigured),
        }
    }
}

/// Ends a tunnel to a revoked server.
async fn revoked(worker: &Worker, tunnel: Tunnel) -> End {
    let (Some(material), Tunnel::Quic(quic)) = (&worker.material, &tunnel) else {
        return std::future::pending().await;
    };
    let revoked = material.revocations().on_revocation(&quic.peer()).await;
    audit::cut("tunnel", quic.info.endpoint.address, &revoked);
    let reason = CloseReason::IdentityRefused;
    tunnel.close(reason);
    End::new(reason, revoked)
}

/// Runs commands without end: the tunnel itself reports its end.
async fn run_commands(
    tunnel: Tunnel,
    commands: &mut mpsc::UnboundedReceiver<TunnelCommand>,
) -> End {
    while let Some(command) = commands.recv().await {
        match command {
            TunnelCommand::Close(reason) => tunnel.close_when_heard(reason).await,
            TunnelCommand::Retire => drop(tokio::task::spawn_local(tunnel.clone().retire())),
            // Answers to questions, which have been asked.
            TunnelCommand::Proceed | TunnelCommand::Decline => {}
        }
    }
    std::future::pending().await
}
