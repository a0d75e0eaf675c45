//! One dial: choose a link, ask its agent, and if that is safe ask another.
//!
//! Invariant: a request never runs twice. Another agent is asked only when the first one answered
//! that it did not dial, or when nothing of the client's had been sent on its stream.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep, timeout_at};
use tunnel_proto::close::{CloseClass, CloseReason};
use tunnel_proto::konnectivity::text::go_error;
use tunnel_proto::preface::{
    ConnectionId, Destination, DialRequest, DialResponse, Host, StreamKind,
};

use super::early::{Cursor, EarlyBytes, EarlyEnd};
use super::link::{LinkRecv, LinkSend};
use super::routes::{LinkInfo, LinkKind, RouteError};
use super::shard::Shard;
use crate::datapath::stream::{RecvEnd, RecvHalf, SendHalf};
use crate::datapath::{LocalSocket, Outbound};
use crate::process::lifecycle::Phase;
use crate::telemetry::access::Record;
use crate::telemetry::konnectivity::DialFailure;
use crate::telemetry::metrics::Closer;
use crate::tls::TrustDomain;
use crate::transport::stream::HeadError;

/// Agents are back so soon after a server's start.
const HOMECOMING: Duration = Duration::from_secs(3);

/// How often is looked whether they are.
const HOMECOMING_POLL: Duration = Duration::from_millis(20);

/// The most characters of an agent's answer that are passed on: errors are a line long.
const MAX_ANSWER: usize = 4096;

/// A dial that succeeded.
#[derive(Debug)]
pub(super) struct Dialled {
    /// Towards the target.
    pub send: LinkSend,
    /// From the target.
    pub recv: LinkRecv,
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
    /// The agent's answer, in the form of Go's dialler.
    answer: Option<String>,
}

impl DialError {
    /// A failure with a text of its own.
    pub(super) fn new(reason: CloseReason, by: Closer, text: impl Into<String>) -> Self {
        Self {
            reason,
            by,
            text: text.into(),
            answer: None,
        }
    }

    /// What the agent `name` answered.
    pub(super) fn refused(
        (kind, name): (LinkKind, &str),
        destination: &Destination,
        reason: CloseReason,
        mut detail: String,
    ) -> Self {
        if detail.is_empty() {
            detail = reason.to_string();
        }
        if let Some((end, _)) = detail.char_indices().nth(MAX_ANSWER) {
            detail.truncate(end);
        }
        let text = format!("{name}: {}", printable(&detail));
        let answer = match kind {
            LinkKind::Konnectivity => detail,
            LinkKind::Quic => go_error(&destination.to_string(), reason, &detail),
        };
        Self {
            answer: Some(answer),
            ..Self::new(reason, Closer::Agent, text)
        }
    }

    /// What the agent answered, if it did, for programs that look for the words of Go's dialler: an
    /// agent of Konnectivity's own text, unchanged.
    pub(super) fn answer(&self) -> Option<&str> {
        self.answer.as_deref()
    }

    /// Whether it was our own limit that ended the dial, not the agent's.
    pub(super) fn is_too_late(&self) -> bool {
        self.reason == CloseReason::DialTimeout && self.by != Closer::Agent
    }

    /// As Konnectivity's metrics have it.
    fn konnectivity(&self) -> DialFailure {
        match (self.by, self.reason) {
            (Closer::Agent, _) => DialFailure::ErrorResponse,
            (Closer::Client, _) => DialFailure::FrontendClose,
            (_, CloseReason::NoRoute | CloseReason::NoAgent) => DialFailure::NoAgent,
            (_, CloseReason::DialTimeout) => DialFailure::BackendDialTimeout,
            _ => DialFailure::BackendClose,
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
    early: EarlyBytes,
) -> Result<Dialled, DialError> {
    let metrics = &shard.metrics.konnectivity;
    let _pending = metrics.pending_dial();
    let dialled = try_links(shard, record, tenant, local, early).await;
    match &dialled {
        Ok(_) => metrics.dialled(record.start.elapsed()),
        Err(error) => metrics.dial_failed(error.konnectivity()),
    }
    dialled
}

async fn try_links(
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
    // Its link may have ended since the routes were published.
    let link = shard.links.borrow().get(&info.id).cloned();
    let link = link.ok_or_else(|| lost(CloseReason::LinkLost, true))?;
    let opened = link.open(request).await;
    let (mut send, mut recv) = opened.map_err(|reason| lost(reason, true))?;

    let touched = cursor.touched.clone();
    let hopeless = async {
        let Some(patience) = patience else {
            return std::future::pending().await;
        };
        tokio::select! {
            () = link.silenced().notified() => {}
            () = sleep(patience) => {}
        }
        if touched.get() {
            std::future::pending().await
        }
    };
    let answer = {
        let mut answer = pin!(recv.answer());
        let stream = link.sends_early().then_some(&mut send);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(kind: LinkKind, detail: &str) -> DialError {
        let destination = "web.svc:443".parse().unwrap();
        let reason = CloseReason::NameNotFound;
        DialError::refused((kind, "w1"), &destination, reason, detail.into())
    }

    #[test]
    fn what_an_agent_of_konnectivity_says_is_kept_as_it_is() {
        let said = "dial tcp: lookup web.svc on 10.96.0.10:53:\tno such host";
        let error = refused(LinkKind::Konnectivity, said);
        assert_eq!(error.answer(), Some(said));
        assert_eq!(
            error.to_string(),
            format!("w1: {}", said.replace('\t', " "))
        );

        let long = refused(LinkKind::Konnectivity, &"\u{fc}".repeat(2 * MAX_ANSWER));
        assert_eq!(long.answer().unwrap().chars().count(), MAX_ANSWER);
    }

    #[test]
    fn what_ours_says_is_put_in_words_of_go() {
        let error = refused(LinkKind::Quic, "");
        assert_eq!(
            error.answer(),
            Some("dial tcp: lookup web.svc: no such host")
        );
        let sentence = CloseReason::NameNotFound.to_string();
        assert_eq!(error.to_string(), format!("w1: {sentence}"));
    }
}
