//! The halves of one dial, over whichever kind of link it went.
//!
//! The futures of the other kinds are boxed, so that a connection over QUIC, the usual one, does not
//! pay for their size.

use bytes::Bytes;
use futures_util::future::{Either, FutureExt};
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::DialResponse;

use super::bridge::{BridgeRecv, BridgeSend};
use super::konnectivity::{KonnectivityRecv, KonnectivitySend};
use crate::datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use crate::transport::quic::{HeadError, Recv, Send};

/// Towards the target.
#[derive(Debug)]
pub(in crate::server) enum LinkSend {
    /// A QUIC stream.
    Quic(Send),
    /// A share of a gRPC stream.
    Konnectivity(KonnectivitySend),
    /// Either, on another shard.
    Bridge(BridgeSend),
}

/// From the target, behind the agent's answer.
#[derive(Debug)]
pub(in crate::server) enum LinkRecv {
    /// A QUIC stream.
    Quic(Recv),
    /// A share of a gRPC stream.
    Konnectivity(KonnectivityRecv),
    /// Either, on another shard.
    Bridge(BridgeRecv),
}

impl LinkRecv {
    /// Waits for the agent's answer. What follows it is there to be received. Cancelling may lose
    /// it: give the dial up then.
    ///
    /// # Errors
    /// [`HeadError`].
    pub(in crate::server) async fn answer(&mut self) -> Result<DialResponse, HeadError> {
        match self {
            Self::Quic(recv) => recv.read_head(DialResponse::decode).await,
            Self::Konnectivity(recv) => recv.answer().await,
            Self::Bridge(recv) => recv.answer().await,
        }
    }
}

impl SendHalf for LinkSend {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        match self {
            Self::Quic(send) => send.send(chunk).await,
            Self::Konnectivity(send) => Box::pin(send.send(chunk)).await,
            Self::Bridge(send) => Box::pin(send.send(chunk)).await,
        }
    }

    fn finish(&mut self) {
        match self {
            Self::Quic(send) => send.finish(),
            Self::Konnectivity(send) => send.finish(),
            Self::Bridge(send) => send.finish(),
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
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        match self {
            Self::Quic(recv) => recv.recv(into).await,
            Self::Konnectivity(recv) => Box::pin(recv.recv(into)).await,
            Self::Bridge(recv) => Box::pin(recv.recv(into)).await,
        }
    }

    async fn reset(&mut self) -> CloseReason {
        match self {
            Self::Quic(recv) => recv.reset().await,
            Self::Konnectivity(recv) => Box::pin(recv.reset()).await,
            Self::Bridge(recv) => Box::pin(recv.reset()).await,
        }
    }

    fn stop(&mut self, reason: CloseReason) {
        match self {
            Self::Quic(recv) => recv.stop(reason),
            Self::Konnectivity(recv) => recv.stop(reason),
            Self::Bridge(recv) => recv.stop(reason),
        }
    }
}
