//! Refusals of HTTP CONNECT: the reason phrase is the text that the person at kubectl reads.

use std::fmt;

use bytes::Bytes;
use tunnel_proto::close::CloseReason;
use tunnel_proto::http_connect::{ConnectError, response};

use crate::dial::error::DialError;

/// Form of the refusals.
pub trait Refusals: fmt::Debug + Sync {
    /// Returns the answer to a failed dial.
    fn failure(&self, error: &DialError) -> Bytes;

    /// Returns the answer to an invalid or unsupported request.
    fn bad_request(&self, error: &ConnectError) -> Bytes;
}

/// Our own form: a status for each kind of failure, and the reason as phrase and body.
#[derive(Debug)]
pub(crate) struct Detailed;

impl Refusals for Detailed {
    fn failure(&self, error: &DialError) -> Bytes {
        response(status(error.reason), &error.to_string())
    }

    fn bad_request(&self, error: &ConnectError) -> Bytes {
        response(error.status(), &error.to_string())
    }
}

/// Returns the status of a failed dial.
pub fn status(reason: CloseReason) -> u16 {
    match reason {
        CloseReason::PolicyDenied => 403,
        CloseReason::NoRoute
        | CloseReason::NoAgent
        | CloseReason::Draining
        | CloseReason::CircuitOpen
        | CloseReason::Overloaded => 503,
        CloseReason::DialTimeout => 504,
        _ => 502,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpc_observe::metrics::Closer;

    #[test]
    fn a_refusal_has_a_status_and_says_why() {
        for (reason, status) in [
            (CloseReason::PolicyDenied, 403),
            (CloseReason::NoAgent, 503),
            (CloseReason::DialTimeout, 504),
            (CloseReason::ConnectionRefused, 502),
        ] {
            let error = DialError::new(reason, Closer::Server, "the cause");
            let answer = Detailed.failure(&error);
            let head = format!("HTTP/1.1 {status} the cause\r\n");
            assert!(answer.starts_with(head.as_bytes()), "{answer:?}");
            assert!(answer.ends_with(b"the cause\n"), "{answer:?}");
        }
    }

    #[test]
    fn a_bad_request_is_told_its_fault() {
        let error = ConnectError::Method;
        let answer = Detailed.bad_request(&error);
        let head = format!("HTTP/1.1 {} {error}\r\n", error.status());
        assert!(answer.starts_with(head.as_bytes()), "{answer:?}");
        assert!(
            answer.ends_with(format!("{error}\n").as_bytes()),
            "{answer:?}"
        );
    }
}
