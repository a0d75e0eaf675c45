use std::fmt::Debug;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::resumption::{Accepted, Confirmation, SessionId, SessionKey, Status};
use crate::varint::VarInt;

/// Checks what every decoder of the head of a stream must do: it takes no more than its input, and
/// its result, value or error, does not depend on how the bytes arrived.
pub(crate) fn check_incremental<T, E>(
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<Option<(T, usize)>, E>,
) -> Result<(), TestCaseError>
where
    T: PartialEq + Debug,
    E: PartialEq + Debug,
{
    let mut first = None;
    for end in 0..=bytes.len() {
        let answer = decode(&bytes[..end]);
        match &first {
            None => match answer {
                Ok(None) => {}
                answer => {
                    if let Ok(Some((_, consumed))) = &answer {
                        prop_assert_eq!(*consumed, end, "complete earlier than it was noticed");
                    }
                    first = Some(answer);
                }
            },
            Some(first) => prop_assert_eq!(first, &answer, "changed its mind at {}", end),
        }
    }
    Ok(())
}

pub(crate) fn any_name() -> impl Strategy<Value = Name> {
    "([a-z0-9_-]{1,20}\\.){0,4}[a-z]{1,12}".prop_map(|name| name.parse().unwrap())
}

pub(crate) fn any_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<Ipv4Addr>().prop_map(IpAddr::V4),
        any::<Ipv6Addr>().prop_map(|address| IpAddr::V6(address).to_canonical()),
    ]
}

pub(crate) fn any_destination() -> impl Strategy<Value = Destination> {
    let host = prop_oneof![
        any_address().prop_map(Host::from),
        any_name().prop_map(Host::from)
    ];
    (host, 1..=u16::MAX).prop_map(|(host, port)| Destination { host, port })
}

fn any_key() -> impl Strategy<Value = SessionKey> {
    (any::<[u8; 16]>(), 0..=VarInt::MAX.into_inner()).prop_map(|(id, number)| SessionKey {
        id: SessionId::new(id),
        number: VarInt::try_from(number).unwrap(),
    })
}

fn any_request() -> impl Strategy<Value = DialRequest> {
    (
        any::<[u8; 16]>(),
        any_destination(),
        0..=MAX_DEADLINE.as_millis() as u64,
        any::<u8>(),
        prop::option::of(any_key()),
    )
        .prop_map(
            |(id, destination, deadline, attempt, session)| DialRequest {
                session,
                id: ConnectionId(id),
                destination,
                deadline: Duration::from_millis(deadline),
                attempt,
            },
        )
}

fn any_response() -> impl Strategy<Value = DialResponse> {
    let reasons = prop::sample::select(&CloseReason::ALL[1..]);
    prop_oneof![
        Just(DialResponse::Connected),
        (reasons, "\\PC{0,60}")
            .prop_map(|(reason, detail)| DialResponse::Refused { reason, detail }),
    ]
}

fn request(destination: &str) -> DialRequest {
    DialRequest {
        session: None,
        id: ConnectionId(*b"0123456789abcdef"),
        destination: destination.parse().unwrap(),
        deadline: Duration::from_secs(10),
        attempt: 2,
    }
}

fn encoded(request: &DialRequest) -> Vec<u8> {
    let mut out = BytesMut::new();
    request.encode(&mut out);
    out.to_vec()
}

/// Reads the head of a stream that must be a dial.
fn decode_dial(buf: &[u8]) -> Result<Option<(DialRequest, usize)>, PrefaceError> {
    Ok(StreamHead::decode(buf)?.map(|(head, size)| match head {
        StreamHead::Dial(request) => (request, size),
        other => panic!("{other:?}"),
    }))
}

fn encoded_response(response: &DialResponse) -> Vec<u8> {
    let mut out = BytesMut::new();
    response.encode(&mut out);
    out.to_vec()
}

