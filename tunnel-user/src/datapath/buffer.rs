//! Reading into owned buffers without a copy, and without a buffer while there is nothing to read.

use std::cell::RefCell;
use std::io;

use bytes::{Bytes, BytesMut};

/// The most that one read takes.
const READ_SIZE: usize = 64 << 10;

/// Below this a read is copied out: a short chunk that waits to be acknowledged must not hold a
/// whole buffer.
const COPY_BELOW: usize = 8 << 10;

thread_local! {
    static SCRATCH: RefCell<BytesMut> = RefCell::new(BytesMut::with_capacity(READ_SIZE));
}

/// Calls `read` with room for [`READ_SIZE`] bytes and returns what it appended; empty is the end.
///
/// # Errors
/// Those of `read`.
pub(super) fn read_owned(
    read: impl FnOnce(&mut BytesMut) -> io::Result<usize>,
) -> io::Result<Bytes> {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.clear();
        scratch.reserve(READ_SIZE);
        let n = read(scratch)?;
        if n < COPY_BELOW {
            return Ok(Bytes::copy_from_slice(&scratch[..n]));
        }
        Ok(scratch.split_to(n).freeze())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut;

    #[test]
    fn short_and_long_reads_come_out_whole() {
        for n in [0, 1, COPY_BELOW - 1, COPY_BELOW, READ_SIZE] {
            let bytes = read_owned(|buf| {
                buf.put_bytes(7, n);
                Ok(n)
            });
            assert_eq!(bytes.unwrap(), vec![7; n]);
        }
    }
}
