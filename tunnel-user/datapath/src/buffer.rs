//! Reads into owned buffers without a copy, and without a buffer while there is nothing to read.

use std::cell::RefCell;
use std::io;

use bytes::Bytes;

use crate::buffers::Buffers;

/// Maximum size of one read.
const READ_SIZE: usize = 64 << 10;

/// Size below which a read is copied out: a short chunk that waits for its acknowledgement must not
/// hold a whole buffer.
const COPY_BELOW: usize = 8 << 10;

/// Maximum number of buffers of one thread that wait for credit or acknowledgement; further reads are
/// copied.
const MOST: usize = 128;

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::new(Buffers::new(READ_SIZE, MOST));
}

/// Calls `read` with room for [`READ_SIZE`] bytes and returns the bytes read; none is the end.
///
/// # Errors
/// Those of `read`.
pub(super) fn read_owned(read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<Bytes> {
    BUFFERS.with_borrow_mut(|buffers| {
        let mut buffer = buffers.take();
        let read = read(&mut buffer.bytes).map(|n| match n {
            n if n < COPY_BELOW => Bytes::copy_from_slice(&buffer.bytes[..n]),
            n => buffer.part(n, n).freeze(),
        });
        buffers.give_back(buffer);
        read
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_reads_come_out_whole() {
        for n in [0, 1, COPY_BELOW - 1, COPY_BELOW, READ_SIZE] {
            let bytes = read_owned(|buffer| {
                buffer[..n].fill(7);
                Ok(n)
            });
            assert_eq!(bytes.unwrap(), vec![7; n]);
        }
    }
}
