//! The kernel side of the shortcut, an option of an attachment: what a redirected client writes
//! goes into the connector's receive queue, past TCP on loopback.
//!
//! `shortcut_begin` notes a client whose handshake with the listener is done; `shortcut_verdict`
//! runs for each of its writes and decides which way the bytes take. The other direction is left
//! to TCP: who reads there is not ours, and docs/adr/0020 says what that would break.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod begin;
#[cfg(target_arch = "bpf")]
#[path = "../endpoints.rs"]
mod endpoints;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod verdict;

#[cfg(target_arch = "bpf")]
mod entry {
    use aya_ebpf::{
        macros::{sk_msg, sock_ops},
        programs::{SkMsgContext, SockOpsContext},
    };

    use crate::{begin, verdict};

    #[sock_ops]
    fn shortcut_begin(ctx: SockOpsContext) -> u32 {
        begin::begin(&ctx)
    }

    #[sk_msg]
    fn shortcut_verdict(ctx: SkMsgContext) -> u32 {
        verdict::verdict(&ctx)
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
