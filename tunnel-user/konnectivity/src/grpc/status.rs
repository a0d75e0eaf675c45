//! Status of a call, in the trailers of a stream.

use std::fmt;

use http::{HeaderMap, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

/// Maximum length of the message of a peer's status, in characters.
const MAX_MESSAGE: usize = 512;

const CODE: &str = "grpc-status";
const MESSAGE: &str = "grpc-message";

/// Characters to escape in a message, beside those that are not ASCII.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');

/// A status code of gRPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Code(u8);

impl Code {
    /// The orderly end.
    pub(crate) const OK: Self = Self(0);
    /// The caller cancelled the call.
    pub(crate) const CANCELLED: Self = Self(1);
    /// A failure without a code of its own.
    pub(crate) const UNKNOWN: Self = Self(2);
    /// The call took too long.
    pub(crate) const DEADLINE_EXCEEDED: Self = Self(4);
    /// A limit was reached.
    pub(crate) const RESOURCE_EXHAUSTED: Self = Self(8);
    /// The method does not exist.
    pub(crate) const UNIMPLEMENTED: Self = Self(12);
    /// A peer violated the protocol.
    pub(crate) const INTERNAL: Self = Self(13);
    /// The call may succeed later, or elsewhere.
    pub(crate) const UNAVAILABLE: Self = Self(14);

    /// Returns the name, for metrics.
    pub(crate) fn name(self) -> &'static str {
        let name = NAMES.get(usize::from(self.0));
        name.copied().unwrap_or("Unknown")
    }
}

/// Names as in gRPC for Go.
const NAMES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// Status of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    /// The code.
    pub code: Code,
    /// Text for the person who called.
    pub message: String,
}

impl Status {
    /// Returns the status of the orderly end.
    pub(crate) fn ok() -> Self {
        Self::new(Code::OK, "")
    }

    /// Creates any status.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// Adds the status to headers or trailers.
    pub(super) fn write(&self, to: &mut HeaderMap) {
        to.insert(CODE, HeaderValue::from(u16::from(self.code.0)));
        if !self.message.is_empty() {
            let message = utf8_percent_encode(&self.message, ESCAPED).to_string();
            // Escaped, it is visible ASCII.
            if let Ok(message) = HeaderValue::try_from(message) {
                to.insert(MESSAGE, message);
            }
        }
    }

    /// Reads the status in headers or trailers, if there is one. An invalid code is UNKNOWN.
    pub(super) fn read(from: &HeaderMap) -> Option<Self> {
        let code = from.get(CODE)?.to_str().ok().and_then(|c| c.parse().ok());
        let message = from.get(MESSAGE).and_then(|m| m.to_str().ok());
        let message = percent_decode_str(message.unwrap_or_default()).decode_utf8_lossy();
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        Some(Self {
            code: code.map_or(Code::UNKNOWN, Code),
            message: message.chars().take(MAX_MESSAGE).map(printable).collect(),
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (gRPC status {})", self.message, self.code.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_as_it_was_written() {
        for status in [
            Status::ok(),
            Status::new(Code::UNAVAILABLE, "100 % of \u{fc}nits\tare gone"),
        ] {
            let mut headers = HeaderMap::new();
            status.write(&mut headers);
            let expected = status.message.replace('\t', " ");
            let read = Status::read(&headers).unwrap();
            assert_eq!((read.code, read.message), (status.code, expected));
        }
        assert_eq!(Status::read(&HeaderMap::new()), None);
    }

    #[test]
    fn a_code_that_is_none_is_unknown() {
        let mut headers = HeaderMap::new();
        headers.insert(CODE, HeaderValue::from_static("none"));
        headers.insert(MESSAGE, "x".repeat(9999).parse().unwrap());
        let read = Status::read(&headers).unwrap();
        assert_eq!(read.code, Code::UNKNOWN);
        assert_eq!(read.message.len(), MAX_MESSAGE);
    }
}
