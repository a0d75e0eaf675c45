//! The HTTP `CONNECT` request (RFC 9110, section 9.3.6; RFC 9112) and its answers.
//!
//! The parser accepts the one form that a proxy receives: a request line with the target in
//! authority form, header fields, an empty line. The target alone is the destination. The Host
//! field is ignored: kube-apiserver always sends `Host: 127.0.0.1`. Every byte after the head
//! belongs to the tunnel, so a request that announces a body is refused.
//!
//! The parser is stricter than RFC 9112: lines end in CR LF, there is no line folding, and no white
//! space but the two spaces of the request line.

use bytes::Bytes;
use thiserror::Error;

use crate::preface::{Destination, DestinationError};

/// The longest head of a request, in bytes, with the empty line.
pub const MAX_HEAD: usize = 8 * 1024;

/// The most header fields in a request.
pub const MAX_HEADERS: usize = 32;

/// The longest reason phrase of an answer, in bytes.
pub const MAX_REASON: usize = 512;

/// The answer to a request whose target is connected. Nothing may follow in the same write but
/// the target's bytes.
pub const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection Established\r\n\r\n";

const METHOD: &[u8] = b"CONNECT ";

/// A request to be connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    /// Destination: the request's target.
    pub destination: Destination,
    /// The header fields, in order: name in lower case, value without white space around it.
    pub headers: Vec<(String, String)>,
}

/// A request that can't be served; [`response`] of [`status`](Self::status) and the error's text is
/// the answer to give.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConnectError {
    /// The head does not end within [`MAX_HEAD`].
    #[error("the request's head is longer than {MAX_HEAD} bytes")]
    HeadTooLong,
    /// There are more than [`MAX_HEADERS`] fields.
    #[error("the request has more than {MAX_HEADERS} header fields")]
    TooManyHeaders,
    /// Another method, or not HTTP at all.
    #[error("only the method CONNECT is served here")]
    Method,
    /// The request line is not `CONNECT host:port HTTP/1.1`.
    #[error("the request line must be CONNECT host:port HTTP/1.1")]
    RequestLine,
    /// A version other than 1.0 and 1.1.
    #[error("only HTTP/1.1 and HTTP/1.0 are served here")]
    Version,
    /// The target is not in authority form.
    #[error("bad CONNECT target: {0}")]
    Target(DestinationError),
    /// A header field is malformed.
    #[error("a header field is malformed")]
    Header,
    /// A body is announced.
    #[error("a CONNECT request must not have a body")]
    Body,
}

impl From<DestinationError> for ConnectError {
    fn from(why: DestinationError) -> Self {
        Self::Target(why)
    }
}

impl ConnectError {
    /// Returns the status code of the answer.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::HeadTooLong | Self::TooManyHeaders => 431,
            Self::Method => 405,
            Self::Version => 505,
            Self::RequestLine | Self::Target(_) | Self::Header | Self::Body => 400,
        }
    }
}

/// Reads a request from the head of `buf`, and returns it with the number of its bytes. `None`:
/// more bytes are needed.
///
/// # Errors
/// [`ConnectError`]. A method other than CONNECT is refused at its first differing byte, so that a
/// client that speaks TLS or another protocol is not kept waiting.
pub fn parse(buf: &[u8]) -> Result<Option<(ConnectRequest, usize)>, ConnectError> {
    let known = buf.len().min(METHOD.len());
    if buf[..known] != METHOD[..known] {
        return Err(ConnectError::Method);
    }
    let head = &buf[..buf.len().min(MAX_HEAD)];
    match head.windows(4).position(|window| window == b"\r\n\r\n") {
        Some(end) => Ok(Some((parse_head(&head[..end])?, end + 4))),
        None if head.len() == MAX_HEAD => Err(ConnectError::HeadTooLong),
        None => Ok(None),
    }
}

/// Parses `head`, which lacks the CR LF of its last line and the empty line.
fn parse_head(head: &[u8]) -> Result<ConnectRequest, ConnectError> {
    let head = str::from_utf8(head).map_err(|_| ConnectError::Header)?;
    let mut lines = head.split("\r\n");
    let destination = parse_request_line(lines.next().unwrap_or_default())?;
    let mut headers = Vec::new();
    for line in lines {
        if headers.len() == MAX_HEADERS {
            return Err(ConnectError::TooManyHeaders);
        }
        headers.push(parse_header(line)?);
    }
    let body = headers.iter().any(|(name, value)| match name.as_str() {
        "transfer-encoding" => true,
        "content-length" => value != "0",
        _ => false,
    });
    if body {
        Err(ConnectError::Body)
    } else {
        Ok(ConnectRequest {
            destination,
            headers,
        })
    }
}

