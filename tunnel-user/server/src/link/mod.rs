//! Links: a connected agent as a dial sees it, over any protocol.
//!
//! A link carries dials, each as the two halves in [`cpc_datapath::stream`]. A link lives on one shard
//! and never leaves it; a [`bridge`] leads to one from another shard. [`accept`] accepts agents over
//! QUIC, [`session`] serves their control stream; [`konnectivity`] does both for agents of
//! Konnectivity.

pub(super) mod accept;
pub(super) mod bridge;
pub(super) mod konnectivity;
mod quic;
mod session;
mod stream;

use std::rc::Rc;

use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::DialRequest;

pub(super) use konnectivity::link::KonnectivityLink;
pub(super) use quic::QuicLink;
pub(super) use stream::{LinkRecv, LinkSend};

/// A connected agent.
#[derive(Clone, Debug)]
pub(super) enum Link {
    /// An agent over QUIC: each dial has a stream of its own.
    Quic(Rc<QuicLink>),
    /// An agent over gRPC: all dials share one stream.
    Konnectivity(Rc<KonnectivityLink>),
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
            Self::Quic(link) => {
                let (send, recv) = link.open(request).await?;
                Ok((LinkSend::Quic(send), LinkRecv::Quic(recv)))
            }
            Self::Konnectivity(link) => {
                let (send, recv) = link.open(request)?;
                Ok((
                    LinkSend::Konnectivity(Box::new(send)),
                    LinkRecv::Konnectivity(Box::new(recv)),
                ))
            }
        }
    }

    /// Ends the link and everything on it.
    pub(super) fn close(&self, reason: CloseReason) {
        match self {
            Self::Quic(link) => link.close(reason),
            Self::Konnectivity(link) => link.close(reason),
        }
    }
}
