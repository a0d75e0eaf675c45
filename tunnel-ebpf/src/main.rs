//! The kernel side of the redirect: entry points only, one for each hook of a cgroup.
//!
//! `connect4` and `connect6` decide what becomes of a connect(2) and send it to the connector's
//! listener; `established` tells the accepting side where it had been meant to go;
//! `getpeername4` and `getpeername6` tell the caller what it asked for. The programs are loaded
//! once for each attachment and share their maps; user space writes captures, routes and
//! heartbeats, the programs write origins, flows and counters.
//!
//! No CO-RE: only the stable contexts of the hooks are read.
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

/// The workspace is checked on the host too, where there is nothing to run.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
