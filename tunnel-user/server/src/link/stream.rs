//! The halves of one dial, over any kind of link.

use std::fmt;

use bytes::Bytes;
use futures_util::future::Either;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::DialResponse;

use super::answer::{Answer, Answered};
use super::foreign::{ForeignRecv, ForeignSend};
use cpc_datapath::stream::{Held, RecvEnd, RecvHalf, SendEnd, SendHalf};
use cpc_session::{SessionRecv, SessionSend};
use cpc_transport::tunnel::TunnelRecv;

/// The half towards the target.
#[derive(Debug)]
pub enum LinkSend {
    /// A stream of a tunnel.
    Tunnel(SessionSend),
    /// A half of any other kind.
    Foreign(ForeignSend),
}

/// The half from the target, behind the agent's answer.
#[derive(Debug)]
pub enum LinkRecv {
    /// A stream of a tunnel.
    Tunnel(SessionRecv),
    /// A half of any other kind.
    Foreign(ForeignRecv),
}

impl LinkSend {
    /// Keeps a session on its tunnel for as long as that is there.
    pub(crate) fn fix(&self) {
        if let Self::Tunnel(send) = self
            && let Some(session) = send.session()
        {
            session.fix();
        }
    }

    /// Boxes a half that is no stream of a tunnel.
    pub fn foreign(half: impl SendHalf + fmt::Debug + 'static) -> Self {
        Self::Foreign(ForeignSend::new(half))
    }
}

impl LinkRecv {
    /// Boxes a half that is no stream of a tunnel.
    pub fn foreign(half: impl Answered + fmt::Debug + 'static) -> Self {
        Self::Foreign(ForeignRecv::new(half))
    }
}

impl Answered for LinkRecv {
    async fn answer(&mut self) -> Answer {
        match self {
            Self::Tunnel(recv) => {
                let answer = recv.stream().read_head(DialResponse::decode).await;
                if let Ok(DialResponse::Connected) = answer {
                    recv.begun();
                }
                answer
            }
            Self::Foreign(recv) => recv.answer().await,
        }
    }
}

impl SendHalf for LinkSend {
    fn send<'a>(&'a mut self, chunk: &'a mut Bytes) -> impl Future<Output = Result<(), SendEnd>> {
        match self {
            Self::Tunnel(send) => Either::Left(send.send(chunk)),
            Self::Foreign(send) => Either::Right(send.send(chunk)),
        }
    }

    fn finish(&mut self) {
        match self {
            Self::Tunnel(send) => send.finish(),
            Self::Foreign(send) => send.finish(),
        }
    }

    fn lingers(&self) -> bool {
        match self {
            Self::Tunnel(send) => send.lingers(),
            Self::Foreign(send) => send.lingers(),
        }
    }

    fn finish_half(&mut self) {
        match self {
            Self::Tunnel(send) => send.finish_half(),
            Self::Foreign(send) => send.finish_half(),
        }
    }

    fn reset(&mut self, reason: CloseReason) {
        match self {
            Self::Tunnel(send) => send.reset(reason),
            Self::Foreign(send) => send.reset(reason),
        }
    }

    fn held(&self) -> Option<Held> {
        match self {
            Self::Tunnel(send) => send.held(),
            Self::Foreign(_) => None,
        }
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        match self {
            Self::Tunnel(send) => Either::Left(send.stopped()),
            Self::Foreign(send) => Either::Right(send.stopped()),
        }
    }
}

impl RecvHalf for LinkRecv {
    fn recv<'a>(
        &'a mut self,
        into: &'a mut Vec<Bytes>,
    ) -> impl Future<Output = Result<(), RecvEnd>> {
        match self {
            Self::Tunnel(recv) => Either::Left(recv.recv(into)),
            Self::Foreign(recv) => Either::Right(recv.recv(into)),
        }
    }

    fn reset(&mut self) -> impl Future<Output = CloseReason> {
        match self {
            Self::Tunnel(recv) => Either::Left(recv.reset()),
            Self::Foreign(recv) => Either::Right(recv.reset()),
        }
    }

    fn stop(&mut self, reason: CloseReason) {
        match self {
            Self::Tunnel(recv) => recv.stop(reason),
            Self::Foreign(recv) => recv.stop(reason),
        }
    }

    fn lost(&self) -> impl Future<Output = CloseReason> + use<> {
        match self {
            Self::Tunnel(recv) => Either::Left(recv.lost()),
            Self::Foreign(_) => Either::Right(std::future::pending()),
        }
    }

    fn accepted(&mut self, n: usize) {
        match self {
            Self::Tunnel(recv) => recv.accepted(n),
            Self::Foreign(recv) => recv.accepted(n),
        }
    }

    fn finished(&mut self) {
        match self {
            Self::Tunnel(recv) => recv.finished(),
            Self::Foreign(recv) => recv.finished(),
        }
    }

    fn is_charged(&self) -> bool {
        match self {
            Self::Tunnel(recv) => recv.is_charged(),
            Self::Foreign(recv) => recv.is_charged(),
        }
    }
}
