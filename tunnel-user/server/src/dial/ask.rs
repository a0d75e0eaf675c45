//! The exchange with one agent: opens a stream, carries the client's early bytes, waits for the answer.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::{DialRequest, DialResponse};

use super::error::{DialError, Failed};
use super::plan::{Failure, Plan};
use crate::early::{Cursor, EarlyBytes, EarlyEvent};
use crate::link::bridge::far;
use crate::link::{Answered, LinkRecv, LinkSend};
use crate::routes::LinkInfo;
use crate::shard::Shard;
use cpc_datapath::LocalSocket;
use cpc_datapath::stream::{RecvEnd, RecvHalf, SendHalf};
use cpc_observe::metrics::Closer;
use cpc_transport::tunnel::HeadError;

/// One request to one agent.
pub(super) struct Exchange<'a, L> {
    /// The shard that asks.
    pub shard: &'a Rc<Shard>,
    /// The agent's link, on any shard.
    pub link: &'a LinkInfo,
    /// The request.
    pub request: &'a DialRequest,
    /// The client.
    pub local: &'a L,
}

/// The end of the wait for an answer.
enum Answer {
    /// The agent's answer, or the end of the stream.
    Received(Result<DialResponse, HeadError>),
    /// The plan abandons the stream.
    Abandoned,
    /// The client has gone.
    ClientGone,
}

impl<L: LocalSocket> Exchange<'_, L> {
    /// Asks the agent. `plan` learns when the stream is about to carry the client's first byte; when
    /// `suspicion` completes, it decides whether the stream is given up.
    pub(super) async fn run(
        &self,
        plan: &mut Plan<Arc<LinkInfo>, DialError>,
        early: &mut EarlyBytes,
        cursor: &mut Cursor,
        suspicion: impl Future<Output = ()>,
    ) -> Result<(LinkSend, LinkRecv), Failed> {
        let opened = self.open().await;
        let (mut send, mut recv) = opened.map_err(|reason| self.lost(reason))?;
        let answer = {
            let mut answer = pin!(recv.answer());
            let mut suspicion = pin!(suspicion);
            let mut is_suspected = false;
            loop {
                let stream = self.link.sends_early().then_some(&mut send);
                tokio::select! {
                    // An answer that is there counts, whatever else has happened.
                    biased;
                    answer = &mut answer => break Answer::Received(answer),
                    event = early.pump(self.local, stream, cursor) => match event {
                        EarlyEvent::BeforeFirstByte => plan.first_byte(),
                        EarlyEvent::ClientGone => break Answer::ClientGone,
                        // The agent takes no more: its answer says why.
                        EarlyEvent::StreamEnded => break Answer::Received(answer.await),
                    },
                    () = &mut suspicion, if !is_suspected => {
                        if plan.may_abandon() {
                            break Answer::Abandoned;
                        }
                        is_suspected = true;
                    }
                }
            }
        };
        let (reason, failed) = match answer {
            Answer::Received(Ok(DialResponse::Connected)) => return Ok((send, recv)),
            Answer::Received(Ok(DialResponse::Refused { reason, detail })) => {
                (reason, self.refused(reason, detail))
            }
            // The stream has ended: there is nothing to reset.
            Answer::Received(Err(error)) => return Err(self.lost(end_reason(&error))),
            Answer::Abandoned => (CloseReason::Cancelled, self.abandoned()),
            Answer::ClientGone => (CloseReason::Cancelled, client_gone()),
        };
        send.reset(reason);
        recv.stop(reason);
        Err(failed)
    }

    async fn open(&self) -> Result<(LinkSend, LinkRecv), CloseReason> {
        let Self {
            shard,
            link,
            request,
            ..
        } = self;
        if link.shard == shard.index {
            // The link may have ended since the routes were published.
            let link = shard.links.borrow().get(&link.id).cloned();
            return link.ok_or(CloseReason::LinkLost)?.open(request).await;
        }
        let (send, recv) = far::open(shard, link, request);
        Ok((LinkSend::foreign(send), LinkRecv::foreign(recv)))
    }

    fn refused(&self, reason: CloseReason, detail: String) -> Failed {
        let agent = (self.link.kind, &*self.link.identity.name);
        Failed {
            failure: Failure::Refused(reason),
            error: DialError::refused(agent, &self.request.destination, reason, detail),
        }
    }

    fn lost(&self, reason: CloseReason) -> Failed {
        Failed {
            failure: Failure::Lost(reason),
            error: self.tunnel_error(reason),
        }
    }

    fn abandoned(&self) -> Failed {
        Failed {
            failure: Failure::Abandoned,
            error: self.tunnel_error(CloseReason::DialTimeout),
        }
    }

    fn tunnel_error(&self, reason: CloseReason) -> DialError {
        let agent = &self.link.identity.name;
        let text = format!("the tunnel to {agent} was lost while dialling: {reason}");
        DialError::new(reason, Closer::Tunnel, text)
    }
}

fn client_gone() -> Failed {
    let text = "the client went away while its connection was dialled";
    Failed {
        failure: Failure::ClientGone,
        error: DialError::new(CloseReason::Cancelled, Closer::Client, text),
    }
}

/// The reason behind the end of a stream without an answer.
fn end_reason(error: &HeadError) -> CloseReason {
    match error {
        HeadError::Malformed(_) => CloseReason::ProtocolError,
        HeadError::End(RecvEnd::Finished) => CloseReason::LinkLost,
        HeadError::End(RecvEnd::Reset(reason) | RecvEnd::Link(reason)) => *reason,
    }
}
