//! A dial on a link of another shard, for a client that can't move: one of the many on an HTTP/2
//! connection.
//!
//! The halves of the stream stay with their link. A task there carries data between them and these,
//! which the client's shard has. Nothing is lost on the way, and every wait ends. Each queue is short,
//! so that a reader who stops stalls its stream and no other. An end passes behind earlier data, a
//! reset overtakes it. When either side goes, the other sees that as with a stream.

pub(crate) mod far;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tunnel_proto::close::CloseReason;

use super::answer::{Answer, Answered};
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use cpc_transport::tunnel::HeadError;

/// Maximum number of chunks on their way to the target.
const OUTBOUND: usize = 4;

/// Maximum number of batches on their way back, each with all data that the stream had at once.
const INBOUND: usize = 2;

/// End of the sending half, behind the chunks or ahead of them.
#[derive(Clone, Copy, Debug)]
enum Order {
    Finish,
    FinishHalf,
    Reset(CloseReason),
}

/// The half towards the target; resets on drop unless finished.
#[derive(Debug)]
pub(crate) struct BridgeSend {
    /// Sender of chunks, `None` once finished.
    chunks: Option<mpsc::Sender<Bytes>>,
    orders: mpsc::UnboundedSender<Order>,
    end: watch::Receiver<Option<SendEnd>>,
}

/// The half from the target; stops it on drop.
#[derive(Debug)]
pub(crate) struct BridgeRecv {
    answer: Option<oneshot::Receiver<Answer>>,
    batches: mpsc::Receiver<Vec<Bytes>>,
    end: watch::Receiver<Option<RecvEnd>>,
    stop: Option<oneshot::Sender<CloseReason>>,
}

/// Receivers of the data from the client's shard.
struct Outward {
    chunks: mpsc::Receiver<Bytes>,
    orders: mpsc::UnboundedReceiver<Order>,
    end: watch::Sender<Option<SendEnd>>,
}

/// Senders of the data for the client's shard.
struct Inward {
    batches: mpsc::Sender<Vec<Bytes>>,
    answer: oneshot::Sender<Answer>,
    end: watch::Sender<Option<RecvEnd>>,
    stop: oneshot::Receiver<CloseReason>,
}

fn outward() -> (BridgeSend, Outward) {
    let (chunks_in, chunks) = mpsc::channel(OUTBOUND);
    let (orders_in, orders) = mpsc::unbounded_channel();
    let (end, ended) = watch::channel(None);
    let send = BridgeSend {
        chunks: Some(chunks_in),
        orders: orders_in,
        end: ended,
    };
    let outward = Outward {
        chunks,
        orders,
        end,
    };
    (send, outward)
}

fn inward() -> (BridgeRecv, Inward) {
    let (batches, batches_out) = mpsc::channel(INBOUND);
    let (answer, answered) = oneshot::channel();
    let (end, ended) = watch::channel(None);
    let (stop, stopped) = oneshot::channel();
    let recv = BridgeRecv {
        answer: Some(answered),
        batches: batches_out,
        end: ended,
        stop: Some(stop),
    };
    let inward = Inward {
        batches,
        answer,
        end,
        stop: stopped,
    };
    (recv, inward)
}

/// Returns the end that the far side reports; one that vanishes has lost its link.
async fn told(mut end: watch::Receiver<Option<SendEnd>>) -> SendEnd {
    let told = end.wait_for(Option::is_some).await;
    let told = told.ok().and_then(|end| *end);
    told.unwrap_or(SendEnd::Link(CloseReason::LinkLost))
}

impl SendHalf for BridgeSend {
    async fn send(&mut self, chunk: &mut Bytes) -> Result<(), SendEnd> {
        if chunk.is_empty() {
            return Ok(());
        }
        let Some(chunks) = &self.chunks else {
            return Err(SendEnd::Link(CloseReason::Internal));
        };
        match chunks.reserve().await {
            Ok(place) => {
                place.send(std::mem::take(chunk));
                Ok(())
            }
            Err(_) => Err(told(self.end.clone()).await),
        }
    }

    fn finish(&mut self) {
        // Who takes no orders has told its end.
        let _ = self.orders.send(Order::Finish);
        self.chunks = None;
    }

    fn lingers(&self) -> bool {
        true
    }

    fn finish_half(&mut self) {
        let _ = self.orders.send(Order::FinishHalf);
        self.chunks = None;
    }

    fn reset(&mut self, reason: CloseReason) {
        let _ = self.orders.send(Order::Reset(reason));
        self.chunks = None;
    }

    fn stopped(&self) -> impl Future<Output = SendEnd> + use<> {
        told(self.end.clone())
    }
}

impl Answered for BridgeRecv {
    async fn answer(&mut self) -> Answer {
        let lost = || HeadError::End(RecvEnd::Link(CloseReason::LinkLost));
        let Some(answer) = &mut self.answer else {
            return Err(lost());
        };
        let answered = answer.await;
        self.answer = None;
        answered.unwrap_or_else(|_| Err(lost()))
    }
}

impl RecvHalf for BridgeRecv {
    async fn recv(&mut self, into: &mut Vec<Bytes>) -> Result<(), RecvEnd> {
        match self.batches.recv().await {
            Some(batch) => {
                into.extend(batch);
                Ok(())
            }
            // Told before the queue was closed.
            None => Err(self
                .end
                .borrow()
                .unwrap_or(RecvEnd::Link(CloseReason::LinkLost))),
        }
    }

    async fn reset(&mut self) -> CloseReason {
        let is_reset = |end: &Option<RecvEnd>| matches!(end, Some(RecvEnd::Reset(_)));
        let reset = self.end.wait_for(is_reset).await.map(|end| *end);
        match reset {
            Ok(Some(RecvEnd::Reset(reason))) => reason,
            _ => std::future::pending().await,
        }
    }

    fn stop(&mut self, reason: CloseReason) {
        if let Some(stop) = self.stop.take() {
            // A half that does not receive the order has reached the end.
            let _ = stop.send(reason);
        }
    }
}

#[cfg(test)]
mod tests;
