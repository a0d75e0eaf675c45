//! How a call ended: gRPC's status, in the trailers of a stream.

use std::fmt;

use http::{HeaderMap, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

/// The longest message that is kept of a peer's status, in characters.
const MAX_MESSAGE: usize = 512;

const CODE: &str = "grpc-status";
const MESSAGE: &str = "grpc-message";

/// What is escaped in a message, beside what is not ASCII.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');

/// A status code of gRPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(u8);

impl Code {
    /// In order.
    pub const OK: Self = Self(0);
    /// The caller does not want it any more.
    pub const CANCELLED: Self = Self(1);
    /// A failure without a code of its own.
    pub const UNKNOWN: Self = Self(2);
    /// It took too long.
    pub const DEADLINE_EXCEEDED: Self = Self(4);
    /// The caller may not.
    pub const PERMISSION_DENIED: Self = Self(7);
    /// A bound was reached.
    pub const RESOURCE_EXHAUSTED: Self = Self(8);
    /// There is no such method.
    pub const UNIMPLEMENTED: Self = Self(12);
    /// Somebody does not keep to the protocol.
    pub const INTERNAL: Self = Self(13);
    /// It may work later, or elsewhere.
    pub const UNAVAILABLE: Self = Self(14);
    /// It is not known who the caller is.
    pub const UNAUTHENTICATED: Self = Self(16);

    /// Its name, for metrics.
    pub fn name(self) -> &'static str {
        let name = NAMES.get(usize::from(self.0));
        name.copied().unwrap_or("Unknown")
    }
}

/// As gRPC for Go writes them.
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

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The code.
    pub code: Code,
    /// For the person who called.
    pub message: String,
}

impl Status {
    /// The orderly end.
    pub fn ok() -> Self {
        Self::new(Code::OK, "")
    }

    /// Any end.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
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

    /// Reads the status in headers or trailers, if there is one. A code that is none is UNKNOWN.
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
