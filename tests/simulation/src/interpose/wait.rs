//! Waiting for descriptors: epoll(7), eventfd(2), poll(2).

use std::ffi::{c_int, c_long, c_uint};
use std::{ptr, slice};

use super::{ROOT, SIMULATED, answer_int, is_ours, is_simulated, kernel, real};
use crate::kernel::Kernel;

/// epoll_create1(2)
#[unsafe(no_mangle)]
pub extern "C" fn epoll_create1(flags: c_int) -> c_int {
    if !is_simulated() {
        return real!(SYS_epoll_create1, flags) as c_int;
    }
    kernel(Kernel::epoll_create)
}

/// eventfd(2)
#[unsafe(no_mangle)]
pub extern "C" fn eventfd(count: c_uint, flags: c_int) -> c_int {
    if !is_simulated() {
        return real!(SYS_eventfd2, count, flags) as c_int;
    }
    kernel(Kernel::eventfd)
}

/// epoll_ctl(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_ctl(
    epoll: c_int,
    operation: c_int,
    fd: c_int,
    event: *mut libc::epoll_event,
) -> c_int {
    if !is_ours(epoll) {
        return real!(SYS_epoll_ctl, epoll, operation, fd, event) as c_int;
    }
    let interest = match event.is_null() {
        true => (0, 0),
        // SAFETY: the caller's.
        false => unsafe { ((*event).events, (*event).u64) },
    };
    answer_int(kernel(|kernel| {
        kernel.epoll_ctl(epoll, operation, fd, interest)
    }))
}

/// epoll_wait(2). A process without work returns to the simulation, which moves the clock.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_wait(
    epoll: c_int,
    events: *mut libc::epoll_event,
    most: c_int,
    timeout: c_int,
) -> c_int {
    if !is_ours(epoll) {
        return real!(SYS_epoll_pwait, epoll, events, most, timeout, 0, 8) as c_int;
    }
    let take = || kernel(|kernel| kernel.epoll_take(epoll, most as usize));
    let mut found = match take() {
        Ok(found) => found,
        Err(error) => return answer_int::<usize>(Err(error)),
    };
    if found.is_empty() && timeout != 0 {
        let until = u64::try_from(timeout).map_or(u64::MAX, |ms| {
            SIMULATED.with(|it| it.now.get()) + ms * 1_000_000
        });
        SIMULATED.with(|it| it.idle_until.set(Some(until)));
        if let Some(root) = ROOT.take() {
            root.wake();
        }
        // The waking itself is an event.
        found = take().unwrap_or_default();
    }
    for (at, (flags, data)) in found.iter().enumerate() {
        // SAFETY: the caller gives room for `most` events, and there are no more.
        unsafe {
            events.add(at).write_unaligned(libc::epoll_event {
                events: *flags,
                u64: *data,
            });
        }
    }
    found.len() as c_int
}

/// poll(2), which here never waits.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn poll(
    fds: *mut libc::pollfd,
    count: libc::nfds_t,
    timeout: c_int,
) -> c_int {
    let polled = match count {
        0 => &mut [],
        // SAFETY: the caller's.
        count => unsafe { slice::from_raw_parts_mut(fds, count as usize) },
    };
    if !polled.iter().any(|it| is_ours(it.fd)) {
        let wait = libc::timespec {
            tv_sec: libc::time_t::from(timeout / 1000),
            tv_nsec: c_long::from(timeout % 1000) * 1_000_000,
        };
        let wait = if timeout < 0 {
            ptr::null()
        } else {
            &raw const wait
        };
        return real!(SYS_ppoll, fds, count, wait, 0, 8) as c_int;
    }
    let mut ready = 0;
    for it in polled {
        let flags = kernel(|kernel| kernel.readiness(it.fd)) as i16;
        it.revents = flags & (it.events | libc::POLLERR | libc::POLLHUP);
        ready += c_int::from(it.revents != 0);
    }
    ready
}
