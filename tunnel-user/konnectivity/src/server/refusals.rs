//! Refusals of HTTP CONNECT in the form of Konnectivity's proxy-server, byte for byte, for programs that
//! check status and body. The reason phrase is ours and has the reason.

use bytes::Bytes;
use tunnel_proto::close::CloseReason;
use tunnel_proto::http_connect::{ConnectError, response, response_with};

use super::answer::words;
use cpc_observe::metrics::Closer;
use cpc_server::extension::{DialError, Refusals, status};

const NO_AGENT: &str = "currently no tunnels available: No agent available";
const AGENT_LOST: &str = "Backend context error: context canceled\r\n";
const TOO_LATE: &str = "Backend dial timeout: timed out waiting for backend dial\r\n";
const ONLY_CONNECT: &str = "this proxy only supports CONNECT passthrough\n";
const BAD_REQUEST: &str = "400 Bad Request";

const PLAIN: (&str, &str) = ("Content-Type", "text/plain");
const UTF8: (&str, &str) = ("Content-Type", "text/plain; charset=utf-8");
const CLOSE: (&str, &str) = ("Connection", "close");

/// The form of proxy-server.
#[derive(Debug)]
pub(super) struct ProxyServerRefusals;

impl Refusals for ProxyServerRefusals {
    fn failure(&self, error: &DialError) -> Bytes {
        compatible(error, &error.to_string())
    }

    fn bad_request(&self, error: &ConnectError) -> Bytes {
        let (status, why) = (error.status(), error.to_string());
        match status {
            405 => {
                let length = ONLY_CONNECT.len().to_string();
                let fields = [
                    UTF8,
                    ("X-Content-Type-Options", "nosniff"),
                    ("Content-Length", &length),
                    // Where Konnectivity waits for another request.
                    CLOSE,
                ];
                response_with(status, &why, &fields, ONLY_CONNECT)
            }
            400 => response_with(status, &why, &[UTF8, CLOSE], BAD_REQUEST),
            _ => response(status, &why),
        }
    }
}

/// Returns Konnectivity's answer to a failed dial.
fn compatible(error: &DialError, why: &str) -> Bytes {
    match (error.reason, error.by) {
        (CloseReason::NoRoute | CloseReason::NoAgent | CloseReason::Draining, _) => {
            response_with(500, why, &[PLAIN], NO_AGENT)
        }
        _ if error.is_too_late() => response_with(504, why, &[UTF8], TOO_LATE),
        (_, Closer::Tunnel) => response_with(502, why, &[UTF8], AGENT_LOST),
        (reason, _) => {
            let (status, body) = match words(error) {
                Some(answer) => (status_of(&answer), answer),
                None => (status(reason), why.into()),
            };
            response_with(status, why, &[CLOSE, UTF8], &body)
        }
    }
}

/// Returns Konnectivity's status for the answer of an agent: it searches for words.
fn status_of(answer: &str) -> u16 {
    let answer = answer.to_ascii_lowercase();
    let has = |words| answer.contains(words);
    if has("timeout") || has("deadline exceeded") {
        504
    } else if has("too many open files") {
        503
    } else {
        502
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpc_config::TunnelKind;

    /// The answer without its reason phrase, which is `why`.
    fn without_reason(answer: &Bytes, why: &str) -> String {
        let answer = str::from_utf8(answer).unwrap();
        let (line, rest) = answer.split_once("\r\n").unwrap();
        let status = line.strip_suffix(why).unwrap();
        format!("{status}\r\n{rest}")
    }

    fn of_konnectivity(error: &DialError) -> String {
        let answer = ProxyServerRefusals.failure(error);
        without_reason(&answer, &error.to_string())
    }

    #[test]
    fn our_own_failures_as_konnectivity_has_them() {
        let no_agent = "HTTP/1.1 500 \r\nContent-Type: text/plain\r\n\r\n\
                        currently no tunnels available: No agent available";
        let lost = "HTTP/1.1 502 \r\nContent-Type: text/plain; charset=utf-8\r\n\r\n\
                    Backend context error: context canceled\r\n";
        let too_late = "HTTP/1.1 504 \r\nContent-Type: text/plain; charset=utf-8\r\n\r\n\
                        Backend dial timeout: timed out waiting for backend dial\r\n";
        let full = "HTTP/1.1 503 \r\nConnection: close\r\n\
                    Content-Type: text/plain; charset=utf-8\r\n\r\nwhy";
        for (reason, by, expected) in [
            (CloseReason::NoAgent, Closer::Server, no_agent),
            (CloseReason::NoRoute, Closer::Server, no_agent),
            (CloseReason::Draining, Closer::Agent, no_agent),
            (CloseReason::LinkLost, Closer::Tunnel, lost),
            (CloseReason::DialTimeout, Closer::Target, too_late),
            (CloseReason::Overloaded, Closer::Server, full),
        ] {
            let answer = of_konnectivity(&DialError::new(reason, by, "why"));
            assert_eq!(answer, expected, "{reason:?}");
        }
    }

    #[test]
    fn an_agents_answer_is_the_body() {
        let destination = "10.0.0.1:1".parse().unwrap();
        for (status, answer) in [
            (502, "dial tcp 10.0.0.1:1: connect: connection refused"),
            (502, "dial tcp 10.0.0.1:1: connect: connection timed out"),
            (502, "something else"),
            (503, "dial tcp 10.0.0.1:1: socket: Too many open files"),
            (504, "dial tcp 10.0.0.1:1: i/o timeout"),
            (504, "context deadline exceeded"),
        ] {
            let agent = (TunnelKind::Konnectivity, "w1");
            let reason = CloseReason::DialFailed;
            let error = DialError::refused(agent, &destination, reason, answer.into());
            let expected = format!(
                "HTTP/1.1 {status} \r\nConnection: close\r\n\
                 Content-Type: text/plain; charset=utf-8\r\n\r\n{answer}"
            );
            assert_eq!(of_konnectivity(&error), expected);
        }
    }

    #[test]
    fn bad_requests_as_konnectivity_has_them() {
        for (error, expected) in [
            (
                ConnectError::Method,
                "HTTP/1.1 405 \r\nContent-Type: text/plain; charset=utf-8\r\n\
                 X-Content-Type-Options: nosniff\r\nContent-Length: 45\r\nConnection: close\r\n\r\n\
                 this proxy only supports CONNECT passthrough\n",
            ),
            (
                ConnectError::Header,
                "HTTP/1.1 400 \r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\
                 \r\n400 Bad Request",
            ),
        ] {
            let why = error.to_string();
            let answer = ProxyServerRefusals.bad_request(&error);
            assert_eq!(without_reason(&answer, &why), expected);
        }
    }
}
