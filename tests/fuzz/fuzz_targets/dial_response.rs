//! The dial response.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::decode_head;
use tunnel_proto::close::CloseReason;
use tunnel_proto::preface::{DialResponse, MAX_DETAIL};

fuzz_target!(|data: &[u8]| {
    let Some(response) = decode_head(data, DialResponse::decode) else {
        return;
    };
    if let DialResponse::Refused { reason, detail } = &response {
        assert!(detail.len() <= MAX_DETAIL);
        assert_ne!(*reason, CloseReason::Finished);
    }
    let mut again = BytesMut::new();
    response.encode(&mut again);
    assert_eq!(decode_head(&again, DialResponse::decode), Some(response));
});
