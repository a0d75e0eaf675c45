//! Reading and writing: streams, and datagrams with their control data.

use std::ffi::{c_int, c_uint, c_void};
use std::mem::offset_of;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::{ptr, slice};

use super::{address, answer, answer_int, is_ours, kernel, put_address, real};

/// Reads from a simulated descriptor.
///
/// # Safety
/// `place` has `length` bytes.
unsafe fn read_ours(fd: c_int, place: *mut u8, length: usize) -> isize {
    let bytes = kernel(|kernel| match kernel.is_event(fd) {
        true => kernel
            .event_take(fd)
            .map(|count| count.to_ne_bytes().to_vec()),
        false => kernel.recv(fd, length),
    });
    answer(bytes.map(|bytes| {
        // SAFETY: the caller's; there are no more than `length`.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len().min(length)) };
        bytes.len()
    }))
}

/// Writes to a simulated descriptor.
fn write_ours(fd: c_int, bytes: &[u8]) -> isize {
    answer(kernel(|kernel| match kernel.is_event(fd) {
        true => {
            let count = bytes.first_chunk().copied().map(u64::from_ne_bytes);
            kernel.event_add(fd, count.unwrap_or(0))
        }
        false => kernel.send(fd, bytes),
    }))
}

/// Returns the bytes of a caller.
///
/// # Safety
/// `from` has `length` bytes.
unsafe fn bytes<'a>(from: *const c_void, length: usize) -> &'a [u8] {
    match length {
        0 => &[],
        // SAFETY: the caller's.
        length => unsafe { slice::from_raw_parts(from.cast(), length) },
    }
}

/// read(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(fd: c_int, place: *mut c_void, length: usize) -> isize {
    if !is_ours(fd) {
        return real!(SYS_read, fd, place, length);
    }
    // SAFETY: the caller's.
    unsafe { read_ours(fd, place.cast(), length) }
}

/// write(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, from: *const c_void, length: usize) -> isize {
    if !is_ours(fd) {
        return real!(SYS_write, fd, from, length);
    }
    // SAFETY: the caller's.
    write_ours(fd, unsafe { bytes(from, length) })
}

/// recv(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recv(fd: c_int, place: *mut c_void, length: usize, flags: c_int) -> isize {
    if !is_ours(fd) {
        return real!(SYS_recvfrom, fd, place, length, flags, 0, 0);
    }
    // SAFETY: the caller's.
    unsafe { read_ours(fd, place.cast(), length) }
}

/// send(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn send(
    fd: c_int,
    from: *const c_void,
    length: usize,
    flags: c_int,
) -> isize {
    if !is_ours(fd) {
        return real!(SYS_sendto, fd, from, length, flags, 0, 0);
    }
    // SAFETY: the caller's.
    write_ours(fd, unsafe { bytes(from, length) })
}

/// writev(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(fd: c_int, parts: *const libc::iovec, count: c_int) -> isize {
    if !is_ours(fd) {
        return real!(SYS_writev, fd, parts, count);
    }
    // SAFETY: the caller's.
    write_ours(fd, &unsafe { gather(parts, count as usize) })
}

/// readv(2): into the first part alone, as a short read may.
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn readv(fd: c_int, parts: *const libc::iovec, count: c_int) -> isize {
    if !is_ours(fd) {
        return real!(SYS_readv, fd, parts, count);
    }
    // SAFETY: the caller's; no part is read where there is none.
    unsafe {
        match parts.as_ref().filter(|_| count > 0) {
            Some(part) => read_ours(fd, part.iov_base.cast(), part.iov_len),
            None => 0,
        }
    }
}

/// Returns the bytes of all parts.
///
/// # Safety
/// `parts` are `count` valid parts.
unsafe fn gather(parts: *const libc::iovec, count: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for at in 0..count {
        // SAFETY: the caller's.
        unsafe {
            let part = &*parts.add(at);
            all.extend_from_slice(bytes(part.iov_base, part.iov_len));
        }
    }
    all
}