/// Returns a request with this body.
fn with_body(body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![1];
    VarInt::from(body.len() as u16).encode(&mut bytes);
    bytes.put_slice(body);
    bytes
}

/// These bytes are the protocol: a release that writes others can't talk to this one.
#[test]
fn the_wire_does_not_change() {
    assert_eq!(
        encoded(&request("10.99.1.2:10250")),
        b"\x01\x1a0123456789abcdef\x02\x67\x10\x28\x0a\x01\x0a\x63\x01\x02"
    );
    assert_eq!(
        encoded(&request("[fd00::1]:443")),
        b"\x01\x260123456789abcdef\x02\x67\x10\x01\xbb\x02\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01"
    );
    assert_eq!(
        encoded(&request("web.default.svc:443")),
        b"\x01\x260123456789abcdef\x02\x67\x10\x01\xbb\x03\x0fweb.default.svc"
    );
    assert_eq!(encoded_response(&DialResponse::Connected), b"\0\0");
    let refused = DialResponse::Refused {
        reason: CloseReason::ConnectionRefused,
        detail: "os error 111".to_owned(),
    };
    assert_eq!(encoded_response(&refused), b"\x42\x00\x0cos error 111");
}

#[test]
fn the_kind_is_refused_before_its_body_arrives() {
    let error = StreamHead::decode(&[4]).unwrap_err();
    assert_eq!(error, PrefaceError::UnsupportedKind(4));
    assert_eq!(error.reason(), CloseReason::UnsupportedKind);
}

#[test]
fn a_body_may_be_512_bytes_and_grow_at_its_end() {
    let known = encoded(&request("web.default.svc:443"));
    let mut body = known[2..].to_vec();
    body.resize(512, 0xff);
    let (decoded, consumed) = decode_dial(&with_body(&body)).unwrap().unwrap();
    let expected = request("web.default.svc:443");
    assert_eq!(decoded.destination, expected.destination);
    assert!(decoded.session.is_some());
    assert_eq!(consumed, 1 + 2 + 512);

    let error = decode_dial(&[1, 0x42, 0x01]).unwrap_err();
    assert_eq!(error, PrefaceError::RequestTooLong(513));
    assert_eq!(error.reason(), CloseReason::MalformedDial);
}

#[test]
fn bad_bodies_are_named() {
    const HEAD: &[u8] = b"0123456789abcdef\x00\x05";
    let decode = |tail: &[u8]| decode_dial(&with_body(&[HEAD, tail].concat())).unwrap_err();
    assert_eq!(decode(b"\0\0\x01\x7f\0\0\x01"), PrefaceError::PortZero);
    assert_eq!(decode(b"\0\x50\x09"), PrefaceError::UnknownHostType(9));
    assert_eq!(decode(b"\0\x50\x01\x7f\0\0"), PrefaceError::Truncated);
    assert_eq!(decode(b"\0\x50\x03\x04abc"), PrefaceError::Truncated);
    for name in ["", "a..b", "a b", "127.1", "\u{e4}"] {
        let tail = [
            b"\0\x50\x03".as_slice(),
            &[name.len() as u8],
            name.as_bytes(),
        ]
        .concat();
        assert!(matches!(decode(&tail), PrefaceError::Name(_)), "{name:?}");
    }
    let late = [
        b"0123456789abcdef\x00".as_slice(),
        &[0x80, 0x09, 0x27, 0xc1],
    ]
    .concat();
    assert_eq!(
        decode_dial(&with_body(&late)),
        Err(PrefaceError::DeadlineTooLong(600_001))
    );
}

