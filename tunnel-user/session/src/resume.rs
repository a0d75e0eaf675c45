//! The exchange by which a session continues on another tunnel.

use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::timeout;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::{ResumeRequest, ResumeResponse};
use tunnel_proto::resumption::SessionKey;

use super::carried::Carried;
use super::halves::{SessionRecv, SessionSend};
use super::notices::Notices;
use super::session::Resumed;
use super::state::SessionState;
use cpc_datapath::stream::{RecvHalf, SendHalf};
use cpc_transport::tunnel::{Recv, Send, TunnelRecv};

/// Timeout of the exchange.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Outcome of an attempt to continue a session.
#[derive(Debug)]
pub enum Outcome {
    /// The session continues over these halves.
    Resumed(SessionSend, SessionRecv),
    /// The session has ended, with a reason unless it ended in order.
    Ended(Option<CloseReason>),
    /// The tunnel did not carry the exchange, or the agent asks to be asked again.
    Later(Box<SessionState>),
}

/// Asks the agent to continue `state`, a session of the server, on the stream that `open` opens. Cancelling loses the
/// session.
pub async fn resume<E>(
    open: impl Future<Output = Result<(Send, Recv), E>>,
    notices: &Rc<Notices>,
    mut state: Box<SessionState>,
) -> Outcome {
    let id = state.session.id();
    let request_state = state.resumption();
    let mut resuming = Resuming(Some(notices.number(state)));
    let Some(carried) = resuming.0.clone() else {
        return Outcome::Ended(Some(CloseReason::Internal));
    };
    carried.resuming();
    let key = SessionKey {
        id,
        number: carried.number(),
    };
    let request = ResumeRequest {
        key,
        state: request_state,
    };
    let asked = timeout(TIMEOUT, ask(open, &request)).await;
    resuming.0 = None;
    let Some((response, send, recv)) = asked.ok().flatten() else {
        return give_back(&carried);
    };
    let peer = match response {
        ResumeResponse::Resumed(peer) => Some(peer),
        ResumeResponse::Unknown => None,
        ResumeResponse::Busy => return give_back(&carried),
    };
    match carried.change(|state| state.resume(peer.as_ref())) {
        Some(Ok(Resumed::Continues(_))) => {
            let send = SessionSend::new(send, Some(carried.clone()));
            let recv = SessionRecv::new(recv, Some(carried.clone()));
            carried.resumed();
            Outcome::Resumed(send, recv)
        }
        Some(Ok(ended)) => {
            carried.expire();
            Outcome::Ended(match ended {
                Resumed::Lost(reason) => Some(reason),
                Resumed::Over | Resumed::Continues(_) => None,
            })
        }
        Some(Err(violation)) => {
            tracing::warn!(%violation, "the agent broke the protocol of sessions");
            carried.expire();
            Outcome::Ended(Some(CloseReason::ProtocolError))
        }
        None => Outcome::Ended(Some(CloseReason::Internal)),
    }
}

/// A session whose resumption is under way. It ends if that is given up.
struct Resuming(Option<Rc<Carried>>);

impl Drop for Resuming {
    fn drop(&mut self) {
        if let Some(carried) = self.0.take() {
            carried.expire();
        }
    }
}

/// The halves of a stream on which the agent was asked. If that is given up, the agent's end of the session
/// waits for another tunnel.
struct Asked(Option<(Send, Recv)>);

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some((mut send, mut recv)) = self.0.take() {
            send.reset(CloseReason::Replaced);
            recv.stop(CloseReason::Replaced);
        }
    }
}

fn give_back(carried: &Rc<Carried>) -> Outcome {
    match carried.take_back() {
        Some(state) => Outcome::Later(state),
        None => Outcome::Ended(Some(CloseReason::Internal)),
    }
}

async fn ask<E>(
    open: impl Future<Output = Result<(Send, Recv), E>>,
    request: &ResumeRequest,
) -> Option<(ResumeResponse, Send, Recv)> {
    let mut asked = Asked(Some(open.await.ok()?));
    let mut head = BytesMut::new();
    request.encode(&mut head);
    let (send, recv) = asked.0.as_mut()?;
    send.send(&mut head.freeze()).await.ok()?;
    let response = recv.read_head(ResumeResponse::decode).await.ok()?;
    let (send, recv) = asked.0.take()?;
    Some((response, send, recv))
}

/// Answers the server's `request` to continue `state`, a session of the agent.
pub async fn accept(
    (mut send, recv): (Send, Recv),
    notices: &Rc<Notices>,
    request: &ResumeRequest,
    mut state: Box<SessionState>,
) -> Outcome {
    // What was received and not written comes again.
    state.resumption();
    let resumed = state.resume(Some(&request.state));
    let answer = state.session.tell();
    let resumed = match resumed {
        Ok(resumed) => resumed,
        Err(violation) => {
            tracing::warn!(%violation, "the server broke the protocol of sessions");
            refuse(send, ResumeResponse::Unknown).await;
            return Outcome::Ended(Some(CloseReason::ProtocolError));
        }
    };
    match resumed {
        Resumed::Continues(_) => {}
        Resumed::Over => {
            refuse(send, ResumeResponse::Resumed(answer)).await;
            return Outcome::Ended(None);
        }
        Resumed::Lost(reason) => {
            refuse(send, ResumeResponse::Resumed(answer)).await;
            return Outcome::Ended(Some(reason));
        }
    }
    let Some(carried) = notices.add(request.key.number, state) else {
        tracing::warn!("the server uses the number of a session twice");
        refuse(send, ResumeResponse::Unknown).await;
        return Outcome::Ended(Some(CloseReason::ProtocolError));
    };
    // The other end is gone in case of an error: the relay sees that.
    let _ = answer_with(&mut send, ResumeResponse::Resumed(answer)).await;
    carried.resumed();
    let send = SessionSend::new(send, Some(carried.clone()));
    let recv = SessionRecv::new(recv, Some(carried));
    Outcome::Resumed(send, recv)
}

/// Ends the stream of a session without a connection: both directions of it have ended before.
pub fn close((mut send, mut recv): (SessionSend, SessionRecv)) {
    send.finish();
    recv.stop(CloseReason::PeerGone);
}

/// Answers a request without a session to continue.
pub async fn refuse(mut send: Send, response: ResumeResponse) {
    if answer_with(&mut send, response).await.is_ok() {
        send.finish();
    }
}

async fn answer_with(send: &mut Send, response: ResumeResponse) -> Result<(), ()> {
    let mut bytes = BytesMut::new();
    response.encode(&mut bytes);
    send.send(&mut bytes.freeze()).await.map_err(drop)
}
