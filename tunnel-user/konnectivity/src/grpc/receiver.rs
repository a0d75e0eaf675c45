//! The receiving half of a stream.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::RecvStream;
use tunnel_proto::konnectivity::{Decoder, Packet};

use super::{Code, Status, StreamEnd};
use cpc_datapath::Budget;
use cpc_datapath::budget::Charge;

/// Bytes of an incomplete message that are part of a stream's fixed cost.
const FREE: usize = 64 << 10;

/// A receiver of the packets of a stream. The peer has its credit back once all packets of an HTTP/2
/// frame have been taken and another one is requested.
#[derive(Debug)]
pub(crate) struct PacketReceiver {
    stream: RecvStream,
    decoder: Decoder,
    /// Received data that is not decoded.
    chunk: Bytes,
    /// Bytes whose credit the peer does not have back.
    held: usize,
    /// Charge for an incomplete message.
    charge: Option<Charge>,
}

impl PacketReceiver {
    pub(super) fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            decoder: Decoder::default(),
            chunk: Bytes::new(),
            held: 0,
            charge: None,
        }
    }

    /// Charges `budget` for the received part of an incomplete message.
    pub(crate) fn charge_to(&mut self, budget: &Budget) {
        self.charge = Some(Charge::new(budget.clone()));
    }

    /// Waits for the next packet; `None` is the orderly end. Cancelling loses nothing.
    ///
    /// # Errors
    /// [`StreamEnd`]; nothing follows.
    pub(crate) async fn next(&mut self) -> Result<Option<Packet>, StreamEnd> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Polls for the next packet as [`next`](Self::next) does, for several futures of one task.
    ///
    /// # Errors
    /// [`StreamEnd`]; nothing follows.
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Packet>, StreamEnd>> {
        loop {
            if let Some(packet) = self.decoder.decode(&mut self.chunk)? {
                // The packet is its taker's now.
                if let Some(charge) = &mut self.charge {
                    charge.set(0);
                }
                return Poll::Ready(Ok(Some(packet)));
            }
            let held = self.decoder.held();
            let held = if held > FREE { held as u64 } else { 0 };
            if self.charge.as_mut().is_some_and(|charge| !charge.set(held)) {
                return Poll::Ready(Err(StreamEnd::NoMemory));
            }
            // All that was received has been taken, or is the head of one message: the decoder
            // bounds that, and without credit its rest could not come.
            self.give_credit();
            match ready!(self.stream.poll_data(cx)) {
                Some(chunk) => {
                    self.chunk = chunk?;
                    self.held = self.chunk.len();
                }
                None => return self.poll_end(cx),
            }
        }
    }

    fn give_credit(&mut self) {
        let held = std::mem::take(&mut self.held);
        // Fails only where more is released than was received.
        let _ = self.stream.flow_control().release_capacity(held);
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Packet>, StreamEnd>> {
        if !self.decoder.is_at_border() {
            return Poll::Ready(Err(StreamEnd::Truncated));
        }
        let trailers = ready!(self.stream.poll_trailers(cx))?;
        Poll::Ready(match trailers.as_ref().and_then(Status::read) {
            Some(status) if status.code != Code::OK => Err(StreamEnd::Status(status)),
            _ => Ok(None),
        })
    }
}
