//! Joining, the request of an unauthenticated peer and the answer to a worker: dividing the input
//! changes nothing, and a decoded message can be encoded and decoded again.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use tunnel_fuzz::take_byte;
use tunnel_proto::join::{Reader, answer, request};
use tunnel_proto::session::SessionError;

type Read<T> = Result<Option<T>, SessionError>;

fn divided<T>(data: &[u8], piece: usize, read: fn(&mut Reader, &[u8]) -> Read<T>) -> Read<T> {
    let mut reader = Reader::default();
    for piece in data.chunks(piece) {
        if let Some(message) = read(&mut reader, piece)? {
            return Ok(Some(message));
        }
    }
    Ok(None)
}

fn whole<T: PartialEq + Debug>(
    data: &[u8],
    piece: usize,
    read: fn(&mut Reader, &[u8]) -> Read<T>,
) -> Option<T> {
    let whole = divided(data, usize::MAX, read);
    assert_eq!(divided(data, piece, read), whole);
    whole.ok().flatten()
}

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    let piece = 1 + usize::from(take_byte(&mut data).unwrap_or(0));
    if let Some(join) = whole(data, piece, Reader::request) {
        let frame = request(&join).expect("fits again");
        assert_eq!(Reader::default().request(&frame), Ok(Some(join)));
    }
    if let Some(told) = whole(data, piece, Reader::answer) {
        let frame = answer(&told).expect("fits again");
        assert_eq!(Reader::default().answer(&frame), Ok(Some(told)));
    }
});
