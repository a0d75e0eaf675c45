//! One dial: choose a link, ask its agent, and if that is safe ask another.
//!
//! Invariant: a request never runs twice. Another agent is asked only when the first one answered
//! that it did not dial, or when nothing of the client's had been sent on its stream.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use tokio::time::{Instant, sleep, timeout_at};
use tunnel_proto::close::{CloseClass, CloseReason};
use tunnel_proto::preface::{ConnectionId, DialRequest, DialResponse, Host, StreamKind};

use super::early::{Cursor, EarlyBytes, EarlyEnd};
use super::routes::{LinkInfo, RouteError};
use super::shard::Shard;
use crate::datapath::stream::{RecvEnd, RecvHalf, SendEnd, SendHalf};
use crate::datapath::{LocalSocket, Outbound};
use crate::process::lifecycle::Phase;
use crate::telemetry::access::Record;
use crate::telemetry::metrics::Closer;
use crate::tls::TrustDomain;
use crate::transport::stream::{HeadError, Recv, Send};

/// Agents are back so soon after a server's start.
const HOMECOMING: Duration = Duration::from_secs(3);

/// How often is looked whether they are.
const HOMECOMING_POLL: Duration = Duration::from_millis(20);

/// A dial that succeeded.
#[derive(Debug)]
pub(super) struct Dialled {
    /// Towards the target.
    pub send: Send,
    /// From the target.
    pub recv: Recv,
    /// What the target is still to be given.
    pub rest: Outbound,
    /// How many bytes it has been given.
    pub given: usize,
    /// Who serves it, where it counts from its first packet.
    pub on_link: OnLink,
}

/// A dial that failed. `Display` is for the person who asked.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(super) struct DialError {
    /// Why.
    pub reason: CloseReason,
    /// Whose doing it was.
    pub by: Closer,
    text: String,
}

impl DialError {
    /// A failure with a text of its own.
    pub(super) fn new(reason: CloseReason, by: Closer, text: impl Into<String>) -> Self {
        Self {
            reason,
            by,
            text: text.into(),
        }
    }
}

/// One try, and whether another may follow.
struct Failed {
    error: DialError,
    safe: bool,
}

/// Dials `record`'s destination for a client of `tenant`.
///
/// # Errors
/// [`DialError`]; the client has been sent nothing.
pub(super) async fn dial(
    shard: &Rc<Shard>,
    record: &mut Record,
    tenant: &TrustDomain,
    local: &impl LocalSocket,
    mut early: EarlyBytes,
) -> Result<Dialled, DialError> {
    let deadline = Instant::now() + shard.limits.dial_timeout;
    let candidates = candidates(shard, tenant, &record.destination.host, deadline).await;
    let candidates = candidates.map_err(|e| no_route(e, record))?;
    let mut last = None;
    let count = candidates.len();
    for (attempt, info) in (0..).zip(candidates) {
        record.peer = Some(info.identity.name.to_string());
        let left = deadline.saturating_duration_since(Instant::now());
        let request = DialRequest {
            kind: StreamKind::Tcp,
            id: record.id,
            destination: record.destination.clone(),
            deadline: left,
            attempt,
        };
        let is_last = usize::from(attempt) + 1 == count;
        let patience = (!is_last).then_some(left / 3);
        let on_link = OnLink::new(info.clone());
        let mut cursor = Cursor::default();
        let tried = try_link(
            shard,
            &info,
            &request,
            local,
            (&mut early, &mut cursor),
            patience,
        );
        let failed = match timeout_at(deadline, tried).await {
            Ok(Ok((send, recv))) => {
                let (rest, given) = early.rest(cursor);
                return Ok(Dialled {
                    send,
                    recv,
                    rest,
                    given,
                    on_link,
                });
            }
            Ok(Err(failed)) => failed,
            Err(_) => return Err(too_late(shard, record)),
        };
        if !failed.safe {
            return Err(failed.error);
        }
        tracing::debug!(agent = %info.identity, error = %failed.error, "trying another agent");
        last = Some(failed.error);
    }
    Err(last.unwrap_or_else(|| no_route(RouteError::NoRoute, record)))
}

/// Who serves `host`. A server that has just started waits for its agents to come back: what waited
/// for it in the backlog of a listener is not to be refused for their absence.
async fn candidates(
    shard: &Shard,
    tenant: &TrustDomain,
    host: &Host,
    deadline: Instant,
) -> Result<Vec<Arc<LinkInfo>>, RouteError> {
    let until = deadline.min(shard.started + HOMECOMING);
    loop {
        let found = shard.control.routes().candidates(tenant, host);
        if found.is_ok() || Instant::now() >= until || *shard.phase.borrow() != Phase::Running {
            return found;
        }
        sleep(HOMECOMING_POLL).await;
    }
}

