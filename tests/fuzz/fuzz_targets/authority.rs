//! HTTP/2 of a client without a host name, whose authority this program replaces: dividing the
//! input changes nothing, and only the header block of a HEADERS frame changes.
#![no_main]

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncRead, ReadBuf};
use tunnel_fuzz::take_byte;

// Without the crate that it belongs to, which brings everything else along.
#[allow(dead_code)]
#[path = "../../../tunnel-user/konnectivity/src/grpc/authority.rs"]
mod authority;

use authority::AnyAuthority;

/// The client's first bytes and the head of a frame, with any content.
const PREFACE: usize = 24;
const HEAD: usize = 9;

struct Pieces<'a> {
    rest: &'a [u8],
    piece: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let n = self.piece.min(self.rest.len()).min(into.remaining());
        into.put_slice(self.rest.split_off(..n).unwrap_or_default());
        Poll::Ready(Ok(()))
    }
}

fn read(data: &[u8], piece: usize, room: usize) -> Vec<u8> {
    let mut reader = AnyAuthority::new(Pieces { rest: data, piece });
    let mut read = Vec::new();
    let mut room = vec![0; room];
    loop {
        let mut into = ReadBuf::new(&mut room);
        let polled =
            Pin::new(&mut reader).poll_read(&mut Context::from_waker(Waker::noop()), &mut into);
        assert!(matches!(polled, Poll::Ready(Ok(()))));
        if into.filled().is_empty() {
            return read;
        }
        read.extend_from_slice(into.filled());
    }
}

/// Returns the whole frames behind the preface: head and payload.
fn frames(bytes: &[u8]) -> Vec<(&[u8], &[u8])> {
    let mut rest = bytes.get(PREFACE..).unwrap_or_default();
    let mut frames = Vec::new();
    while let Some((head, behind)) = rest.split_at_checked(HEAD) {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let Some((payload, behind)) = behind.split_at_checked(length) else {
            break;
        };
        frames.push((head, payload));
        rest = behind;
    }
    frames
}

fuzz_target!(|data: &[u8]| {
    let mut data = data;
    let piece = 1 + usize::from(take_byte(&mut data).unwrap_or_default());
    let room = 1 + usize::from(take_byte(&mut data).unwrap_or_default());
    let whole = read(data, usize::MAX, 1 << 15);
    assert_eq!(read(data, piece, room), whole);

    let (before, after) = (frames(data), frames(&whole));
    assert_eq!(before.len(), after.len());
    for (before, after) in before.iter().zip(after) {
        // Type, and stream: what a frame is and whose.
        assert_eq!(before.0[3], after.0[3]);
        assert_eq!(before.0[5..], after.0[5..]);
        match before.0[3] {
            1 => assert!(after.1.len() <= before.1.len()),
            _ => assert_eq!(*before, after),
        }
    }
});
