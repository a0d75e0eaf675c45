//! Replacement of the authority of HTTP/2 clients that have no host to name.
//!
//! grpc-go, and kube-apiserver with it, dials a Unix socket by its path and sends that path as
//! `:authority`: `%2Frun%2Fx.sock`. It is not an authority by RFC 3986 (section 3.2), so h2 resets the
//! stream before its user sees it. On a Unix socket the name means nothing; [`AnyAuthority`] replaces
//! it by a valid one.
//!
//! Data is copied only where a HEADERS frame (RFC 9113, section 6.2) has to be examined. The new value
//! is never longer than the old one: the reader's table then keeps each entry at least as long as the
//! writer's (RFC 7541, section 4), and entries are counted from the newest. A header block in several
//! frames stays as it is.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Length of the client preface (RFC 9113, section 3.4).
const PREFACE: usize = 24;

/// Length of the head of a frame (RFC 9113, section 4.1).
const HEAD: usize = 9;

/// Maximum payload of a frame unless the settings allow more, which ours don't.
const MAX_PAYLOAD: usize = 16_384;

const HEADERS: u8 = 1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// Index of `:authority` in the static table (RFC 7541, appendix A).
const AUTHORITY: usize = 1;

/// The replacement value: its length, and a name.
const NAME: &[u8] = b"\x01x";

/// A byte stream from an HTTP/2 client whose authority does not matter.
#[derive(Debug)]
pub(crate) struct AnyAuthority<T> {
    inner: T,
    /// Number of bytes to come that pass unchanged.
    pass: usize,
    /// Beginning of a frame to be examined.
    held: BytesMut,
    /// Examined data that was not read yet.
    done: BytesMut,
}

impl<T> AnyAuthority<T> {
    /// Wraps a fresh connection.
    pub(crate) fn new(inner: T) -> Self {
        Self {
            inner,
            pass: PREFACE,
            held: BytesMut::new(),
            done: BytesMut::new(),
        }
    }

    /// Returns how many of `bytes` pass before the next one to be examined.
    fn skip(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        loop {
            let n = self.pass.min(bytes.len() - at);
            (at, self.pass) = (at + n, self.pass - n);
            match head(&bytes[at..]) {
                Some((payload, kind)) if kind != HEADERS || payload > MAX_PAYLOAD => {
                    self.pass = HEAD + payload;
                }
                _ => return at,
            }
        }
    }

    /// Examines the whole frames.
    fn look(&mut self) {
        loop {
            let held = std::mem::take(&mut self.held);
            let passed = self.skip(&held);
            self.held = held;
            self.done.extend_from_slice(&self.held[..passed]);
            self.held.advance(passed);
            let Some((payload, _)) = head(&self.held) else {
                return;
            };
            if self.held.len() < HEAD + payload {
                return;
            }
            let frame = self.held.split_to(HEAD + payload);
            match renamed(&frame) {
                Some(renamed) => self.done.extend_from_slice(&renamed),
                None => self.done.extend_from_slice(&frame),
            }
        }
    }
}

/// Returns payload length and type of a frame, once its head is there.
fn head(bytes: &[u8]) -> Option<(usize, u8)> {
    let [a, b, c, kind, ..] = *bytes.first_chunk::<HEAD>()?;
    Some((u32::from_be_bytes([0, a, b, c]) as usize, kind))
}

/// Returns a HEADERS frame with another authority; `None` if it has none, or stays as it is.
fn renamed(frame: &[u8]) -> Option<Vec<u8>> {
    let flags = frame[4];
    if flags & END_HEADERS == 0 {
        return None;
    }
    let mut payload = &frame[HEAD..];
    if flags & PADDED != 0 {
        let (&padding, rest) = payload.split_first()?;
        payload = rest.get(..rest.len().checked_sub(padding.into())?)?;
    }
    let (priority, block) = payload.split_at_checked(if flags & PRIORITY != 0 { 5 } else { 0 })?;
    let (before, value) = find_authority(block)?;
    let after = &block[before + value..];
    let length = priority.len() + before + NAME.len() + after.len();
    let mut renamed = Vec::with_capacity(HEAD + length);
    // Shorter than a frame may be, so it fits.
    renamed.extend_from_slice(&(length as u32).to_be_bytes()[1..]);
    renamed.extend_from_slice(&[HEADERS, flags & !PADDED]);
    renamed.extend_from_slice(&frame[5..HEAD]);
    renamed.extend_from_slice(priority);
    renamed.extend_from_slice(&block[..before]);
    renamed.extend_from_slice(NAME);
    renamed.extend_from_slice(after);
    Some(renamed)
}

