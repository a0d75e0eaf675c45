//! The framing of the control stream and its messages: dividing the input changes nothing, and a
//! decoded message can be encoded and decoded again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::take_byte;
use tunnel_proto::control::{Envelope, FrameDecoder, FrameError, encode};

/// Number of decoded messages that are encoded again: thousands fit into one input, all alike.
const AGAIN: usize = 64;

fn decode_all(data: &[u8], piece: usize) -> (Vec<Envelope>, Result<(), FrameError>) {
    let mut decoder = FrameDecoder::default();
    let mut envelopes = Vec::new();
    for mut piece in data.chunks(piece) {
        loop {
            match decoder.decode(&mut piece) {
                Ok(Some(envelope)) => envelopes.push(envelope),
                Ok(None) => break,
                Err(error) => return (envelopes, Err(error)),
            }
        }
        assert!(piece.is_empty());
    }
    (envelopes, Ok(()))
}

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    let piece = 1 + usize::from(take_byte(&mut data).unwrap_or(0));
    let whole = decode_all(data, usize::MAX);
    assert_eq!(decode_all(data, piece), whole);

    for envelope in whole.0.into_iter().take(AGAIN) {
        // A field in more bytes than it needs is written shorter, so what was read always fits.
        let frame = encode(&envelope).expect("fits again");
        assert_eq!(decode_all(&frame, usize::MAX), (vec![envelope], Ok(())));
    }
});