fn parse_request_line(line: &str) -> Result<Destination, ConnectError> {
    let mut words = line.split(' ');
    let (Some(_method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(ConnectError::RequestLine);
    };
    match version {
        "HTTP/1.1" | "HTTP/1.0" => Ok(target.parse()?),
        other if other.starts_with("HTTP/") => Err(ConnectError::Version),
        _ => Err(ConnectError::RequestLine),
    }
}

fn parse_header(line: &str) -> Result<(String, String), ConnectError> {
    let (name, value) = line.split_once(':').ok_or(ConnectError::Header)?;
    let value = value.trim_matches([' ', '\t']);
    if name.is_empty()
        || !name.bytes().all(is_token)
        || value.chars().any(|c| c.is_control() && c != '\t')
    {
        return Err(ConnectError::Header);
    }
    Ok((name.to_ascii_lowercase(), value.to_owned()))
}

/// Whether `text` is a token (RFC 9110, section 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Returns an answer: [`ESTABLISHED`] for status 200; otherwise one with `reason` as reason phrase
/// and body, for people, after which the connection closes.
///
/// Of `reason` the first [`MAX_REASON`] characters are used; what is not visible ASCII becomes `?`.
/// A status that is neither 200 nor an error is sent as 500.
#[must_use]
pub fn response(status: u16, reason: &str) -> Bytes {
    if status == 200 {
        return Bytes::from_static(ESTABLISHED);
    }
    let body = format!("{}\n", phrase(reason));
    let length = body.len().to_string();
    let fields = [
        ("Content-Type", "text/plain"),
        ("Connection", "close"),
        ("Content-Length", &length),
    ];
    response_with(status, reason, &fields, &body)
}

/// Returns a refusal with other header fields and another body, for clients of another proxy.
/// `status` and `reason` are as for [`response`]; `fields`, in this order, and `body` are used as
/// they are, so no line may end within a field. Without `Content-Length` the body ends with the
/// connection.
#[must_use]
pub fn response_with(status: u16, reason: &str, fields: &[(&str, &str)], body: &str) -> Bytes {
    let status = match status {
        400..600 => status,
        _ => 500,
    };
    let mut answer = format!("HTTP/1.1 {status} {}\r\n", phrase(reason));
    for (name, value) in fields {
        answer.extend([*name, ": ", *value, "\r\n"]);
    }
    answer.extend(["\r\n", body]);
    Bytes::from(answer)
}

fn phrase(reason: &str) -> String {
    let visible = |c: char| {
        if c == ' ' || c.is_ascii_graphic() {
            c
        } else {
            '?'
        }
    };
    reason.chars().take(MAX_REASON).map(visible).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::preface::tests::{any_destination, check_incremental};

    fn error(request: &str) -> ConnectError {
        parse(request.as_bytes()).unwrap_err()
    }

    #[test]
    fn the_request_of_kube_apiserver() {
        let bytes = b"CONNECT 10.99.1.2:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n\x16\x03\x01";
        let (request, consumed) = parse(bytes).unwrap().unwrap();
        assert_eq!(request.destination.to_string(), "10.99.1.2:10250");
        assert_eq!(
            request.headers,
            [("host".to_owned(), "127.0.0.1".to_owned())]
        );
        assert_eq!(&bytes[consumed..], b"\x16\x03\x01");
    }

    #[test]
    fn requests_of_other_clients() {
        for request in [
            "CONNECT [fd00::1]:443 HTTP/1.0\r\n\r\n",
            "CONNECT web.svc:443 HTTP/1.1\r\nHost:web.svc:443\r\nUser-Agent: \tcurl/8.0 (x; y) \r\n\r\n",
            "CONNECT web.svc:443 HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        ] {
            assert!(parse(request.as_bytes()).unwrap().is_some(), "{request}");
        }
    }

    #[test]
    fn bad_requests_have_their_status() {
        for (request, expected, status) in [
            ("GET", ConnectError::Method, 405),
            ("\x16\x03\x01", ConnectError::Method, 405),
            ("connect a:1 HTTP/1.1\r\n\r\n", ConnectError::Method, 405),
            ("CONNECT a:1\r\n\r\n", ConnectError::RequestLine, 400),
            (
                "CONNECT a:1 HTTP/1.1 \r\n\r\n",
                ConnectError::RequestLine,
                400,
            ),
            (
                "CONNECT  a:1 HTTP/1.1\r\n\r\n",
                ConnectError::RequestLine,
                400,
            ),
            ("CONNECT a:1 SPDY/3\r\n\r\n", ConnectError::RequestLine, 400),
            ("CONNECT a:1 HTTP/2.0\r\n\r\n", ConnectError::Version, 505),
            (
                "CONNECT a HTTP/1.1\r\n\r\n",
                DestinationError::MissingPort.into(),
                400,
            ),
            (
                "CONNECT a:1 HTTP/1.1\r\nA B: c\r\n\r\n",
                ConnectError::Header,
                400,
            ),
            (
                "CONNECT a:1 HTTP/1.1\r\nA : c\r\n\r\n",
                ConnectError::Header,
                400,
            ),
            (
                "CONNECT a:1 HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
                ConnectError::Header,
                400,
            ),
            (
                "CONNECT a:1 HTTP/1.1\r\nA: b\nC: d\r\n\r\n",
                ConnectError::Header,
                400,
            ),
            (
                "CONNECT a:1 HTTP/1.1\r\n: b\r\n\r\n",
                ConnectError::Header,
                400,
            ),
            (
                "CONNECT a:1 HTTP/1.1\r\nContent-Length: 1\r\n\r\n",
                ConnectError::Body,
                400,
            ),
            (
                "CONNECT a:1 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
                ConnectError::Body,
                400,
            ),
        ] {
            assert_eq!(error(request), expected, "{request:?}");
            assert_eq!(expected.status(), status, "{request:?}");
        }
        let header = parse(b"CONNECT a:1 HTTP/1.1\r\nA: \xff\r\n\r\n");
        assert_eq!(header, Err(ConnectError::Header));
    }

    #[test]
    fn the_head_is_bounded() {
        let request =
            |padding: usize| format!("CONNECT a:1 HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(padding));
        let longest = MAX_HEAD - request(0).len();
        assert!(parse(request(longest).as_bytes()).unwrap().is_some());
        assert_eq!(error(&request(longest + 1)), ConnectError::HeadTooLong);
        assert_eq!(
            parse(&request(longest + 1).as_bytes()[..MAX_HEAD - 1]),
            Ok(None)
        );

        let fields = |count| format!("CONNECT a:1 HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count));
        assert!(parse(fields(MAX_HEADERS).as_bytes()).unwrap().is_some());
        assert_eq!(
            error(&fields(MAX_HEADERS + 1)),
            ConnectError::TooManyHeaders
        );
    }

    #[test]
    fn success_is_one_fixed_head() {
        let expected = "HTTP/1.1 200 Connection Established\r\n\r\n";
        assert_eq!(response(200, "whatever"), expected);
    }

    #[test]
    fn what_follows_the_reason_is_free() {
        let fields = [("Connection", "close"), ("Content-Type", "text/plain")];
        assert_eq!(
            response_with(500, "no agent\nhere", &fields, "gr\u{fc}n\r\n"),
            "HTTP/1.1 500 no agent?here\r\n\
             Connection: close\r\n\
             Content-Type: text/plain\r\n\
             \r\n\
             gr\u{fc}n\r\n"
        );
        assert_eq!(response_with(302, "", &[], ""), "HTTP/1.1 500 \r\n\r\n");
    }

    #[test]
    fn errors_tell_their_reason_twice() {
        assert_eq!(
            response(503, "worker w1 is not connected, last seen 3m12s ago"),
            "HTTP/1.1 503 worker w1 is not connected, last seen 3m12s ago\r\n\
             Content-Type: text/plain\r\n\
             Connection: close\r\n\
             Content-Length: 48\r\n\
             \r\n\
             worker w1 is not connected, last seen 3m12s ago\n"
        );
        let long = response(400, &"\u{e4}".repeat(MAX_REASON + 1));
        let head = format!("HTTP/1.1 400 {}\r\n", "?".repeat(MAX_REASON));
        assert!(long.starts_with(head.as_bytes()));
        assert!(response(204, "").starts_with(b"HTTP/1.1 500 \r\n"));
    }

    proptest! {
        #[test]
        fn round_trip(destination in any_destination(), tail: Vec<u8>) {
            let head = format!("CONNECT {destination} HTTP/1.1\r\nHost: {destination}\r\n\r\n");
            let mut bytes = head.clone().into_bytes();
            bytes.extend(tail);
            let (request, consumed) = parse(&bytes).unwrap().unwrap();
            prop_assert_eq!(request.destination, destination);
            prop_assert_eq!(consumed, head.len());
            check_incremental(&bytes, parse)?;
        }

        #[test]
        fn any_bytes(raw: Vec<u8>, tail in "[ -~\r\n]{0,80}(\r\n\r\n)?.{0,10}") {
            check_incremental(&raw, parse)?;
            check_incremental(format!("CONNECT {tail}").as_bytes(), parse)?;
        }

        /// An answer stays one answer, with any content of the reason.
        #[test]
        fn any_reason(status: u16, reason: String) {
            let answer = response(status, &reason);
            let answer = str::from_utf8(&answer).unwrap();
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            prop_assert!(head.bytes().all(|b| (b' '..=b'~').contains(&b) || b == b'\r' || b == b'\n'));
            if status != 200 {
                prop_assert_eq!(head.lines().count(), 4);
                prop_assert!(head.lines().next().unwrap().len() <= "HTTP/1.1 500 ".len() + MAX_REASON);
                let length = format!("Content-Length: {}", body.len());
                prop_assert_eq!(head.lines().last(), Some(length.as_str()));
            }
        }
    }
}
