//! The CONNECT request, and the answer to an invalid one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::decode_head;
use tunnel_proto::http_connect::{MAX_HEADERS, parse, response};

fuzz_target!(|data: &[u8]| {
    if let Some(request) = decode_head(data, parse) {
        assert!(request.headers.len() <= MAX_HEADERS);
        let again = format!("CONNECT {} HTTP/1.1\r\n\r\n", request.destination);
        let again = decode_head(again.as_bytes(), parse).expect("a valid request");
        assert_eq!(again.destination, request.destination);
    }
    let reason = String::from_utf8_lossy(data);
    let answer = response(400 + u16::from(data.first().copied().unwrap_or(0)), &reason);
    let answer = str::from_utf8(&answer).expect("an answer is ASCII");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
    assert_eq!(head.split("\r\n").count(), 4);
    assert!(head.ends_with(&format!("Content-Length: {}", body.len())));
});