#[test]
fn a_mapped_address_is_the_ipv4_address() {
    let mapped = Host::from("::ffff:10.1.2.3".parse::<IpAddr>().unwrap());
    assert_eq!(mapped.to_string(), "10.1.2.3");
    assert_eq!("::ffff:10.1.2.3".parse(), Ok(mapped.clone()));
    assert_eq!(
        "[::ffff:10.1.2.3]:80".parse::<Destination>().unwrap().host,
        mapped
    );

    let raw = Host::Ip("::ffff:10.1.2.3".parse().unwrap());
    let sent = DialRequest {
        destination: Destination {
            host: raw,
            port: 80,
        },
        ..request("a:1")
    };
    let (decoded, _) = decode_dial(&encoded(&sent)).unwrap().unwrap();
    assert_eq!(decoded.destination.host, mapped);

    let body = [
        b"0123456789abcdef\0\0\0\x50\x02".as_slice(),
        &[0; 10],
        b"\xff\xff\x0a\x01\x02\x03",
    ];
    let (decoded, _) = decode_dial(&with_body(&body.concat())).unwrap().unwrap();
    assert_eq!(decoded.destination.host, mapped);
}

#[test]
fn a_deadline_is_cut_to_its_limit() {
    let sent = DialRequest {
        deadline: Duration::MAX,
        ..request("a:1")
    };
    let (decoded, _) = decode_dial(&encoded(&sent)).unwrap().unwrap();
    assert_eq!(decoded.deadline, MAX_DEADLINE);
}

#[test]
fn a_detail_is_cut_between_characters() {
    let detail = "\u{20ac}".repeat(100);
    let sent = DialResponse::Refused {
        reason: CloseReason::DialFailed,
        detail,
    };
    let (decoded, _) = DialResponse::decode(&encoded_response(&sent))
        .unwrap()
        .unwrap();
    let DialResponse::Refused { detail, .. } = decoded else {
        panic!("{decoded:?}")
    };
    assert_eq!(detail, "\u{20ac}".repeat(85));

    let error = DialResponse::decode(&[0x42, 0x00, 0x41, 0x01]).unwrap_err();
    assert_eq!(error, PrefaceError::DetailTooLong(257));
    assert_eq!(
        error.reason(),
        CloseReason::ProtocolError,
        "must not be tried elsewhere"
    );
}

#[test]
fn an_unknown_code_is_never_tried_again() {
    let unknown = [0x41, 0xff, 0x01, b'x'];
    let expected = DialResponse::Refused {
        reason: CloseReason::DialFailed,
        detail: "x".to_owned(),
    };
    assert_eq!(DialResponse::decode(&unknown), Ok(Some((expected, 4))));
}

#[test]
fn a_refusal_never_reads_as_a_connection() {
    let sent = DialResponse::Refused {
        reason: CloseReason::Finished,
        detail: String::new(),
    };
    let (decoded, _) = DialResponse::decode(&encoded_response(&sent))
        .unwrap()
        .unwrap();
    assert_ne!(decoded, DialResponse::Connected);
}

#[test]
fn names_have_one_form() {
    let name: Name = "Web.Default.SVC.".parse().unwrap();
    assert_eq!(name.as_str(), "web.default.svc");
    let longest = format!("{0}.{0}.{0}.{1}", "a".repeat(63), "b".repeat(61));
    assert_eq!(
        longest.parse::<Name>().unwrap().as_str().len(),
        Name::MAX_LEN
    );
    assert!(format!("{longest}b").parse::<Name>().is_err());

    let label = "a".repeat(64);
    for bad in [
        "",
        ".",
        "a..b",
        ".a",
        "a b",
        "a/b",
        "b\u{fc}cher",
        "1",
        "10.1",
        "0x7f",
        "a.0X",
        &label,
    ] {
        let error = bad.parse::<Name>().unwrap_err();
        assert_eq!(error.name, bad);
    }
}

