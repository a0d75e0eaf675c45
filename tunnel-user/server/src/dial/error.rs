//! Failures of dials, in words for the person who asked and for programs.

use std::time::{Duration, SystemTime};

use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::{Destination, Host};

use super::plan::Failure;
use crate::limits::Limit;
use crate::routes::{Absence, Departed, LinkInfo, RouteError};
use cpc_config::TunnelKind;
use cpc_config::server::LimitsConfig;
use cpc_observe::access::Record;
use cpc_observe::metrics::Closer;

/// The most characters of an agent's answer that are passed on: errors are a line long.
const MAX_ANSWER: usize = 4096;

/// A dial that failed. `Display` is for the person who asked.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct DialError {
    /// Reason of the closed set.
    pub reason: CloseReason,
    /// Party that ended the dial.
    pub by: Closer,
    text: String,
    /// The agent's answer, where it refused.
    answer: Option<Box<AgentAnswer>>,
}

/// The refusal of an agent.
#[derive(Debug)]
pub struct AgentAnswer {
    /// Kind of the agent's link.
    pub kind: TunnelKind,
    /// Destination of the dial.
    pub destination: Destination,
    /// Text of the agent, cut to a length.
    pub detail: String,
}

/// A request that did not connect.
pub(super) struct Failed {
    pub failure: Failure,
    pub error: DialError,
}

impl DialError {
    /// A failure with a text of its own.
    pub fn new(reason: CloseReason, by: Closer, text: impl Into<String>) -> Self {
        Self {
            reason,
            by,
            text: text.into(),
            answer: None,
        }
    }

    /// Returns the refusal of the agent `name`.
    pub fn refused(
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
        let answer = AgentAnswer {
            kind,
            destination: destination.clone(),
            detail,
        };
        Self {
            answer: Some(answer.into()),
            ..Self::new(reason, Closer::Agent, text)
        }
    }

    /// Returns the agent's answer, if the agent refused.
    pub fn answer(&self) -> Option<&AgentAnswer> {
        self.answer.as_deref()
    }

    /// Whether it was our own limit that ended the dial, not the agent's.
    pub fn is_too_late(&self) -> bool {
        self.reason == CloseReason::DialTimeout && self.by != Closer::Agent
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

pub(super) fn full(limits: &LimitsConfig, link: &LinkInfo, limit: Limit) -> DialError {
    let text = format!("{}: {}", link.identity.name, limit.text(limits));
    DialError::new(CloseReason::Overloaded, Closer::Server, text)
}

pub(super) fn too_late(limits: &LimitsConfig, record: &Record) -> DialError {
    let limit = humantime::format_duration(limits.dial_timeout);
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

    fn refused(detail: &str) -> DialError {
        let destination = "web.svc:443".parse().unwrap();
        let reason = CloseReason::NameNotFound;
        let agent = (TunnelKind::Quic, "w1");
        DialError::refused(agent, &destination, reason, detail.into())
    }

    #[test]
    fn an_agents_answer_is_kept_up_to_a_length_and_printed_on_one_line() {
        let said = "lookup web.svc on 10.96.0.10:53:\tno such host";
        let error = refused(said);
        assert_eq!(error.answer().unwrap().detail, said);
        assert_eq!(
            error.to_string(),
            format!("w1: {}", said.replace('\t', " "))
        );

        let long = refused(&"\u{fc}".repeat(2 * MAX_ANSWER));
        assert_eq!(long.answer().unwrap().detail.chars().count(), MAX_ANSWER);

        let sentence = CloseReason::NameNotFound.to_string();
        assert_eq!(refused("").to_string(), format!("w1: {sentence}"));
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
}
