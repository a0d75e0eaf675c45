//! The dial request, and the variable-length integer at its head.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::decode_head;
use tunnel_proto::preface::DialRequest;
use tunnel_proto::varint::VarInt;

fuzz_target!(|data: &[u8]| {
    let as_result = |bytes: &[u8]| Ok::<_, ()>(VarInt::decode(bytes));
    if let Some(value) = decode_head(data, as_result) {
        let mut again = Vec::new();
        value.encode(&mut again);
        assert_eq!(VarInt::decode(&again), Some((value, again.len())));
    }
    if let Some(request) = decode_head(data, DialRequest::decode) {
        let mut again = BytesMut::new();
        request.encode(&mut again);
        assert_eq!(decode_head(&again, DialRequest::decode), Some(request));
    }
});
