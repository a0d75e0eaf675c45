//! Common parts of the fuzz targets.

pub mod sessions;

// Without the crates that they belong to, which bring everything else along.
#[path = "../../../tunnel-user/observe/src/access.rs"]
pub mod access;
#[allow(dead_code)]
#[path = "../../../tunnel-user/datapath/src/budget.rs"]
pub mod budget;
#[path = "../../../tunnel-user/observe/src/metrics.rs"]
pub mod metrics;
#[path = "../../../tunnel-user/datapath/src/stream.rs"]
pub mod stream;
#[path = "../../../tunnel-user/observe/src/targets.rs"]
pub mod targets;

// These files, and those of the sessions, name each other by their crates.
extern crate self as cpc_datapath;
extern crate self as cpc_observe;

use std::fmt::Debug;
use std::fs;
use std::time::Duration;

use bytes::Bytes;

pub use budget::Budget;

/// Checks what every decoder of the head of a stream must do for any `data`: it takes no more than
/// its input, it needs all that it takes, and with less it waits or returns the same. Returns the
/// decoded value.
pub fn decode_head<T, E>(
    data: &[u8],
    decode: impl Fn(&[u8]) -> Result<Option<(T, usize)>, E>,
) -> Option<T>
where
    T: PartialEq + Debug,
    E: PartialEq + Debug,
{
    let whole = decode(data);
    match &whole {
        Ok(Some((_, consumed))) => {
            assert_eq!(decode(&data[..*consumed]), whole);
            assert_eq!(decode(&data[..consumed - 1]), Ok(None));
        }
        Ok(None) => assert_eq!(decode(&data[..data.len() / 2]), Ok(None)),
        Err(_) => {
            let half = decode(&data[..data.len() / 2]);
            assert!(
                half == Ok(None) || half == whole,
                "{half:?} became {whole:?}"
            );
        }
    }
    whole.ok().flatten().map(|(value, _)| value)
}

/// Takes one byte off the head of `data`.
pub fn take_byte(data: &mut &[u8]) -> Option<u8> {
    data.split_off_first().copied()
}

/// Takes as many bytes off the head of `data` as its first byte says, or the rest.
pub fn take_piece<'a>(data: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::from(take_byte(data)?);
    data.split_off(..length.min(data.len()))
}

/// Takes a number off the head of `data`: mostly a small one, so that it is met again.
pub fn take_number(data: &mut &[u8]) -> i64 {
    match take_byte(data).unwrap_or_default() {
        byte @ 0..16 => i64::from(byte),
        byte @ 16..32 => 16 - i64::from(byte),
        32 => i64::MAX,
        33 => i64::MIN,
        byte => i64::from(byte % 8),
    }
}

/// Returns the number of descriptors that this process has open.
pub fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

// Log lines of connections have these; no target writes any.
fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

/// Returns that many bytes, without a copy; at most 512 KiB.
pub fn blank(length: usize) -> Bytes {
    static BYTES: [u8; 1 << 19] = [0; 1 << 19];
    Bytes::from_static(&BYTES[..length.min(BYTES.len())])
}
