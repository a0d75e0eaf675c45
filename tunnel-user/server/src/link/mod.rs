//! Links: a connected agent as a dial sees it, over any protocol.
//!
//! A link carries dials, each as the two halves in [`cpc_datapath::stream`]. A link lives on one shard
//! and never leaves it; a [`bridge`] leads to one from another shard. Agents of ours come over tunnels:
//! [`quic`] admits their connections, [`accept`] serves one to its end, [`session`] its control stream.
//! Agents of other protocols are links behind a trait ([`AgentLink`]).

mod accept;
mod answer;
pub(super) mod bridge;
mod foreign;
pub(super) mod quic;
pub(super) mod registration;
mod session;
mod stream;
mod tunnel;

use std::fmt;
use std::rc::Rc;

use futures_util::future::LocalBoxFuture;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::DialRequest;

pub use answer::{Answer, Answered};
pub use stream::{LinkRecv, LinkSend};
use tunnel::TunnelLink;

/// A connected agent.
#[derive(Clone, Debug)]
pub(super) enum Link {
    /// An agent over a tunnel.
    Tunnel(Rc<TunnelLink>),
    /// An agent over another protocol.
    Foreign(Rc<dyn AgentLink>),
}

/// An agent over a protocol of another system.
pub trait AgentLink: fmt::Debug {
    /// Sends `request`. May wait for the agent's permission, so callers need a timeout.
    ///
    /// # Errors
    /// The reason why the link is gone.
    fn open<'a>(
        self: Rc<Self>,
        request: &'a DialRequest,
    ) -> LocalBoxFuture<'a, Result<(LinkSend, LinkRecv), CloseReason>>;

    /// Ends the link and everything on it. The first reason counts.
    fn close(&self, reason: CloseReason);
}

impl Link {
    /// Sends `request`. May wait for the agent's permission, so callers need a timeout.
    ///
    /// # Errors
    /// The reason why the link is gone.
    pub(super) async fn open(
        &self,
        request: &DialRequest,
    ) -> Result<(LinkSend, LinkRecv), CloseReason> {
        match self {
            Self::Tunnel(link) => {
                let (send, recv) = link.open(request).await?;
                Ok((LinkSend::Tunnel(send), LinkRecv::Tunnel(recv)))
            }
            Self::Foreign(link) => link.clone().open(request).await,
        }
    }

    /// Ends the link and everything on it.
    pub(super) fn close(&self, reason: CloseReason) {
        match self {
            Self::Tunnel(link) => link.close(reason),
            Self::Foreign(link) => link.close(reason),
        }
    }
}
