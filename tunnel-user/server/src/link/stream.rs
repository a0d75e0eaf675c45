//! The halves of one dial, over any kind of link.
//!
//! The halves of other kinds and their futures are boxed, so that a connection over QUIC, the usual
//! one, does not pay for their size.

use bytes::Bytes;
use futures_util::future::{Either, FutureExt};
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::DialResponse;

use super::bridge::{BridgeRecv, BridgeSend};
use super::konnectivity::stream::{KonnectivityRecv, KonnectivitySend};
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use cpc_transport::quic::{HeadError, Recv, Send};

/// The half towards the target.
#[derive(Debug)]
pub(crate) enum LinkSend {
    /// A QUIC stream.
    Quic(Send),
    /// A share of a gRPC stream.
    Konnectivity(Box<KonnectivitySend>),
    /// A half of either kind, on another shard.
    Bridge(Box<BridgeSend>),
}

/// The half from the target, behind the agent's answer.
#[derive(Debug)]
pub(crate) enum LinkRecv {
    /// A QUIC stream.
    Quic(Recv),
    /// A share of a gRPC stream.
    Konnectivity(Box<KonnectivityRecv>),
    /// A half of either kind, on another shard.
    Bridge(Box<BridgeRecv>),
}

impl LinkRecv {
    /// Waits for the agent's answer. Later data can then be received. Cancelling may lose the answer:
    /// give up the dial then.
    ///
    /// # Errors
    /// [`HeadError`].
    pub(crate) async fn answer(&mut self) -> Result<DialResponse, HeadError> {
        match self {
            Self::Quic(recv) => recv.read_head(DialResponse::decode).await,
            Self::Konnectivity(recv) => recv.answer().await,
            Self::Bridge(recv) => recv.answer().await,
        }
    }
}

impl SendHalf for LinkSend {
    fn send(&mut self, chunk: &mut Bytes) -> impl Future<Output = Result<(), SendEnd>> {
        match self {
            Self::Quic(send) => Either::Left(send.send(chunk)),
            Self::Konnectivity(send) => Either::Right(Either::Left(Box::pin(send.send(chunk)))),
            Self::Bridge(send) => Either::Right(Either::Right(Box::pin(send.send(chunk)))),
        }
    }

    fn finish(&mut self) {
        match self {
            Self::Quic(send) => send.finish(),
            Self::Konnectivity(send) => send.finish(),
            Self::Bridge(send) => send.finish(),
        }
    }

    fn lingers(&self) -> bool {
        match self {
            Self::Quic(send) => send.lingers(),
            Self::Konnectivity(send) => send.lingers(),
            Self::Bridge(send) => send.lingers(),
        }
    }

    fn finish_half(&mut self) {
        match self {
            Self::Quic(send) => send.finish_half(),
            Self::Konnectivity(send) => send.finish_half(),
            Self::Bridge(send) => send.finish_half(),
        }
    }

    fn reset(&mut self, reason: CloseReason) {
        match self {
            Self::Quic(send) => send.reset(reason),
            Self::Konnectivity(send) => send.reset(reason),
            Self::Bridge(send) => send.reset(reason),
        }
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        match self {
            Self::Quic(send) => Either::Left(send.stopped()),
            Self::Konnectivity(send) => Either::Right(send.stopped().boxed_local()),
            Self::Bridge(send) => Either::Right(send.stopped().boxed_local()),
        }
    }
}

impl RecvHalf for LinkRecv {
    fn recv(&mut self, into: &mut Vec<Bytes>) -> impl Future<Output = Result<(), RecvEnd>> {
        match self {
            Self::Quic(recv) => Either::Left(recv.recv(into)),
            Self::Konnectivity(recv) => Either::Right(Either::Left(Box::pin(recv.recv(into)))),
            Self::Bridge(recv) => Either::Right(Either::Right(Box::pin(recv.recv(into)))),
        }
    }

    fn reset(&mut self) -> impl Future<Output = CloseReason> {
        match self {
            Self::Quic(recv) => Either::Left(recv.reset()),
            Self::Konnectivity(recv) => Either::Right(Either::Left(Box::pin(recv.reset()))),
            Self::Bridge(recv) => Either::Right(Either::Right(Box::pin(recv.reset()))),
        }
    }

    fn stop(&mut self, reason: CloseReason) {
        match self {
            Self::Quic(recv) => recv.stop(reason),
            Self::Konnectivity(recv) => recv.stop(reason),
            Self::Bridge(recv) => recv.stop(reason),
        }
    }

    fn is_charged(&self) -> bool {
        match self {
            Self::Quic(recv) => recv.is_charged(),
            Self::Konnectivity(recv) => recv.is_charged(),
            Self::Bridge(recv) => recv.is_charged(),
        }
    }
}
