//! A tunnel, whatever it speaks.

use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tunnel_proto::close::CloseReason;

use super::plan::{Leads, Way};
use super::stats::TunnelStats;
use super::worker::Worker;
use super::{konnectivity, quic};
use cpc_transport::quic::PathView;

/// How often a tunnel that is to end looks whether its streams have.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Room that a goodbye is given to arrive.
pub(super) const GOODBYE: Duration = Duration::from_millis(500);

/// What a tunnel is.
#[derive(Clone, Debug)]
pub(super) struct About {
    /// Which server it leads to.
    pub server_id: Arc<str>,
    /// Which way.
    pub way: Way,
    /// How it does.
    pub stats: Arc<TunnelStats>,
}

/// An established tunnel.
#[derive(Clone, Debug)]
pub(super) enum Tunnel {
    /// Over QUIC.
    Quic(Rc<quic::Tunnel>),
    /// Over gRPC.
    Grpc(Rc<konnectivity::Tunnel>),
}

/// An established tunnel that is not served yet.
pub(super) enum Dialled {
    /// Over QUIC.
    Quic(quic::Dialled),
    /// Over gRPC.
    Grpc(konnectivity::Dialled),
}

/// Why a tunnel did not come to be.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// Over QUIC.
    #[error(transparent)]
    Quic(#[from] quic::DialError),
    /// Over gRPC.
    #[error(transparent)]
    Grpc(#[from] konnectivity::DialError),
    /// The configuration has nothing to dial with.
    #[error("the configuration does not say how: `tls` for quic, `konnectivity` for that")]
    NotConfigured,
}

/// Why a tunnel ended.
#[derive(Debug)]
pub(super) struct End {
    /// For machines.
    pub reason: CloseReason,
    /// For people.
    pub why: String,
}

impl End {
    pub(super) fn new(reason: CloseReason, why: impl fmt::Display) -> Self {
        let why = why.to_string();
        Self { reason, why }
    }
}

impl Tunnel {
    /// What it is.
    pub(super) fn about(&self) -> &About {
        match self {
            Self::Quic(tunnel) => &tunnel.about,
            Self::Grpc(tunnel) => &tunnel.about,
        }
    }

    /// Its path, where that can tell how it does.
    pub(super) fn path(&self) -> Option<Arc<PathView>> {
        match self {
            Self::Quic(tunnel) => Some(tunnel.path()),
            Self::Grpc(_) => None,
        }
    }

    /// Ends it, with a reason that is true for what the server has heard.
    pub(super) async fn close_when_heard(&self, reason: CloseReason) {
        match self {
            Self::Quic(tunnel) => tunnel.close_when_heard(reason).await,
            Self::Grpc(tunnel) => tunnel.close(reason),
        }
    }

    /// Ends it and everything on it.
    pub(super) fn close(&self, reason: CloseReason) {
        match self {
            Self::Quic(tunnel) => tunnel.close(reason),
            Self::Grpc(tunnel) => tunnel.close(reason),
        }
    }

    /// Ends it when its last stream has ended: another one took its place.
    pub(super) async fn retire(self) {
        match self {
            Self::Quic(tunnel) => tunnel.retire().await,
            Self::Grpc(tunnel) => tunnel.retire().await,
        }
    }
}

impl Dialled {
    /// The tunnel.
    pub(super) fn tunnel(&self) -> Tunnel {
        match self {
            Self::Quic(dialled) => Tunnel::Quic(dialled.tunnel.clone()),
            Self::Grpc(dialled) => Tunnel::Grpc(dialled.tunnel.clone()),
        }
    }

    /// Where it leads.
    pub(super) fn leads(&self) -> Leads {
        let (instance, server_count) = match self {
            Self::Quic(dialled) => (Some(dialled.tunnel.server_instance), dialled.server_count),
            Self::Grpc(dialled) => (None, dialled.server_count),
        };
        Leads {
            server: self.tunnel().about().server_id.clone(),
            instance,
            server_count,
        }
    }

    /// Ends a tunnel that is not wanted, and lets the server know.
    pub(super) async fn decline(self, worker: Rc<Worker>, reason: CloseReason) {
        match self {
            Self::Quic(dialled) => dialled.decline(reason).await,
            Self::Grpc(dialled) => dialled.decline(worker).await,
        }
    }

    /// Serves the tunnel until it ends, and says why it did. `changed` is called when the server
    /// falls silent, is heard again, or drains.
    pub(super) async fn serve(self, worker: Rc<Worker>, changed: impl Fn()) -> End {
        match self {
            Self::Quic(dialled) => {
                let end = dialled.serve(worker, changed).await;
                End::new(quic::reason_of(&end), end)
            }
            Self::Grpc(dialled) => dialled.serve(worker).await,
        }
    }
}
