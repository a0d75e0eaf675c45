//! The end of a bridge on the link's shard.

use std::rc::Rc;

use bytes::Bytes;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::{DialRequest, DialResponse};

use super::{BridgeRecv, BridgeSend, Inward, Order, Outward, inward, outward};
use crate::link::Link;
use crate::link::answer::Answered;
use crate::routes::LinkInfo;
use crate::shard::Shard;
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use cpc_transport::tunnel::HeadError;

/// Sends `request` on a link of another shard.
pub(crate) fn open(
    shard: &Rc<Shard>,
    link: &LinkInfo,
    request: &DialRequest,
) -> (BridgeSend, BridgeRecv) {
    let (send, outward) = outward();
    let (recv, inward) = inward();
    let (id, request) = (link.id, request.clone());
    shard.run_on(link.shard, move |shard| async move {
        let link = shard.links.borrow().get(&id).cloned();
        serve(link, &request, outward, inward).await;
    });
    (send, recv)
}

/// Opens a stream on `link` and carries data until both directions have ended, or the client's shard
/// gives up.
async fn serve(link: Option<Link>, request: &DialRequest, outward: Outward, mut inward: Inward) {
    let opened = async {
        match link {
            Some(link) => link.open(request).await,
            None => Err(CloseReason::LinkLost),
        }
    };
    let opened = tokio::select! {
        opened = opened => opened,
        () = inward.answer.closed() => return,
    };
    match opened {
        Ok((mut send, recv)) => {
            // The client is on another shard, and ends with the link.
            send.fix();
            // The sending half lives as long as the other one: a session ends with it.
            tokio::join!(carry_out(&mut send, outward), carry_in(recv, inward));
        }
        Err(reason) => {
            outward.end.send_replace(Some(SendEnd::Link(reason)));
            let lost = HeadError::End(RecvEnd::Link(reason));
            let _ = inward.answer.send(Err(lost));
        }
    }
}

/// Carries data to the target, for as long as the client's half lives, even behind its end. Dropping `send` ends it
/// without a report.
pub(super) async fn carry_out(send: &mut impl SendHalf, outward: Outward) {
    let Outward {
        mut chunks,
        mut orders,
        end,
    } = outward;
    let mut stopped = std::pin::pin!(send.stopped());
    let mut chunk = Bytes::new();
    // How it is to be finished, whether the last chunk has come, and whether it was.
    let (mut ordered, mut is_last, mut finished) = (None, false, false);
    let mut heard = true;
    let ended = loop {
        if let Some(half) = ordered
            && is_last
            && chunk.is_empty()
            && !finished
        {
            finished = true;
            finish(send, half);
        }
        // Finished and forgotten: what was sent still arrives.
        if finished && !heard {
            return;
        }
        tokio::select! {
            biased;
            order = orders.recv(), if heard => match order {
                Some(Order::Finish) => ordered = Some(false),
                Some(Order::FinishHalf) => ordered = Some(true),
                Some(Order::Reset(reason)) => return send.reset(reason),
                None if ordered.is_some() => heard = false,
                None => return,
            },
            sent = send.send(&mut chunk), if !chunk.is_empty() => if let Err(end) = sent {
                break end;
            },
            end = &mut stopped => break end,
            next = chunks.recv(), if chunk.is_empty() && !is_last => match next {
                Some(next) => chunk = next,
                None => is_last = true,
            },
        }
    };
    end.send_replace(Some(ended));
    // Who still sends is to find out.
    drop(chunks);
    while let Some(order) = orders.recv().await {
        match order {
            Order::Finish => finish(send, false),
            Order::FinishHalf => finish(send, true),
            Order::Reset(reason) => send.reset(reason),
        }
    }
}

fn finish(send: &mut impl SendHalf, half: bool) {
    if half {
        send.finish_half();
    } else {
        send.finish();
    }
}

/// Carries data from the target. `recv` lives for as long as the client's half does.
pub(super) async fn carry_in(mut recv: impl Answered, inward: Inward) {
    let Inward {
        batches,
        answer,
        end,
        mut stop,
    } = inward;
    let answered = tokio::select! {
        biased;
        reason = &mut stop => return stopped(recv, reason.ok()),
        answered = recv.answer() => answered,
    };
    let connected = matches!(answered, Ok(DialResponse::Connected));
    if answer.send(answered).is_err() {
        return;
    }
    if !connected {
        // The requester returns the halves.
        return stopped(recv, stop.await.ok());
    }
    let mut chunks = Vec::new();
    let ended = loop {
        tokio::select! {
            biased;
            reason = &mut stop => return stopped(recv, reason.ok()),
            received = recv.recv(&mut chunks) => if let Err(end) = received {
                break end;
            },
        }
        tokio::select! {
            biased;
            reason = &mut stop => return stopped(recv, reason.ok()),
            place = batches.reserve() => match place {
                Ok(place) => {
                    let bytes = chunks.iter().map(Bytes::len).sum();
                    place.send(std::mem::take(&mut chunks));
                    // The queue is short: what lies in it is as good as taken.
                    recv.accepted(bytes);
                }
                Err(_) => return,
            },
            // A reader that has stopped must not keep what its target has taken back.
            reason = recv.reset() => break RecvEnd::Reset(reason),
        }
    };
    if ended == RecvEnd::Finished {
        recv.finished();
    }
    // Before the queue is closed: a reader of all data then asks for the end.
    end.send_replace(Some(ended));
    drop(batches);
    stopped(recv, stop.await.ok());
}

/// Stops reading. Without a reason the drop does that.
fn stopped(mut recv: impl RecvHalf, reason: Option<CloseReason>) {
    if let Some(reason) = reason {
        recv.stop(reason);
    }
}
