//! An agent over a tunnel: a stream of its own for each dial.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::DialRequest;
use tunnel_proto::session::ServerSession;

use crate::permits::TunnelPermit;
use crate::routes::LinkInfo;
use cpc_datapath::stream::{SendEnd, SendHalf};
use cpc_transport::control_stream::Shared;
use cpc_transport::tunnel::{Connection, Recv, Send, Tunnel};

/// A connected agent.
#[derive(Debug)]
pub(crate) struct TunnelLink {
    pub(super) connection: Connection,
    pub(super) session: Rc<Shared<ServerSession>>,
    /// State that other shards may read.
    pub info: Arc<LinkInfo>,
    /// Permit among all tunnels, once the agent is welcome.
    pub(super) place: RefCell<Option<TunnelPermit>>,
}

impl TunnelLink {
    /// Opens a stream and sends `request` on it. Waits for the agent's permission when [`MAX_DIALS`]
    /// are open, so callers need a timeout.
    ///
    /// [`MAX_DIALS`]: cpc_config::transport::MAX_DIALS
    ///
    /// # Errors
    /// The reason why the tunnel is gone.
    pub(crate) async fn open(&self, request: &DialRequest) -> Result<(Send, Recv), CloseReason> {
        self.session.note_traffic(Instant::now());
        let opened = self.connection.open().await;
        let (mut send, recv) = opened.map_err(|error| error.reason())?;
        let mut preface = BytesMut::new();
        request.encode(&mut preface);
        let sent = send.send(&mut preface.freeze()).await;
        sent.map_err(|end| match end {
            SendEnd::Acknowledged => CloseReason::Internal,
            SendEnd::Stopped(reason) | SendEnd::Link(reason) => reason,
        })?;
        Ok((send, recv))
    }

    /// Ends the link and everything on it.
    pub(crate) fn close(&self, reason: CloseReason) {
        self.connection.close(reason, reason.label());
    }
}
