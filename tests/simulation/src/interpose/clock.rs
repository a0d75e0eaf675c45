//! The clock, random numbers, and what else depends on the host.

use std::ffi::{c_char, c_int, c_long, c_uint, c_void};
use std::{ptr, slice};

use super::{SIMULATED, is_simulated, real, real_call};

/// clock_gettime(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    if !is_simulated() || time.is_null() {
        return real!(SYS_clock_gettime, clock, time) as c_int;
    }
    let (now, wall) = SIMULATED.with(|it| (it.now.get() as i64, it.wall.get()));
    let shown = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => now + wall,
        _ => now,
    };
    // SAFETY: the caller's.
    unsafe {
        (*time).tv_sec = shown / 1_000_000_000;
        (*time).tv_nsec = shown % 1_000_000_000;
    }
    0
}

fn fill(bytes: &mut [u8]) {
    SIMULATED.with(|it| {
        let mut random = it.random.get();
        for part in bytes.chunks_mut(8) {
            part.copy_from_slice(&random.next().to_le_bytes()[..part.len()]);
        }
        it.random.set(random);
    });
}

/// getrandom(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(place: *mut c_void, length: usize, flags: c_uint) -> isize {
    if !is_simulated() {
        return real!(SYS_getrandom, place, length, flags);
    }
    if length > 0 {
        // SAFETY: the caller's.
        fill(unsafe { slice::from_raw_parts_mut(place.cast(), length) });
    }
    length as isize
}

/// syscall(2): random numbers that are fetched past getrandom(2).
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> c_long {
    if number == libc::SYS_getrandom && is_simulated() {
        // SAFETY: the caller's.
        return unsafe { getrandom(a as *mut c_void, b, c as c_uint) as c_long };
    }
    // SAFETY: the caller's.
    unsafe { real_call(number, [a, b, c, d, e, f]) as c_long }
}

/// gethostname(2), so that no trace depends on the host.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gethostname(place: *mut c_char, length: usize) -> c_int {
    // SAFETY: the caller gives room for `length` bytes.
    unsafe {
        let name = b"simulation\0";
        let length = length.min(name.len());
        ptr::copy_nonoverlapping(name.as_ptr().cast(), place, length);
    }
    0
}

/// madvise(2). A fork has the random state of its parent here, which costs milliseconds to make: seeds are
/// no secrets, and keys protect nothing.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int {
    match advice {
        libc::MADV_WIPEONFORK => 0,
        _ => real!(SYS_madvise, address, length, advice) as c_int,
    }
}