#[test]
fn destinations_are_written_host_colon_port() {
    for text in ["10.99.1.2:10250", "[fd00::1]:443", "web.default.svc:65535"] {
        assert_eq!(text.parse::<Destination>().unwrap().to_string(), text);
    }
    for (text, error) in [
        ("web", DestinationError::MissingPort),
        ("web:", DestinationError::BadPort),
        ("web:0", DestinationError::BadPort),
        ("web:65536", DestinationError::BadPort),
        ("web:+80", DestinationError::BadPort),
        ("::1:80", DestinationError::BadBrackets),
        ("[::1:80", DestinationError::BadBrackets),
        ("[10.0.0.1]:80", DestinationError::BadBrackets),
        ("[fe80::1%1]:80", DestinationError::BadBrackets),
    ] {
        assert_eq!(text.parse::<Destination>(), Err(error), "{text}");
    }
    assert!(matches!(
        ":80".parse::<Destination>(),
        Err(DestinationError::BadHost(_))
    ));
}

proptest! {
    #[test]
    fn head_round_trip(request in any_request(), key in any_key(), written in 0..1_u64 << 62, tail: Vec<u8>) {
        let state = Confirmation {
            accepted: Accepted { written, is_finished: true, ..Accepted::default() },
            status: Status::Aborted(CloseReason::PeerReset),
            is_safe: true,
        };
        let resume = StreamHead::Resume(ResumeRequest { key, state });
        for head in [StreamHead::Dial(request), StreamHead::Notices, resume] {
            let mut bytes = BytesMut::new();
            head.encode(&mut bytes);
            let size = bytes.len();
            bytes.extend(&tail);
            prop_assert_eq!(StreamHead::decode(&bytes), Ok(Some((head, size))));
            check_incremental(&bytes, StreamHead::decode)?;
        }
    }

    #[test]
    fn resume_response_round_trip(written in 0..1_u64 << 62, tail: Vec<u8>) {
        let state = Confirmation {
            accepted: Accepted { written, is_refused: true, ..Accepted::default() },
            status: Status::Settled,
            is_safe: false,
        };
        for response in [ResumeResponse::Resumed(state), ResumeResponse::Unknown, ResumeResponse::Busy] {
            let mut bytes = BytesMut::new();
            response.encode(&mut bytes);
            let size = bytes.len();
            bytes.extend(&tail);
            prop_assert_eq!(ResumeResponse::decode(&bytes), Ok(Some((response, size))));
            check_incremental(&bytes, ResumeResponse::decode)?;
        }
    }

    #[test]
    fn request_round_trip(request in any_request(), tail in prop::collection::vec(any::<u8>(), 0..16)) {
        let mut bytes = encoded(&request);
        let size = bytes.len();
        bytes.extend(tail);
        prop_assert_eq!(decode_dial(&bytes), Ok(Some((request, size))));
        check_incremental(&bytes, StreamHead::decode)?;
    }

    #[test]
    fn response_round_trip(response in any_response(), tail: Vec<u8>) {
        let mut bytes = encoded_response(&response);
        let size = bytes.len();
        bytes.extend(tail);
        prop_assert_eq!(DialResponse::decode(&bytes), Ok(Some((response, size))));
        check_incremental(&bytes, DialResponse::decode)?;
    }

    #[test]
    fn any_bytes(body: Vec<u8>, raw: Vec<u8>) {
        check_incremental(&raw, StreamHead::decode)?;
        check_incremental(&raw, DialResponse::decode)?;
        check_incremental(&raw, ResumeResponse::decode)?;
        check_incremental(&with_body(&body), StreamHead::decode)?;
    }

    /// A valid request with one changed byte reaches further into the decoder than noise does.
    #[test]
    fn damaged_requests(request in any_request(), at: prop::sample::Index, byte: u8) {
        let mut bytes = encoded(&request);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        check_incremental(&bytes, StreamHead::decode)?;
    }

    #[test]
    fn destination_text_round_trip(destination in any_destination()) {
        prop_assert_eq!(destination.to_string().parse(), Ok(destination));
    }

    #[test]
    fn any_text(text: String) {
        if let Ok(destination) = text.parse::<Destination>() {
            prop_assert_eq!(destination.to_string().parse(), Ok(destination));
        }
        if let Ok(name) = text.parse::<Name>() {
            prop_assert_eq!(name.as_str().parse(), Ok(name.clone()));
        }
    }
}
