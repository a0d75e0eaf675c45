//! getpeername(2) of a redirected socket returns the requested destination.

use core::ptr;

use aya_ebpf::programs::SockAddrContext;

use crate::{connect::write_port, origin};

/// The only answer these hooks may give.
const ALLOW: i32 = 1;

/// Handles hook `getpeername4` (Linux 5.8).
#[inline(always)]
pub(crate) fn v4(ctx: &SockAddrContext) -> i32 {
    if let Some(origin) = origin::of_context(ctx) {
        let sock = ctx.sock_addr;
        // SAFETY: `sock` is the hook's context; these fields are writable in getpeername4.
        unsafe {
            ptr::write_volatile(&raw mut (*sock).user_ip4, origin.destination.address.0[3]);
            write_port(sock, origin.destination.port);
        }
    }
    ALLOW
}

/// Handles hook `getpeername6` (Linux 5.8). A v4-mapped address stays v4-mapped.
#[inline(always)]
pub(crate) fn v6(ctx: &SockAddrContext) -> i32 {
    if let Some(origin) = origin::of_context(ctx) {
        let sock = ctx.sock_addr;
        let words = origin.destination.address.0;
        // SAFETY: `sock` is the hook's context; these fields are writable in getpeername6.
        unsafe {
            let ip = (&raw mut (*sock).user_ip6).cast::<u32>();
            ptr::write_volatile(ip, words[0]);
            ptr::write_volatile(ip.add(1), words[1]);
            ptr::write_volatile(ip.add(2), words[2]);
            ptr::write_volatile(ip.add(3), words[3]);
            write_port(sock, origin.destination.port);
        }
    }
    ALLOW
}
