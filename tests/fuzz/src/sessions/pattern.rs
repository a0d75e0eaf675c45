//! The bytes of a stream: at each offset another one than near it.

use bytes::Bytes;

/// Maximum length of a part.
pub const MAX_PART: usize = 16 << 10;

/// Number of bytes after which they repeat.
const PERIOD: usize = 251;

static BYTES: [u8; MAX_PART + PERIOD] = {
    let mut bytes = [0; MAX_PART + PERIOD];
    let mut at = 0;
    while at < bytes.len() {
        bytes[at] = (at % PERIOD) as u8;
        at += 1;
    }
    bytes
};

/// Returns the bytes of a stream at `offset`, without a copy; at most 16 KiB.
pub fn part(offset: u64, length: usize) -> Bytes {
    let start = (offset % PERIOD as u64) as usize;
    Bytes::from_static(&BYTES[start..start + length.min(MAX_PART)])
}

/// Asserts that a stream has `bytes` at `offset`.
pub fn assert_at(mut offset: u64, bytes: &[u8]) {
    for chunk in bytes.chunks(MAX_PART) {
        let is_same = part(offset, chunk.len()) == chunk;
        assert!(is_same, "other bytes at {offset}");
        offset += chunk.len() as u64;
    }
}
