//! The QUIC dialer: reaches a server over UDP.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use tokio::time::timeout;

use super::dial_target::DialTarget;
use super::native::{self, Reached};
use super::tunnel::{BoxError, EstablishedTunnel, TunnelDialer};
use super::worker::Worker;
use cpc_config::TunnelKind;
use cpc_host::host;
use cpc_identity::Material;
use cpc_transport::quic::config::{self, EndpointError, Setup};
use cpc_transport::quic::{ConnectError, ConnectionError};

/// Timeout of a server's handshake, which is retried later.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// Reason why a server was not reached.
#[derive(Debug, thiserror::Error)]
enum DialError {
    /// The socket can't be opened.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// quinn-proto refuses to dial.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The handshake failed.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The handshake timed out.
    #[error("no answer within {} s; is UDP let through?", HANDSHAKE_TIMEOUT.as_secs())]
    Timeout,
}

/// Dials servers over QUIC.
pub(super) struct QuicDialer {
    /// Our certificate, and the trusted CAs.
    pub material: Arc<Material>,
    /// Common setup of tunnels.
    pub setup: Setup,
}

impl QuicDialer {
    async fn reach(&self, target: &DialTarget) -> Result<Reached, DialError> {
        let address = target.endpoint().address;
        let (opened, config) = config::client(address, &self.material, target.spread, &self.setup)?;
        host::warn_once(&opened.complaints);
        let endpoint = opened.endpoint;
        // Never checked: a server is known by its identity.
        let connecting = endpoint.connect(config, address, "cpc.invalid")?;
        let connected = timeout(HANDSHAKE_TIMEOUT, connecting).await;
        let connection = connected.map_err(|_| DialError::Timeout)??;
        Ok(Reached {
            connection: connection.into(),
            departure: Box::pin(async move { endpoint.wait_idle().await }),
        })
    }
}

impl TunnelDialer for QuicDialer {
    fn kind(&self) -> TunnelKind {
        TunnelKind::Quic
    }

    fn dial<'a>(
        &'a self,
        worker: &'a Rc<Worker>,
        target: &'a mut DialTarget,
    ) -> LocalBoxFuture<'a, Result<Option<Box<dyn EstablishedTunnel>>, BoxError>> {
        Box::pin(async move {
            let reached = self.reach(target).await?;
            native::establish(worker, target, reached).await
        })
    }
}
