//! Asks one agent over its link.

use std::pin::pin;
use std::rc::Rc;

use tunnel_proto::close::{CloseClass, CloseReason};
use tunnel_proto::preface::{DialRequest, DialResponse};

use super::DialError;
use crate::early::{Cursor, EarlyBytes, EarlyEnd};
use crate::link::{LinkRecv, LinkSend, bridge};
use crate::routes::LinkInfo;
use crate::shard::Shard;
use cpc_datapath::LocalSocket;
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendHalf};
use cpc_observe::metrics::Closer;
use cpc_transport::quic::HeadError;

/// One try, and whether another may follow.
pub(super) struct Failed {
    pub(super) error: DialError,
    pub(super) safe: bool,
}

/// Asks one agent. When `doubt` completes there is another one to ask, and the link is given up while
/// that is safe.
pub(super) async fn try_link(
    shard: &Rc<Shard>,
    info: &LinkInfo,
    request: &DialRequest,
    local: &impl LocalSocket,
    (early, cursor): (&mut EarlyBytes, &mut Cursor),
    doubt: impl Future<Output = ()>,
) -> Result<(LinkSend, LinkRecv), Failed> {
    let lost = |reason: CloseReason, safe| Failed {
        error: DialError::new(
            reason,
            Closer::Tunnel,
            format!(
                "the tunnel to {} was lost while dialling: {reason}",
                info.identity.name
            ),
        ),
        safe,
    };
    let opened = if info.shard == shard.index {
        // Its link may have ended since the routes were published.
        let link = shard.links.borrow().get(&info.id).cloned();
        let link = link.ok_or_else(|| lost(CloseReason::LinkLost, true))?;
        link.open(request).await
    } else {
        let (send, recv) = bridge::open(shard, info, request);
        Ok((
            LinkSend::Bridge(Box::new(send)),
            LinkRecv::Bridge(Box::new(recv)),
        ))
    };
    let (mut send, mut recv) = opened.map_err(|reason| lost(reason, true))?;

    let touched = cursor.touched.clone();
    let hopeless = async {
        doubt.await;
        if touched.get() {
            std::future::pending().await
        }
    };
    let answer = {
        let mut answer = pin!(recv.answer());
        let stream = info.sends_early().then_some(&mut send);
        tokio::select! {
            // An answer that is there counts, whatever else has happened.
            biased;
            answer = &mut answer => Answer::Given(answer),
            end = early.pump(local, stream, cursor) => match end {
                EarlyEnd::Client => Answer::Unwanted,
                // The agent takes no more: its answer says why.
                EarlyEnd::Stream(_) => Answer::Given(answer.await),
            },
            () = hopeless => Answer::Missing,
        }
    };
    match answer {
        Answer::Given(Ok(DialResponse::Connected)) => Ok((send, recv)),
        Answer::Given(Ok(DialResponse::Refused { reason, detail })) => {
            let agent = (info.kind, &*info.identity.name);
            send.reset(reason);
            recv.stop(reason);
            Err(Failed {
                error: DialError::refused(agent, &request.destination, reason, detail),
                safe: reason.class() == CloseClass::NotDialled,
            })
        }
        Answer::Given(Err(error)) => {
            let reason = match &error {
                HeadError::Malformed(_) => CloseReason::ProtocolError,
                HeadError::End(RecvEnd::Finished) => CloseReason::LinkLost,
                HeadError::End(RecvEnd::Reset(reason) | RecvEnd::Link(reason)) => *reason,
            };
            // A tunnel that its agent declines serves no stream, and an agent that ends for want of
            // anything to serve has dialled nothing that it did not answer.
            let unserved = [CloseReason::DuplicateServer, CloseReason::Draining].contains(&reason);
            Err(lost(reason, unserved || !touched.get()))
        }
        Answer::Missing => {
            send.reset(CloseReason::Cancelled);
            recv.stop(CloseReason::Cancelled);
            Err(lost(CloseReason::DialTimeout, true))
        }
        Answer::Unwanted => {
            send.reset(CloseReason::Cancelled);
            recv.stop(CloseReason::Cancelled);
            let text = "the client went away while its connection was dialled";
            Err(Failed {
                error: DialError::new(CloseReason::Cancelled, Closer::Client, text),
                safe: false,
            })
        }
    }
}

/// What became of a request.
enum Answer {
    /// The agent's answer, or the end of the stream.
    Given(Result<DialResponse, HeadError>),
    /// None came in time.
    Missing,
    /// The client has gone.
    Unwanted,
}