/// Returns the position of the authority's value in a header block, and its length with the length
/// field.
fn find_authority(block: &[u8]) -> Option<(usize, usize)> {
    let mut at = 0;
    while let Some(first) = block.get(at) {
        // RFC 7541, section 6: an index alone, a literal that is indexed, a new table size, and
        // literals that are not indexed.
        let (prefix, literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let (index, used) = integer(&block[at..], prefix)?;
        at += used;
        if !literal {
            continue;
        }
        if index == 0 {
            at += string(&block[at..])?;
        }
        let value = string(&block[at..])?;
        if index == AUTHORITY && value >= NAME.len() {
            return Some((at, value));
        }
        at += value;
    }
    None
}

/// Returns the encoded length of a string (RFC 7541, section 5.2).
fn string(bytes: &[u8]) -> Option<usize> {
    let (length, used) = integer(bytes, 7)?;
    let whole = used.checked_add(length)?;
    (whole <= bytes.len()).then_some(whole)
}

/// Returns an integer behind `prefix` bits, and its encoded length (RFC 7541, section 5.1).
fn integer(bytes: &[u8], prefix: u8) -> Option<(usize, usize)> {
    let (&first, rest) = bytes.split_first()?;
    let most = (1 << prefix) - 1;
    let mut value = usize::from(first & most);
    if value < most.into() {
        return Some((value, 1));
    }
    // Three bytes go far beyond the longest frame.
    for (n, &byte) in rest.iter().take(3).enumerate() {
        value += usize::from(byte & 0x7f) << (7 * n);
        if byte & 0x80 == 0 {
            return Some((value, n + 2));
        }
    }
    None
}

impl<T: AsyncRead + Unpin> AsyncRead for AnyAuthority<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = into.filled().len();
        while this.done.is_empty() {
            ready!(Pin::new(&mut this.inner).poll_read(cx, into))?;
            let fresh = &into.filled()[before..];
            if fresh.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let passed = match this.held.is_empty() {
                true => this.skip(fresh),
                false => 0,
            };
            this.held.extend_from_slice(&fresh[passed..]);
            into.set_filled(before + passed);
            this.look();
            if passed > 0 {
                return Poll::Ready(Ok(()));
            }
        }
        let n = this.done.len().min(into.remaining());
        into.put_slice(&this.done.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    const PATH: &[u8] = b"%2Frun%2Fx.sock";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags, 0, 0, 0, 1]);
        frame.extend(payload);
        frame
    }

    /// POST, a new table size, a name and a value as literals, an authority, an indexed path.
    fn block(authority: &[u8]) -> Vec<u8> {
        let mut block = vec![0x83, 0x20, 0x00, 1, b'a', 2, b'b', b'c', 0x41];
        block.push(authority.len() as u8);
        block.extend(authority);
        block.push(0x84);
        block
    }

    fn client(authority: &[u8]) -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, &[0, 3, 0, 0, 0, 100]));
        bytes.extend(frame(HEADERS, END_HEADERS, &block(authority)));
        bytes.extend(frame(0, 0, &[7; 300]));
        let mut priority = vec![0, 0, 0, 0, 16];
        priority.extend(block(authority));
        bytes.extend(frame(HEADERS, END_HEADERS | PRIORITY, &priority));
        bytes.extend(frame(0, 1, b"end"));
        bytes
    }

    /// Gives `bytes` out in pieces as long as `pieces` says, in turn.
    struct Pieces {
        bytes: Vec<u8>,
        pieces: Vec<usize>,
        turn: usize,
    }

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            into: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let piece = self.pieces[self.turn % self.pieces.len()];
            self.turn += 1;
            let n = piece.min(self.bytes.len()).min(into.remaining());
            into.put_slice(&self.bytes[..n]);
            self.bytes.drain(..n);
            Poll::Ready(Ok(()))
        }
    }

    fn read(bytes: Vec<u8>, pieces: Vec<usize>) -> Vec<u8> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let mut reader = AnyAuthority::new(Pieces {
            bytes,
            pieces,
            turn: 0,
        });
        let mut read = Vec::new();
        runtime.block_on(reader.read_to_end(&mut read)).unwrap();
        read
    }

    proptest! {
        #[test]
        fn a_path_becomes_a_name(pieces in prop::collection::vec(1..400_usize, 1..20)) {
            prop_assert_eq!(read(client(PATH), pieces), client(b"x"));
        }

        #[test]
        fn what_is_not_understood_passes(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            flags in any::<u8>(),
            pieces in prop::collection::vec(1..400_usize, 1..20),
        ) {
            let mut bytes = vec![0; PREFACE];
            bytes.extend(frame(HEADERS, flags, &payload));
            let unchanged = renamed(&bytes[PREFACE..]).is_none();
            bytes.extend(frame(0, 1, b"end"));
            let read = read(bytes.clone(), pieces);
            prop_assert!(!unchanged || read == bytes);
            prop_assert!(read.ends_with(&frame(0, 1, b"end")));
        }
    }

    #[test]
    fn padding_goes_with_the_path() {
        let mut padded = vec![3];
        padded.extend(block(PATH));
        padded.extend([0; 3]);
        let frame_in = frame(HEADERS, END_HEADERS | PADDED, &padded);
        let expected = frame(HEADERS, END_HEADERS, &block(b"x"));
        assert_eq!(renamed(&frame_in).unwrap(), expected);
    }
}
