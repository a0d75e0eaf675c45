//! A tunnel over either protocol.

use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tunnel_proto::close::CloseReason;

use super::plan::{ServerEndpoint, ServerInfo};
use super::stats::TunnelStats;
use super::worker::Worker;
use super::{konnectivity, quic};
use cpc_transport::tunnel::Probe;

/// Polling interval of an ending tunnel for the end of its streams.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Time for the last packets of a tunnel to arrive.
pub(super) const GOODBYE: Duration = Duration::from_millis(500);

/// Description of a tunnel.
#[derive(Clone, Debug)]
pub(super) struct TunnelInfo {
    /// Server of the tunnel.
    pub server_id: Arc<str>,
    /// Address and protocol.
    pub endpoint: ServerEndpoint,
    /// Statistics of the tunnel.
    pub stats: Arc<TunnelStats>,
}

/// An established tunnel.
#[derive(Clone, Debug)]
pub(super) enum Tunnel {
    /// Tunnel over QUIC.
    Quic(Rc<quic::Tunnel>),
    /// Tunnel over gRPC.
    Grpc(Rc<konnectivity::Tunnel>),
}

/// An established tunnel that is not served yet.
pub(super) enum Dialled {
    /// Tunnel over QUIC.
    Quic(quic::Dialled),
    /// Tunnel over gRPC.
    Grpc(konnectivity::Dialled),
}

/// Reason why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// The dial over QUIC failed.
    #[error(transparent)]
    Quic(#[from] quic::DialError),
    /// The dial over gRPC failed.
    #[error(transparent)]
    Grpc(#[from] konnectivity::DialError),
    /// The configuration lacks the certificates or parameters of the protocol.
    #[error("the configuration does not say how: `tls` for quic, `konnectivity` for that")]
    NotConfigured,
}

/// End of a tunnel.
#[derive(Debug)]
pub(super) struct End {
    /// Reason of the closed set.
    pub reason: CloseReason,
    /// Text for people.
    pub why: String,
}

impl End {
    pub(super) fn new(reason: CloseReason, why: impl fmt::Display) -> Self {
        let why = why.to_string();
        Self { reason, why }
    }
}

impl Tunnel {
    /// Returns the description of the tunnel.
    pub(super) fn info(&self) -> &TunnelInfo {
        match self {
            Self::Quic(tunnel) => &tunnel.info,
            Self::Grpc(tunnel) => &tunnel.info,
        }
    }

    /// Returns a probe of the path, where the protocol measures it.
    pub(super) fn probe(&self) -> Option<Probe> {
        match self {
            Self::Quic(tunnel) => Some(tunnel.probe()),
            Self::Grpc(_) => None,
        }
    }

    /// Ends the tunnel, with a reason that is true for what the server has received.
    pub(super) async fn close_when_heard(&self, reason: CloseReason) {
        match self {
            Self::Quic(tunnel) => tunnel.close_when_heard(reason).await,
            Self::Grpc(tunnel) => tunnel.close(reason),
        }
    }

    /// Ends the tunnel and everything on it.
    pub(super) fn close(&self, reason: CloseReason) {
        match self {
            Self::Quic(tunnel) => tunnel.close(reason),
            Self::Grpc(tunnel) => tunnel.close(reason),
        }
    }

    /// Ends the tunnel when its last stream has ended: another one replaced it.
    pub(super) async fn retire(self) {
        match self {
            Self::Quic(tunnel) => tunnel.retire().await,
            Self::Grpc(tunnel) => tunnel.retire().await,
        }
    }
}

impl Dialled {
    /// Returns the tunnel.
    pub(super) fn tunnel(&self) -> Tunnel {
        match self {
            Self::Quic(dialled) => Tunnel::Quic(dialled.tunnel.clone()),
            Self::Grpc(dialled) => Tunnel::Grpc(dialled.tunnel.clone()),
        }
    }

    /// Returns the server of the tunnel.
    pub(super) fn server_info(&self) -> ServerInfo {
        let (instance, server_count) = match self {
            Self::Quic(dialled) => (Some(dialled.tunnel.server_instance), dialled.server_count),
            Self::Grpc(dialled) => (None, dialled.server_count),
        };
        ServerInfo {
            server: self.tunnel().info().server_id.clone(),
            instance,
            server_count,
        }
    }

    /// Ends an unwanted tunnel, and tells the server.
    pub(super) async fn decline(self, worker: Rc<Worker>, reason: CloseReason) {
        match self {
            Self::Quic(dialled) => dialled.decline(reason).await,
            Self::Grpc(dialled) => dialled.decline(worker).await,
        }
    }

    /// Serves the tunnel until it ends, and returns the reason. Calls `changed` when the server falls
    /// silent, is heard again, or drains.
    pub(super) async fn serve(self, worker: Rc<Worker>, changed: impl Fn()) -> End {
        match self {
            Self::Quic(dialled) => {
                let end = dialled.serve(worker, changed).await;
                End::new(end.reason(), end)
            }
            Self::Grpc(dialled) => dialled.serve(worker).await,
        }
    }
}
