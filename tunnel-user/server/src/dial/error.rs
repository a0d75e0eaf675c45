//! Why a dial has failed, in words for the person who asked and for programs.

use std::time::{Duration, SystemTime};

use tunnel_proto::close::CloseReason;
use tunnel_proto::konnectivity::text::go_error;
use tunnel_proto::preface::{Destination, Host};

use super::plan::Failure;
use crate::limits::Limit;
use crate::routes::{Absence, Departed, LinkInfo, RouteError};
use crate::shard::Shard;
use cpc_config::TunnelKind;
use cpc_observe::access::Record;
use cpc_observe::konnectivity::DialFailure;
use cpc_observe::metrics::Closer;

/// The most characters of an agent's answer that are passed on: errors are a line long.
const MAX_ANSWER: usize = 4096;

/// A dial that failed. `Display` is for the person who asked.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(crate) struct DialError {
    /// Why.
    pub reason: CloseReason,
    /// Whose doing it was.
    pub by: Closer,
    text: String,
    /// The agent's answer, in the form of Go's dialler.
    answer: Option<String>,
}

/// A request that did not connect.
pub(super) struct Failed {
    pub failure: Failure,
    pub error: DialError,
}

impl DialError {
    /// A failure with a text of its own.
    pub(crate) fn new(reason: CloseReason, by: Closer, text: impl Into<String>) -> Self {
        Self {
            reason,
            by,
            text: text.into(),
            answer: None,
        }
    }

    /// What the agent `name` answered.
    pub(crate) fn refused(
        (kind, name): (TunnelKind, &str),
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
            TunnelKind::Konnectivity => detail,
            TunnelKind::Quic => go_error(&destination.to_string(), reason, &detail),
        };
        Self {
            answer: Some(answer),
            ..Self::new(reason, Closer::Agent, text)
        }
    }

    /// What the agent answered, if it did, for programs that look for the words of Go's dialler: an
    /// agent of Konnectivity's own text, unchanged.
    pub(crate) fn answer(&self) -> Option<&str> {
        self.answer.as_deref()
    }

    /// Whether it was our own limit that ended the dial, not the agent's.
    pub(crate) fn is_too_late(&self) -> bool {
        self.reason == CloseReason::DialTimeout && self.by != Closer::Agent
    }

    /// As Konnectivity's metrics have it.
    pub(super) fn konnectivity(&self) -> DialFailure {
        match (self.by, self.reason) {
            (Closer::Agent, _) => DialFailure::ErrorResponse,
            (Closer::Client, _) => DialFailure::FrontendClose,
            (_, CloseReason::NoRoute | CloseReason::NoAgent) => DialFailure::NoAgent,
            (_, CloseReason::DialTimeout) => DialFailure::BackendDialTimeout,
            _ => DialFailure::BackendClose,
        }
    }
}

pub(super) fn no_route(error: RouteError, record: &Record) -> DialError {
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
            let text = absent(&departed, host, ago);
            DialError::new(CloseReason::NoAgent, Closer::Server, text)
        }
    }
}

/// Says why the agent that served `host` is not asked.
fn absent(departed: &Departed, host: &Host, ago: Duration) -> String {
    let name = &departed.name;
    let ago = humantime::format_duration(Duration::from_secs(ago.as_secs()));
    match departed.absence {
        Absence::Disconnected => format!("agent {name} is not connected (last seen {ago} ago)"),
        Absence::Silent => format!("agent {name} does not answer (last heard {ago} ago)"),
        Absence::Draining => format!("agent {name} is draining and takes no new connections"),
        Absence::Elsewhere => format!(
            "agent {name} is connected, but has not served {host} for {ago}; `cpc status` shows \
             what it serves and was refused"
        ),
    }
}

pub(super) fn full(shard: &Shard, link: &LinkInfo, limit: Limit) -> DialError {
    let text = format!("{}: {}", link.identity.name, limit.text(&shard.limits));
    DialError::new(CloseReason::Overloaded, Closer::Server, text)
}

pub(super) fn too_late(shard: &Shard, record: &Record) -> DialError {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(kind: TunnelKind, detail: &str) -> DialError {
        let destination = "web.svc:443".parse().unwrap();
        let reason = CloseReason::NameNotFound;
        DialError::refused((kind, "w1"), &destination, reason, detail.into())
    }

    #[test]
    fn what_an_agent_of_konnectivity_says_is_kept_as_it_is() {
        let said = "dial tcp: lookup web.svc on 10.96.0.10:53:\tno such host";
        let error = refused(TunnelKind::Konnectivity, said);
        assert_eq!(error.answer(), Some(said));
        assert_eq!(
            error.to_string(),
            format!("w1: {}", said.replace('\t', " "))
        );

        let long = refused(TunnelKind::Konnectivity, &"\u{fc}".repeat(2 * MAX_ANSWER));
        assert_eq!(long.answer().unwrap().chars().count(), MAX_ANSWER);
    }

    #[test]
    fn an_absent_agent_is_called_what_it_is() {
        let host = "10.99.1.2".parse().unwrap();
        for (absence, expected) in [
            (
                Absence::Disconnected,
                "agent w1 is not connected (last seen 12s ago)",
            ),
            (
                Absence::Silent,
                "agent w1 does not answer (last heard 12s ago)",
            ),
            (
                Absence::Draining,
                "agent w1 is draining and takes no new connections",
            ),
            (
                Absence::Elsewhere,
                "agent w1 is connected, but has not served 10.99.1.2 for 12s; `cpc status` shows \
                 what it serves and was refused",
            ),
        ] {
            let departed = Departed {
                name: "w1".into(),
                last_seen: SystemTime::now(),
                absence,
            };
            let said = absent(&departed, &host, Duration::from_millis(12_900));
            assert_eq!(said, expected);
        }
    }

    #[test]
    fn what_ours_says_is_put_in_words_of_go() {
        let error = refused(TunnelKind::Quic, "");
        assert_eq!(
            error.answer(),
            Some("dial tcp: lookup web.svc: no such host")
        );
        let sentence = CloseReason::NameNotFound.to_string();
        assert_eq!(error.to_string(), format!("w1: {sentence}"));
    }
}
