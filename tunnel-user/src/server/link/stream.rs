//! The halves of one dial, over whichever kind of link it went.

use bytes::Bytes;
use futures_util::future::Either;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::DialResponse;

use super::konnectivity::{KonnectivityRecv, KonnectivitySend};
use crate::datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use crate::transport::stream::{HeadError, Recv, Send};

/// Towards the target.
#[derive(Debug)]
pub(in crate::server) enum LinkSend {
    /// A QUIC stream.
    Quic(Send),
    /// A share of a gRPC stream.
    Konnectivity(KonnectivitySend),
}

/// From the target, behind the agent's answer.
#[derive(Debug)]
pub(in crate::server) enum LinkRecv {
    /// A QUIC stream.
    Quic(Recv),
    /// A share of a gRPC stream.
    Konnectivity(KonnectivityRecv),
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
        }
    }
}

impl SendHalf for LinkSend {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        match self {
            Self::Quic(send) => send.send(chunk).await,
            Self::Konnectivity(send) => send.send(chunk).await,
        }
    }

    fn finish(&mut self) {
        match self {
            Self::Quic(send) => send.finish(),
            Self::Konnectivity(send) => send.finish(),
        }
    }

    fn reset(&mut self, reason: CloseReason) {
        match self {
            Self::Quic(send) => send.reset(reason),
            Self::Konnectivity(send) => send.reset(reason),
        }
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        match self {
            Self::Quic(send) => Either::Left(send.stopped()),
            Self::Konnectivity(send) => Either::Right(send.stopped()),
        }
    }
}

impl RecvHalf for LinkRecv {
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        match self {
            Self::Quic(recv) => recv.recv(into).await,
            Self::Konnectivity(recv) => recv.recv(into).await,
        }
    }

    async fn reset(&mut self) -> CloseReason {
        match self {
            Self::Quic(recv) => recv.reset().await,
            Self::Konnectivity(recv) => recv.reset().await,
        }
    }

    fn stop(&mut self, reason: CloseReason) {
        match self {
            Self::Quic(recv) => recv.stop(reason),
            Self::Konnectivity(recv) => recv.stop(reason),
        }
    }
}