/// sendmsg(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendmsg(fd: c_int, message: *const libc::msghdr, flags: c_int) -> isize {
    if !is_ours(fd) {
        return real!(SYS_sendmsg, fd, message, flags);
    }
    // SAFETY: the caller's.
    unsafe {
        let message = &*message;
        let all = gather(message.msg_iov, message.msg_iovlen);
        if !kernel(|kernel| kernel.is_udp(fd)) {
            return write_ours(fd, &all);
        }
        let to = match address(message.msg_name.cast(), message.msg_namelen) {
            Ok(to) => to,
            Err(error) => return answer::<usize>(Err(error)),
        };
        let (mut segment, mut ecn) = (all.len(), 0);
        let mut control = libc::CMSG_FIRSTHDR(message);
        while let Some(header) = control.as_ref() {
            let data = libc::CMSG_DATA(control);
            match (header.cmsg_level, header.cmsg_type) {
                (libc::SOL_UDP, libc::UDP_SEGMENT) => {
                    segment = data.cast::<u16>().read_unaligned().into();
                }
                (libc::IPPROTO_IP, libc::IP_TOS) => ecn = data.read() & 0b11,
                _ => {}
            }
            control = libc::CMSG_NXTHDR(message, control);
        }
        answer(kernel(|kernel| {
            kernel.send_datagrams(fd, to, &all, segment, ecn)
        }))
    }
}

/// recvmmsg(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recvmmsg(
    fd: c_int,
    messages: *mut libc::mmsghdr,
    count: c_uint,
    flags: c_int,
    timeout: *mut libc::timespec,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_recvmmsg, fd, messages, count, flags, timeout) as c_int;
    }
    for at in 0..count as usize {
        let packet = match kernel(|kernel| kernel.receive_datagram(fd)) {
            Ok(packet) => packet,
            Err(error) if at == 0 => return answer_int::<usize>(Err(error)),
            Err(_) => return at as c_int,
        };
        // SAFETY: the caller gives `count` messages.
        unsafe {
            let message = &mut *messages.add(at);
            message.msg_len = put_datagram(&mut message.msg_hdr, packet);
        }
    }
    count as c_int
}

/// recvmsg(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recvmsg(fd: c_int, message: *mut libc::msghdr, flags: c_int) -> isize {
    if !is_ours(fd) {
        return real!(SYS_recvmsg, fd, message, flags);
    }
    answer(kernel(|kernel| kernel.receive_datagram(fd)).map(|packet| {
        // SAFETY: the caller's.
        unsafe { put_datagram(&mut *message, packet) as usize }
    }))
}

/// Writes a datagram, its source, its destination and its ECN mark. Returns its length.
///
/// # Safety
/// `message` describes valid memory.
unsafe fn put_datagram(
    message: &mut libc::msghdr,
    (from, to, ecn, bytes): (SocketAddrV4, Ipv4Addr, u8, Vec<u8>),
) -> c_uint {
    // SAFETY: the caller's; no more is written than each part has room for.
    unsafe {
        let mut length = message.msg_namelen;
        put_address(from, message.msg_name.cast(), &raw mut length);
        message.msg_namelen = length;
        let mut done = 0;
        if let Some(part) = message.msg_iov.as_ref() {
            done = bytes.len().min(part.iov_len);
            ptr::copy_nonoverlapping(bytes.as_ptr(), part.iov_base.cast(), done);
        }
        let mut info: [u8; size_of::<libc::in_pktinfo>()] = [0; _];
        let at = offset_of!(libc::in_pktinfo, ipi_addr);
        info[at..at + 4].copy_from_slice(&to.octets());
        let mut used = 0;
        for (kind, data) in [(libc::IP_TOS, &[ecn][..]), (libc::IP_PKTINFO, &info[..])] {
            let space = libc::CMSG_SPACE(data.len() as c_uint) as usize;
            if message.msg_control.is_null() || used + space > message.msg_controllen {
                break;
            }
            let header = message
                .msg_control
                .cast::<u8>()
                .add(used)
                .cast::<libc::cmsghdr>();
            (*header).cmsg_level = libc::IPPROTO_IP;
            (*header).cmsg_type = kind;
            (*header).cmsg_len = libc::CMSG_LEN(data.len() as c_uint) as _;
            ptr::copy_nonoverlapping(data.as_ptr(), libc::CMSG_DATA(header), data.len());
            used += space;
        }
        message.msg_controllen = used as _;
        message.msg_flags = 0;
        done as c_uint
    }
}