/// Asks one agent. With `patience` there is another one to ask: a link that falls silent, or has
/// not answered by then, is given up while that is safe.
async fn try_link(
    shard: &Shard,
    info: &LinkInfo,
    request: &DialRequest,
    local: &impl LocalSocket,
    (early, cursor): (&mut EarlyBytes, &mut Cursor),
    patience: Option<Duration>,
) -> Result<(Send, Recv), Failed> {
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
    // Its link may have ended since the routes were published.
    let link = shard.links.borrow().get(&info.id).cloned();
    let link = link.ok_or_else(|| lost(CloseReason::LinkLost, true))?;
    let (mut send, mut recv) = link.open().await.map_err(|reason| lost(reason, true))?;
    let mut preface = BytesMut::new();
    request.encode(&mut preface);
    let mut preface = preface.freeze();
    send.send(&mut preface)
        .await
        .map_err(|end| lost(end_reason(end), true))?;

    let touched = cursor.touched.clone();
    let hopeless = async {
        let Some(patience) = patience else {
            return std::future::pending().await;
        };
        tokio::select! {
            () = link.silenced.notified() => {}
            () = sleep(patience) => {}
        }
        if touched.get() {
            std::future::pending().await
        }
    };
    let answer = {
        let mut answer = pin!(recv.read_head(DialResponse::decode));
        tokio::select! {
            // An answer that is there counts, whatever else has happened.
            biased;
            answer = &mut answer => Answer::Given(answer),
            end = early.pump(local, &mut send, cursor) => match end {
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
            let detail = if detail.is_empty() {
                reason.to_string()
            } else {
                printable(&detail)
            };
            let text = format!("{}: {detail}", info.identity.name);
            send.reset(reason);
            recv.stop(reason);
            Err(Failed {
                error: DialError::new(reason, Closer::Agent, text),
                safe: reason.class() == CloseClass::NotDialled,
            })
        }
        Answer::Given(Err(error)) => {
            let reason = match &error {
                HeadError::Malformed(_) => CloseReason::ProtocolError,
                HeadError::End(RecvEnd::Finished) => CloseReason::LinkLost,
                HeadError::End(RecvEnd::Reset(reason) | RecvEnd::Link(reason)) => *reason,
            };
            // A tunnel that its agent declines serves no stream.
            let declined = reason == CloseReason::DuplicateServer;
            Err(lost(reason, declined || !touched.get()))
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

fn end_reason(end: SendEnd) -> CloseReason {
    match end {
        SendEnd::Acknowledged => CloseReason::Internal,
        SendEnd::Stopped(reason) | SendEnd::Link(reason) => reason,
    }
}

fn no_route(error: RouteError, record: &Record) -> DialError {
    let host = &record.destination.host;
    match error {
        RouteError::NoRoute => DialError::new(
            CloseReason::NoRoute,
            Closer::Server,
            format!("no agent serves {host}"),
        ),
        RouteError::NoAgent(departed) => {
            let ago = SystemTime::now()
                .duration_since(departed.last_seen)
                .unwrap_or_default();
            let ago = humantime::format_duration(Duration::from_secs(ago.as_secs()));
            let text = format!(
                "agent {} is not connected (last seen {ago} ago)",
                departed.name
            );
            DialError::new(CloseReason::NoAgent, Closer::Server, text)
        }
    }
}

fn too_late(shard: &Shard, record: &Record) -> DialError {
    let limit = humantime::format_duration(shard.limits.dial_timeout);
    let peer = record.peer.as_deref().unwrap_or("no agent");
    let text = format!(
        "{} did not answer within {limit} (asked {peer})",
        record.destination
    );
    DialError::new(CloseReason::DialTimeout, Closer::Target, text)
}

/// A peer's text, for a line of a log or of HTTP.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// A fresh connection id.
pub(super) fn connection_id() -> ConnectionId {
    let mut id = [0; 16];
    // Ids are for logs: without random numbers they repeat, and TLS has failed before.
    let _ = aws_lc_rs::rand::fill(&mut id);
    ConnectionId(id)
}

/// Counts a stream on its link until it is dropped.
#[derive(Debug)]
pub(super) struct OnLink(Arc<LinkInfo>);

impl OnLink {
    /// Counts one.
    pub(super) fn new(link: Arc<LinkInfo>) -> Self {
        link.streams.fetch_add(1, Ordering::Relaxed);
        Self(link)
    }
}

impl std::ops::Deref for OnLink {
    type Target = LinkInfo;

    fn deref(&self) -> &LinkInfo {
        &self.0
    }
}

impl Drop for OnLink {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}
