//! Opening, connecting and configuring sockets.

use std::ffi::{c_int, c_void};
use std::{ptr, slice};

use super::descriptors::unknown;
use super::{address, answer_int, is_ours, is_simulated, kernel, put_address, real};
use crate::kernel::Kernel;
use crate::kernel::filter::Instruction;

/// socket(2)
#[unsafe(no_mangle)]
pub extern "C" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    if !is_simulated() || domain == libc::AF_UNIX || domain == libc::AF_NETLINK {
        return real!(SYS_socket, domain, kind, protocol) as c_int;
    }
    if domain != libc::AF_INET {
        return answer_int::<usize>(Err(libc::EAFNOSUPPORT));
    }
    match kind & !(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC) {
        libc::SOCK_STREAM => kernel(Kernel::tcp_socket),
        libc::SOCK_DGRAM => kernel(Kernel::udp_socket),
        _ => answer_int::<usize>(Err(libc::EPROTONOSUPPORT)),
    }
}

/// bind(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bind(
    fd: c_int,
    at: *const libc::sockaddr,
    length: libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_bind, fd, at, length) as c_int;
    }
    // SAFETY: the caller's.
    let at = unsafe { address(at, length) };
    answer_int(at.and_then(|at| kernel(|kernel| kernel.bind(fd, at))))
}

/// listen(2)
#[unsafe(no_mangle)]
pub extern "C" fn listen(fd: c_int, backlog: c_int) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_listen, fd, backlog) as c_int;
    }
    answer_int(kernel(|kernel| kernel.listen(fd)))
}

/// connect(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn connect(
    fd: c_int,
    to: *const libc::sockaddr,
    length: libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_connect, fd, to, length) as c_int;
    }
    // SAFETY: the caller's.
    let to = unsafe { address(to, length) };
    answer_int(to.and_then(|to| kernel(|kernel| kernel.connect(fd, to))))
}

/// accept4(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn accept4(
    fd: c_int,
    place: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
    flags: c_int,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_accept4, fd, place, length, flags) as c_int;
    }
    answer_int(
        kernel(|kernel| kernel.accept(fd)).map(|(accepted, remote)| {
            // SAFETY: the caller's.
            unsafe { put_address(remote, place, length) };
            accepted as isize
        }),
    )
}

/// getsockname(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getsockname(
    fd: c_int,
    place: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_getsockname, fd, place, length) as c_int;
    }
    answer_int(kernel(|kernel| kernel.local(fd)).map(|local| {
        // SAFETY: the caller's.
        unsafe { put_address(local, place, length) };
        0
    }))
}

/// getpeername(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getpeername(
    fd: c_int,
    place: *mut libc::sockaddr,
    length: *mut libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_getpeername, fd, place, length) as c_int;
    }
    answer_int(kernel(|kernel| kernel.remote(fd)).map(|remote| {
        // SAFETY: the caller's.
        unsafe { put_address(remote, place, length) };
        0
    }))
}

/// setsockopt(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    length: libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_setsockopt, fd, level, name, value, length) as c_int;
    }
    let done = match (level, name) {
        (libc::SOL_SOCKET, libc::SO_LINGER) => {
            // SAFETY: the caller gives a struct linger.
            let linger = unsafe { value.cast::<libc::linger>().read_unaligned() };
            let reset = linger.l_onoff != 0 && linger.l_linger == 0;
            kernel(|kernel| kernel.set_reset_on_close(fd, reset))
        }
        (libc::SOL_SOCKET, libc::SO_REUSEPORT) => kernel(|kernel| kernel.share_port(fd)),
        (libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF) => {
            // SAFETY: the caller gives a struct sock_fprog with its instructions.
            let program = unsafe {
                let program = value.cast::<libc::sock_fprog>().read_unaligned();
                slice::from_raw_parts(program.filter, program.len.into())
            };
            let program = program.iter().map(|it| Instruction {
                code: it.code,
                jt: it.jt,
                jf: it.jf,
                k: it.k,
            });
            kernel(|kernel| kernel.steer(fd, program.collect()))
        }
        // As before Linux 6.10.
        (libc::SOL_SOCKET, libc::SO_PEEK_OFF) => Err(libc::EOPNOTSUPP),
        // Without effect on what the kernel simulates.
        (libc::SOL_SOCKET, libc::SO_REUSEADDR | libc::SO_KEEPALIVE | libc::SO_OOBINLINE)
        | (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER | libc::IP_RECVTOS | libc::IP_PKTINFO)
        | (libc::SOL_UDP, libc::UDP_SEGMENT | libc::UDP_GRO)
        | (
            libc::IPPROTO_TCP,
            libc::TCP_NODELAY | libc::TCP_KEEPIDLE | libc::TCP_KEEPINTVL | libc::TCP_KEEPCNT,
        ) => Ok(0),
        _ => return unknown(format!("setsockopt {level} {name}")),
    };
    answer_int(done)
}

/// Size of a socket's buffers as the kernel reports it: twice of what `quic::udp` wants.
const BUFFER: c_int = 16 << 20;

/// getsockopt(2)
///
/// # Safety
/// As of the C function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    place: *mut c_void,
    length: *mut libc::socklen_t,
) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_getsockopt, fd, level, name, place, length) as c_int;
    }
    let value = match (level, name) {
        (libc::SOL_SOCKET, libc::SO_ERROR) => match kernel(|kernel| kernel.take_error(fd)) {
            Ok(error) => error,
            Err(error) => return answer_int::<usize>(Err(error)),
        },
        (libc::SOL_SOCKET, libc::SO_RCVBUF | libc::SO_SNDBUF) => BUFFER,
        // A caller must not take zeros for facts.
        (libc::IPPROTO_TCP, libc::TCP_INFO) => return answer_int::<usize>(Err(libc::ENOPROTOOPT)),
        (libc::SOL_SOCKET, libc::SO_TYPE) => match kernel(|kernel| kernel.is_udp(fd)) {
            true => libc::SOCK_DGRAM,
            false => libc::SOCK_STREAM,
        },
        _ => 0,
    };
    // SAFETY: the caller gives room for `length` bytes.
    unsafe {
        let size = (*length as usize).min(size_of::<c_int>());
        ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), place.cast(), size);
        *length = size as libc::socklen_t;
    }
    0
}

/// shutdown(2)
#[unsafe(no_mangle)]
pub extern "C" fn shutdown(fd: c_int, how: c_int) -> c_int {
    if !is_ours(fd) {
        return real!(SYS_shutdown, fd, how) as c_int;
    }
    answer_int(kernel(|kernel| kernel.shutdown(fd, how)))
}
