//! One tunnel on its shard, from the dial to its end. The [connector](super::connector) decides, this
//! task executes.

use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::mpsc;
use tunnel_proto::close::CloseReason;

use super::dial_target::{DialTarget, Established, TaskEvent, TunnelCommand};
use super::tunnel::{BoxError, EstablishedTunnel, ServerTunnel, TunnelDialer};
use super::tunnel_info::TunnelEnd;
use super::worker::Worker;
use cpc_config::TunnelKind;
use cpc_host::concurrency::Permit;
use cpc_host::report::report;

/// A task for a shard: to dial, and to serve the resulting tunnel.
pub(super) struct TunnelTask {
    /// Server to dial.
    pub target: DialTarget,
    /// Permit on the shard.
    pub permit: Option<Permit>,
}

/// There is no dialer for a kind of tunnel: its section of the configuration is missing, or its extension.
#[derive(Debug, thiserror::Error)]
#[error(
    "there is no dialer for {}: the configuration needs `tls` for quic, or the section of that name",
    .0.label()
)]
struct NoDialer(TunnelKind);

/// Dialers of tunnels, one for each kind.
pub(super) type Dialers = Arc<[Arc<dyn TunnelDialer>]>;

/// Runs tasks until their sender is gone.
pub(super) async fn run(
    worker: Worker,
    dialers: Dialers,
    mut tasks: mpsc::UnboundedReceiver<TunnelTask>,
) {
    let worker = Rc::new(worker);
    while let Some(task) = tasks.recv().await {
        let (worker, dialers) = (worker.clone(), dialers.clone());
        tokio::task::spawn_local(async move { task.run(&worker, &dialers).await });
    }
}

impl TunnelTask {
    async fn run(self, worker: &Rc<Worker>, dialers: &Dialers) {
        let Self {
            mut target,
            permit: _permit,
        } = self;
        let established = match dial(worker, dialers, &mut target).await {
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
    dialers: &Dialers,
    target: &mut DialTarget,
) -> Result<Option<Box<dyn EstablishedTunnel>>, BoxError> {
    let kind = target.endpoint.kind;
    let dialer = dialers.iter().find(|dialer| dialer.kind() == kind);
    dialer.ok_or(NoDialer(kind))?.dial(worker, target).await
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
