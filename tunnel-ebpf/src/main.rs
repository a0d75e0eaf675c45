//! The kernel side of the redirect: entry points only, one for each hook of a cgroup.
//!
//! `connect4` and `connect6` decide about a connect(2) and send it to the connector's listener.
//! `established` passes the requested destination to the accepting side. `getpeername4` and
//! `getpeername6` return that destination to the caller. User space loads the programs once for
//! each attachment; all share their maps. User space writes captures, routes and heartbeats; the
//! programs write origins, flows and counters.
//!
//! No CO-RE: the programs read only the stable contexts of the hooks.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod connect;
#[cfg(target_arch = "bpf")]
mod endpoints;
#[cfg(target_arch = "bpf")]
mod getpeername;
#[cfg(target_arch = "bpf")]
mod listener;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod origin;
#[cfg(target_arch = "bpf")]
mod sock_ops;

#[cfg(target_arch = "bpf")]
mod entry {
    use aya_ebpf::{
        macros::{cgroup_sock_addr, sock_ops},
        programs::{SockAddrContext, SockOpsContext},
    };

    use crate::{connect, getpeername, sock_ops};

    #[cgroup_sock_addr(connect4)]
    fn connect4(ctx: SockAddrContext) -> i32 {
        connect::v4(&ctx)
    }

    #[cgroup_sock_addr(connect6)]
    fn connect6(ctx: SockAddrContext) -> i32 {
        connect::v6(&ctx)
    }

    #[cgroup_sock_addr(getpeername4)]
    fn getpeername4(ctx: SockAddrContext) -> i32 {
        getpeername::v4(&ctx)
    }

    #[cgroup_sock_addr(getpeername6)]
    fn getpeername6(ctx: SockAddrContext) -> i32 {
        getpeername::v6(&ctx)
    }

    // Not `sockops`: a function must not be named like its section.
    #[sock_ops]
    fn established(ctx: SockOpsContext) -> u32 {
        sock_ops::established(&ctx)
    }

    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 4] = *b"GPL\0";

    #[panic_handler]
    fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }
}

/// Does nothing: the host's build of the workspace checks this crate, too.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
