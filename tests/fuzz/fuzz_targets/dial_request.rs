//! The head of a stream that a server opens, and the variable-length integer at its start.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::decode_head;
use tunnel_proto::preface::StreamHead;
use tunnel_proto::varint::VarInt;

fuzz_target!(|data: &[u8]| {
    let as_result = |bytes: &[u8]| Ok::<_, ()>(VarInt::decode(bytes));
    if let Some(value) = decode_head(data, as_result) {
        let mut again = Vec::new();
        value.encode(&mut again);
        assert_eq!(VarInt::decode(&again), Some((value, again.len())));
    }
    if let Some(head) = decode_head(data, StreamHead::decode) {
        let mut again = BytesMut::new();
        head.encode(&mut again);
        assert_eq!(decode_head(&again, StreamHead::decode), Some(head));
    }
});
