//! Halves of a dial that are no stream of a tunnel. They and their futures are boxed, so that a connection
//! over a tunnel, the usual one, does not pay for their size.

use std::fmt;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use tunnel_proto::close::CloseReason;

use super::answer::{Answer, Answered};
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};

/// The object-safe form of a [`SendHalf`].
trait DynSend: fmt::Debug {
    fn send<'a>(&'a mut self, chunk: &'a mut Bytes) -> LocalBoxFuture<'a, Result<(), SendEnd>>;
    fn finish(&mut self);
    fn lingers(&self) -> bool;
    fn finish_half(&mut self);
    fn reset(&mut self, reason: CloseReason);
    fn stopped(&self) -> LocalBoxFuture<'static, SendEnd>;
}

impl<H: SendHalf + fmt::Debug + 'static> DynSend for H {
    fn send<'a>(&'a mut self, chunk: &'a mut Bytes) -> LocalBoxFuture<'a, Result<(), SendEnd>> {
        Box::pin(SendHalf::send(self, chunk))
    }

    fn finish(&mut self) {
        SendHalf::finish(self);
    }

    fn lingers(&self) -> bool {
        SendHalf::lingers(self)
    }

    fn finish_half(&mut self) {
        SendHalf::finish_half(self);
    }

    fn reset(&mut self, reason: CloseReason) {
        SendHalf::reset(self, reason);
    }

    fn stopped(&self) -> LocalBoxFuture<'static, SendEnd> {
        Box::pin(SendHalf::stopped(self))
    }
}

/// The object-safe form of a [`RecvHalf`] behind an agent's answer.
trait DynRecv: fmt::Debug {
    fn answer(&mut self) -> LocalBoxFuture<'_, Answer>;
    fn recv<'a>(&'a mut self, into: &'a mut Vec<Bytes>) -> LocalBoxFuture<'a, Result<(), RecvEnd>>;
    fn reset(&mut self) -> LocalBoxFuture<'_, CloseReason>;
    fn stop(&mut self, reason: CloseReason);
    fn is_charged(&self) -> bool;
}

impl<H: Answered + fmt::Debug + 'static> DynRecv for H {
    fn answer(&mut self) -> LocalBoxFuture<'_, Answer> {
        Box::pin(Answered::answer(self))
    }

    fn recv<'a>(&'a mut self, into: &'a mut Vec<Bytes>) -> LocalBoxFuture<'a, Result<(), RecvEnd>> {
        Box::pin(RecvHalf::recv(self, into))
    }

    fn reset(&mut self) -> LocalBoxFuture<'_, CloseReason> {
        Box::pin(RecvHalf::reset(self))
    }

    fn stop(&mut self, reason: CloseReason) {
        RecvHalf::stop(self, reason);
    }

    fn is_charged(&self) -> bool {
        RecvHalf::is_charged(self)
    }
}

/// A boxed sending half.
#[derive(Debug)]
pub struct ForeignSend(Box<dyn DynSend>);

/// A boxed receiving half.
#[derive(Debug)]
pub struct ForeignRecv(Box<dyn DynRecv>);

impl ForeignSend {
    /// Boxes a half.
    pub(crate) fn new(half: impl SendHalf + fmt::Debug + 'static) -> Self {
        Self(Box::new(half))
    }
}

impl ForeignRecv {
    /// Boxes a half.
    pub(crate) fn new(half: impl Answered + fmt::Debug + 'static) -> Self {
        Self(Box::new(half))
    }
}

impl SendHalf for ForeignSend {
    fn send<'a>(&'a mut self, chunk: &'a mut Bytes) -> impl Future<Output = Result<(), SendEnd>> {
        self.0.send(chunk)
    }

    fn finish(&mut self) {
        self.0.finish();
    }

    fn lingers(&self) -> bool {
        self.0.lingers()
    }

    fn finish_half(&mut self) {
        self.0.finish_half();
    }

    fn reset(&mut self, reason: CloseReason) {
        self.0.reset(reason);
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        self.0.stopped()
    }
}

impl Answered for ForeignRecv {
    fn answer(&mut self) -> impl Future<Output = Answer> {
        self.0.answer()
    }
}

impl RecvHalf for ForeignRecv {
    fn recv<'a>(
        &'a mut self,
        into: &'a mut Vec<Bytes>,
    ) -> impl Future<Output = Result<(), RecvEnd>> {
        self.0.recv(into)
    }

    fn reset(&mut self) -> impl Future<Output = CloseReason> {
        self.0.reset()
    }

    fn stop(&mut self, reason: CloseReason) {
        self.0.stop(reason);
    }

    fn is_charged(&self) -> bool {
        self.0.is_charged()
    }
}
