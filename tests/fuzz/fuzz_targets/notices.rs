//! Notices about sessions, and the answer to a request to continue one: what is decoded can be encoded and
//! decoded again, however the bytes arrive.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::decode_head;
use tunnel_proto::preface::ResumeResponse;
use tunnel_proto::resumption::Notice;

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    while let Some(notice) = decode_head(rest, Notice::decode) {
        let mut again = BytesMut::new();
        notice.encode(&mut again);
        assert_eq!(decode_head(&again, Notice::decode), Some(notice));
        let decoded = Notice::decode(rest).ok().flatten();
        let Some((_, size)) = decoded else {
            break;
        };
        rest = &rest[size..];
    }
    if let Some(response) = decode_head(data, ResumeResponse::decode) {
        let mut again = BytesMut::new();
        response.encode(&mut again);
        assert_eq!(decode_head(&again, ResumeResponse::decode), Some(response));
    }
});
