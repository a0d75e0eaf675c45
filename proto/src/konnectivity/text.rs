//! Texts that stand for reasons: Konnectivity has no codes, and its programs search texts for
//! words.

use crate::close::CloseReason;

/// DIAL_RSP: there is no agent for the destination.
pub const NO_AGENT: &str = "No agent available";

/// DIAL_RSP: the agent did not answer in time.
pub const DIAL_TIMEOUT: &str = "timed out waiting for backend dial";

/// CLOSE_RSP of a server: the frontend closes a connection before it has dialled.
pub const CLOSE_BEFORE_DIAL: &str = "backend uninitialized";

/// CLOSE_RSP of a server: the frontend sends before it has dialled.
pub const DATA_BEFORE_DIAL: &str = "backend not initialized";

/// CLOSE_RSP of a server that can't ask the agent to end the connection.
pub const CLOSE_FAILED: &str = "CLOSE_REQ to backend failed";

/// CLOSE_RSP of a server: the frontend has sent for two connections on one stream.
pub const MISMATCHED: &str = "mismatched connection IDs";

/// CLOSE_RSP of an agent: DATA for a connection that it does not have.
pub const UNRECOGNIZED_CONNECTION: &str = "unrecognized connectID";

/// CLOSE_RSP of an agent: CLOSE_REQ for a connection that it does not have.
pub const UNKNOWN_CONNECTION: &str = "Unknown connectID";

/// Words in the errors of Go's dialler, with the meaning of each. The first match counts.
const WORDS: [(&str, CloseReason); 10] = [
    ("too many open files", CloseReason::Overloaded),
    ("connection refused", CloseReason::ConnectionRefused),
    ("timeout", CloseReason::DialTimeout),
    ("timed out", CloseReason::DialTimeout),
    ("deadline exceeded", CloseReason::DialTimeout),
    ("no such host", CloseReason::NameNotFound),
    ("no route to host", CloseReason::HostUnreachable),
    ("host is unreachable", CloseReason::HostUnreachable),
    ("network is unreachable", CloseReason::NetworkUnreachable),
    ("network is down", CloseReason::NetworkUnreachable),
];

/// Returns the meaning of the error of a DIAL_RSP.
#[must_use]
pub fn reason(error: &str) -> CloseReason {
    let error = error.to_ascii_lowercase();
    WORDS
        .iter()
        .find(|(words, _)| error.contains(words))
        .map_or(CloseReason::DialFailed, |&(_, reason)| reason)
}

/// Returns the error of a DIAL_RSP, in the form of Go's dialler, which servers and their clients
/// search for words. `detail` is the text where Go has no words for the reason.
#[must_use]
pub fn go_error(destination: &str, reason: CloseReason, detail: &str) -> String {
    match reason {
        CloseReason::ConnectionRefused => {
            format!("dial tcp {destination}: connect: connection refused")
        }
        CloseReason::HostUnreachable => {
            format!("dial tcp {destination}: connect: no route to host")
        }
        CloseReason::NetworkUnreachable => {
            format!("dial tcp {destination}: connect: network is unreachable")
        }
        CloseReason::DialTimeout => format!("dial tcp {destination}: i/o timeout"),
        CloseReason::NameNotFound => {
            let host = destination
                .rsplit_once(':')
                .map_or(destination, |(host, _)| host);
            format!("dial tcp: lookup {host}: no such host")
        }
        CloseReason::Overloaded => format!("dial tcp {destination}: socket: too many open files"),
        _ => format!("dial tcp {destination}: {detail}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_go() {
        for (error, expected) in [
            (
                "dial tcp 127.0.0.1:1: connect: connection refused",
                CloseReason::ConnectionRefused,
            ),
            (
                "dial tcp 10.0.0.1:80: i/o timeout",
                CloseReason::DialTimeout,
            ),
            (
                "dial tcp 10.0.0.1:80: connect: connection timed out",
                CloseReason::DialTimeout,
            ),
            ("context deadline exceeded", CloseReason::DialTimeout),
            (DIAL_TIMEOUT, CloseReason::DialTimeout),
            (
                "dial tcp: lookup web.svc on 10.96.0.10:53: no such host",
                CloseReason::NameNotFound,
            ),
            (
                "dial tcp 10.0.0.1:80: connect: no route to host",
                CloseReason::HostUnreachable,
            ),
            (
                "dial tcp 10.0.0.1:80: connect: network is unreachable",
                CloseReason::NetworkUnreachable,
            ),
            (
                "dial tcp 10.0.0.1:80: socket: too many open files",
                CloseReason::Overloaded,
            ),
            ("dial udp6: unknown network udp6", CloseReason::DialFailed),
            ("", CloseReason::DialFailed),
        ] {
            assert_eq!(reason(error), expected, "{error}");
        }
    }

    #[test]
    fn what_is_said_is_understood() {
        for said in [
            CloseReason::ConnectionRefused,
            CloseReason::HostUnreachable,
            CloseReason::NetworkUnreachable,
            CloseReason::DialTimeout,
            CloseReason::NameNotFound,
            CloseReason::Overloaded,
            CloseReason::DialFailed,
        ] {
            let error = go_error("[fd00::1]:443", said, "protocol not available");
            assert_eq!(reason(&error), said, "{error}");
        }
        assert_eq!(
            go_error("web.svc:443", CloseReason::NameNotFound, ""),
            "dial tcp: lookup web.svc: no such host"
        );
    }
}
