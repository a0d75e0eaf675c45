//! An agent over a tunnel: a stream of its own for each dial.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::DialRequest;
use tunnel_proto::resumption::SessionId;
use tunnel_proto::session::ServerSession;

use crate::permits::TunnelPermit;
use crate::routes::LinkInfo;
use cpc_datapath::stream::{SendEnd, SendHalf};
use cpc_host::random;
use cpc_identity::revoked::Peer;
use cpc_session::{Bounds, Notices, SessionRecv, SessionSend, SessionState};
use cpc_transport::control_stream::Shared;
use cpc_transport::tunnel::{Connection, Recv, Send, Tunnel};

/// A connected agent.
#[derive(Debug)]
pub(crate) struct TunnelLink {
    pub connection: Connection,
    pub(super) session: Rc<Shared<ServerSession>>,
    /// State that other shards may read.
    pub info: Arc<LinkInfo>,
    /// Certificate of the agent, as lists of revocations know it.
    pub(super) peer: Peer,
    /// Sessions over the tunnel, where the agent holds them.
    pub notices: OnceCell<Rc<Notices>>,
    /// Bounds on each session.
    pub(super) bounds: Arc<Bounds>,
    /// Permit among all tunnels, once the agent is welcome.
    pub(super) place: RefCell<Option<TunnelPermit>>,
    /// Streams that this end has opened.
    pub(super) opened: Opened,
}

/// Streams that this end has opened on a tunnel.
#[derive(Debug, Default)]
pub(super) struct Opened {
    count: Cell<u64>,
    /// End of the opening of streams.
    is_closed: Cell<bool>,
}

impl TunnelLink {
    /// Opens a stream and sends `request` on it, as a session if the agent holds those. Waits for the
    /// agent's permission when [`MAX_DIALS`] are open, so callers need a timeout.
    ///
    /// [`MAX_DIALS`]: cpc_config::transport::MAX_DIALS
    ///
    /// # Errors
    /// The reason why the tunnel is gone.
    pub(crate) async fn open(
        &self,
        request: &DialRequest,
    ) -> Result<(SessionSend, SessionRecv), CloseReason> {
        self.session.note_traffic(Instant::now());
        let (send, recv) = self.open_stream().await?;
        let mut preface = BytesMut::new();
        let session = match self.notices.get() {
            Some(notices) => Some(notices.begin(self.fresh_session()?)),
            None => None,
        };
        let request = DialRequest {
            session: session.as_ref().map(|(key, _)| *key),
            ..request.clone()
        };
        request.encode(&mut preface);
        let carried = session.map(|(_, carried)| carried);
        // They end the session if the dial is given up.
        let mut send = SessionSend::new(send, carried.clone());
        let recv = SessionRecv::new(recv, carried);
        let sent = send.stream().send(&mut preface.freeze()).await;
        sent.map_err(|end| match end {
            SendEnd::Acknowledged => CloseReason::Internal,
            SendEnd::Stopped(reason) | SendEnd::Link(reason) => reason,
        })?;
        Ok((send, recv))
    }

    /// Opens a stream. Waits for the agent's permission, so callers need a timeout.
    ///
    /// # Errors
    /// The reason why the tunnel is gone, or [`CloseReason::Draining`] after
    /// [`close_to_streams`](Self::close_to_streams).
    pub(crate) async fn open_stream(&self) -> Result<(Send, Recv), CloseReason> {
        let Opened { count, is_closed } = &self.opened;
        if is_closed.get() {
            return Err(CloseReason::Draining);
        }
        let opened = self.connection.open().await;
        let halves = opened.map_err(|error| error.reason())?;
        // The agent has been told another number meanwhile. It does not miss a stream without a head.
        if is_closed.get() {
            return Err(CloseReason::Draining);
        }
        count.set(count.get() + 1);
        Ok(halves)
    }

    /// Opens no more streams. Returns the number of those that were opened.
    pub(super) fn close_to_streams(&self) -> u64 {
        self.opened.is_closed.set(true);
        self.opened.count.get()
    }

    fn fresh_session(&self) -> Result<SessionState, CloseReason> {
        let mut id = [0; 16];
        // An id that others could guess is none.
        random::fill(&mut id).map_err(|_| CloseReason::Internal)?;
        Ok(SessionState::new(SessionId::new(id), self.bounds.clone()))
    }

    /// Ends the link and everything on it.
    pub(crate) fn close(&self, reason: CloseReason) {
        self.connection.close(reason, reason.label());
    }
}
