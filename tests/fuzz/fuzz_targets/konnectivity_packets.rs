//! The packets of Konnectivity in their frames: dividing the input changes nothing, and a decoded
//! packet can be encoded and decoded again.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::take_byte;
use tunnel_proto::konnectivity::{DecodeError, Decoder, Packet};

/// Number of decoded packets that are encoded again: thousands fit into one input, all alike.
const AGAIN: usize = 64;

fn decode_all(data: &Bytes, piece: usize) -> (Vec<Packet>, Result<(), DecodeError>) {
    let mut decoder = Decoder::default();
    let mut packets = Vec::new();
    let mut rest = data.clone();
    while !rest.is_empty() {
        let mut piece = rest.split_to(piece.min(rest.len()));
        loop {
            match decoder.decode(&mut piece) {
                Ok(Some(packet)) => packets.push(packet),
                Ok(None) => break,
                Err(error) => return (packets, Err(error)),
            }
        }
        assert!(piece.is_empty());
    }
    (packets, Ok(()))
}

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    let piece = 1 + usize::from(take_byte(&mut data).unwrap_or(0));
    let data = Bytes::copy_from_slice(data);
    let whole = decode_all(&data, usize::MAX);
    assert_eq!(decode_all(&data, piece), whole);

    for packet in whole.0.into_iter().take(AGAIN) {
        assert_eq!(decode_all(&packet.frame(), piece), (vec![packet], Ok(())));
    }
});
