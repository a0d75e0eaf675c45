//! QUIC as a kind of tunnel.

use std::net::SocketAddr;

use quinn_proto::ConnectionError;
use rustls::pki_types::CertificateDer;
use tunnel_proto::close::CloseReason;

use super::{Connection, Recv, Send, error_code, link_reason};
use crate::tunnel::{Path, Probe, Tunnel, TunnelError};
use cpc_config::TunnelKind;
use cpc_datapath::Budget;

impl Tunnel for Connection {
    type Send = Send;
    type Recv = Recv;

    fn kind(&self) -> TunnelKind {
        TunnelKind::Quic
    }

    async fn open(&self) -> Result<(Send, Recv), TunnelError> {
        self.open_bi().await.map_err(|error| self.ended_by(error))
    }

    async fn accept(&self) -> Result<(Send, Recv), TunnelError> {
        self.accept_bi().await.map_err(|error| self.ended_by(error))
    }

    fn close(&self, reason: CloseReason, text: &str) {
        self.close(error_code(reason), text.as_bytes());
    }

    fn remote(&self) -> SocketAddr {
        self.remote_address()
    }

    fn probe(&self) -> Probe {
        let path = self.path();
        Probe::new(move || Path {
            remote: path.remote(),
            rtt: path.rtt(),
            mtu: Some(path.mtu()),
            since_packet: path.since_packet(),
            since_data: path.since_packet(),
        })
    }

    fn peer_certificate(&self) -> Option<CertificateDer<'static>> {
        self.peer_certificate()
    }

    fn charge_to(&self, budget: &Budget) {
        self.charge_to(budget);
    }

    fn has_unacknowledged(&self) -> bool {
        self.has_unacknowledged()
    }
}

impl From<ConnectionError> for TunnelError {
    fn from(error: ConnectionError) -> Self {
        Self::of(link_reason(&error), error)
    }
}

impl TunnelError {
    /// Returns the end of a tunnel for `reason`, by `error`.
    pub(super) fn of(reason: CloseReason, error: ConnectionError) -> Self {
        let text = match &error {
            ConnectionError::ApplicationClosed(close) => {
                Some(String::from_utf8_lossy(&close.reason).into_owned())
            }
            _ => None,
        };
        let error = Self::new(reason, error);
        match text {
            Some(text) => error.closed_by_peer(&text),
            None => error,
        }
    }
}
